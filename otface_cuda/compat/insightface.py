"""The margin losses and the partial classifier of insightface's recognition/arcface_torch, in one process.

They agree with the version of June 2023, which is the current one. Its margins are straight-through: arccos and cos run
without gradient, so that the slope of every logit is s. Angles are in radians, and the label -1 is for a row whose
class is not among the columns.

A :class:`PartialFC_V2` with one of these losses never holds large logits: both go through
:func:`otface_cuda.margin_softmax_loss`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F  # noqa: N812

from .. import _checks, margins
from ..margin_softmax import cosine_margin_logits, margin_softmax_loss
from ._inputs import angle_margin, check_embeddings, check_goes_with, check_scale, cosine_margin

if TYPE_CHECKING:
    from .._typing import called_as

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC_V2"]


class _MarginLoss(nn.Module, ABC):
    """Cosines to logits; what differs is the margin."""

    s: float
    interclass_filtering_threshold: float = 0

    def __init__(self, s: float) -> None:
        super().__init__()
        check_scale(type(self).__name__, s)
        self.s = s

    @abstractmethod
    def target_margin(self) -> margins.Margin:
        """The margin, of the attributes as they are now."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cosines (B, C) and labels (B,) or (B, 1) to logits (B, C)."""
        where = type(self).__name__
        _checks.check_floating(where, "logits", logits, "(B, C)", (2,))
        flat = _flat_labels(where, "labels", labels, "logits", logits)
        classes = logits.shape[1]
        all_here = _checks.check_classes(where, flat, classes, -1)
        labels = flat.unsqueeze(1)
        target = labels if all_here else labels.clamp(0, classes - 1)
        if self.interclass_filtering_threshold > 0:
            is_dirty = logits > self.interclass_filtering_threshold
            is_dirty.scatter_(1, target, is_dirty.gather(1, target) & (labels != target))
            logits = logits.masked_fill(is_dirty, 0)
        # The slope of a margin that counts as 1 is that of a constant on top.
        on_top = _on_top(logits.detach().gather(1, target), self.target_margin())
        if not all_here:
            on_top = on_top.where(labels == target, 0)
            if not _checks.checks_data(labels):
                on_top.masked_fill_((labels < -1) | (labels >= classes), torch.nan)
        return logits.scatter_add(1, target, on_top) * check_scale(where, self.s)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class CombinedMarginLoss(_MarginLoss):
    r"""Logits of ready cosines, with a margin on the cosine of each row's own class.

    Where m1 = 1 and m3 = 0 it is cos(theta + m2), whatever theta is, otherwise cos(theta) - m3, and m1 and m2 are
    ignored. For all three at once there is :class:`otface_cuda.CombinedMargin`.

    ``forward(logits, labels)`` takes cosines (B, C) and integer labels (B,) or (B, 1), -1 for a row without a class
    here; it returns (B, C) in the dtype of the cosines. The gradient in each cosine is s (0 where it is filtered). The
    original works in place on its input; this leaves it alone. A cosine that rounding has put beyond \|1\| counts as 1.

    Args:
        s: the scale, positive.
        m1, m2, m3: either 1, an angle from 0 to pi, and 0; or anything, anything, and a positive number.
        interclass_filtering_threshold: above 0, cosines of other classes that are larger become 0: they are taken for
            wrong labels.

    Raises:
        ValueError: for other m1 and m3; the original fails in ``forward``, with a RuntimeError.

    >>> cosines = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    >>> CombinedMarginLoss(10.0, 1.0, 0.0, 0.4)(cosines, torch.tensor([0, -1]))
    tensor([[ 4.,  6.],
            [ 0., 10.]])
    """

    def __init__(self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0) -> None:
        super().__init__(s)
        self.m1 = m1
        self.m2 = m2
        self.m3 = m3
        self.interclass_filtering_threshold = interclass_filtering_threshold
        for name in ("m1", "m2", "m3", "interclass_filtering_threshold"):
            _checks.check_finite("CombinedMarginLoss", name, getattr(self, name))
        self.target_margin()

    def target_margin(self) -> margins.Margin:
        where = type(self).__name__
        if self.m1 == 1 and self.m3 == 0:
            return _arcface(where, "m2", self.m2)
        if self.m3 > 0:
            return cosine_margin(where, "m3", self.m3)
        raise ValueError(
            "CombinedMarginLoss: `m1` and `m3` must be 1 and 0 for a margin of m2 on the angle, or `m3` positive for "
            f"one of m3 on the cosine, got m1={self.m1} and m3={self.m3}"
        )


class ArcFace(_MarginLoss):
    """:class:`CombinedMarginLoss` with a margin on the angle: cos(theta + margin), whatever theta is.

    Before December 2022 the original had the exact slope, and fell back to cos(theta) - margin sin(margin) beyond
    theta = pi - margin: that is :class:`otface_cuda.ArcFace` as it is by default.

    >>> ArcFace()(torch.tensor([[0.0, 0.5]]), torch.tensor([0]))
    tensor([[-30.6832,  32.0000]])
    """

    def __init__(self, s: float = 64.0, margin: float = 0.5) -> None:
        super().__init__(s)
        self.margin = margin
        self.target_margin()

    def target_margin(self) -> margins.Margin:
        return _arcface(type(self).__name__, "margin", self.margin)


class CosFace(_MarginLoss):
    """:class:`CombinedMarginLoss` with a margin on the cosine: cos(theta) - m.

    >>> CosFace()(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    tensor([[ 6.4000, 32.0000]])
    """

    def __init__(self, s: float = 64.0, m: float = 0.40) -> None:
        super().__init__(s)
        self.m = m
        self.target_margin()

    def target_margin(self) -> margins.Margin:
        return cosine_margin(type(self).__name__, "m", self.m)


class PartialFC_V2(nn.Module):  # noqa: N801
    """A classifier over all classes, or in each step over those of the batch and random others.

    An, Deng, Guo, Feng, Zhu, Yang, Liu: Killing two birds with one stone, 2022, arXiv 2203.15565. This is what the
    original does in one process; it needs no process group, and batches may differ in size.

    ``forward(local_embeddings, local_labels)`` takes (B, embedding_size) in the dtype of ``weight`` and integer labels
    (B,) or (B, 1) from 0 to num_classes - 1; it returns the mean cross entropy, a scalar. With a
    :class:`CombinedMarginLoss` without a filter, an :class:`ArcFace` or a :class:`CosFace` of this module, that is
    :func:`otface_cuda.margin_softmax_loss`. Anything else is called with the cosines (B, C), for it to change as it
    likes, and labels (B, 1), and has to return the logits.

    Args:
        margin_loss: called with cosines and labels, returns logits; as attribute ``margin_softmax``.
        embedding_size, num_classes: of the parameter ``weight`` (num_classes, embedding_size), drawn from N(0, 0.01^2).
        sample_rate: from 0 to 1. Below 1, a step takes int(sample_rate * num_classes) classes, those of the batch first
            (all of them, if they are more); the attribute ``weight_index`` has them, in order. The gradient is zero in
            all other rows. They are drawn from torch's generator of the weight's device.
        fp16: on CUDA, matrix products are done in float16 and added up in float32. No effect on the CPU.

    Raises:
        RuntimeError: in a process group of more than one process.
        TypeError, ValueError: the message names the argument, what was expected and what came.

    >>> classifier = PartialFC_V2(CombinedMarginLoss(64.0, 1.0, 0.5, 0.0), 16, 1000, sample_rate=0.1)
    >>> classifier(torch.randn(4, 16), torch.tensor([7, 999, 0, 7])).backward()
    >>> classifier.weight_index.shape, int(classifier.weight.grad.any(1).sum())
    (torch.Size([100]), 100)
    """

    weight_index: Tensor

    def __init__(
        self,
        margin_loss: Callable[[Tensor, Tensor], Tensor],
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        super().__init__()
        where = "PartialFC_V2"
        if not callable(margin_loss) or isinstance(margin_loss, type):
            raise _checks.wrong_type(where, "margin_loss", "a function of cosines and labels", margin_loss)
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise RuntimeError(
                f"{where}: holds all classes in one process, got a process group of {distributed.get_world_size()}; "
                "for classes that are spread over processes, use insightface's own"
            )
        self.embedding_size = _checks.check_int(where, "embedding_size", embedding_size, 1)
        self.num_classes = _checks.check_int(where, "num_classes", num_classes, 1)
        self.sample_rate = _checks.check_finite(where, "sample_rate", sample_rate)
        if not 0 <= self.sample_rate <= 1:
            raise _checks.wrong_value(where, "sample_rate", "from 0 to 1", sample_rate)
        self.num_sample = int(self.sample_rate * num_classes)
        _checks.check_bool(where, "fp16", fp16)
        self.fp16 = fp16
        self.weight = nn.Parameter(torch.normal(0, 0.01, (num_classes, embedding_size)))
        self.margin_softmax: Any = margin_loss

    def sample(self, labels: Tensor) -> Tensor:
        """Draw ``weight_index``, and return the places of labels (B,) in it."""
        target = labels.clamp(0, self.num_classes - 1)
        order = torch.rand(self.num_classes, device=labels.device)
        order[target] = 2.0
        count = self.num_sample
        if len(labels) > count:
            count = max(count, len(target.unique()))
        self.weight_index = order.topk(count).indices.sort().values
        return torch.searchsorted(self.weight_index, target).where(labels == target, -1)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        where, x = "PartialFC_V2", local_embeddings
        weight: Tensor = self.weight
        check_embeddings(where, "local_embeddings", x, self.embedding_size)
        labels = _flat_labels(where, "local_labels", local_labels, "local_embeddings", x)
        _checks.check_classes(where, labels, self.num_classes, name="local_labels")
        with torch.autocast("cuda", torch.float16, enabled=self.fp16 and x.is_cuda):
            check_goes_with(where, "local_embeddings", x, "weight", weight)
            if self.sample_rate < 1:
                labels = self.sample(labels)
                weight = weight[self.weight_index]
            margin_loss = self.margin_softmax
            if _is_fused(margin_loss):
                return margin_softmax_loss(x, weight, labels, margin=margin_loss.target_margin(), scale=margin_loss.s)
            cosines = cosine_margin_logits(x, weight, labels, margin=margins.CosFace(0.0), scale=1.0)
        return F.cross_entropy(margin_loss(cosines.clamp(-1, 1), labels[:, None]), labels)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _arcface(where: str, name: str, m: float) -> margins.Margin:
    return angle_margin(where, name, m, beyond_pi="none", grad="straight_through")


def _is_fused(margin_loss: Any) -> bool:
    """Whether it is one of these, and not a subclass with a ``forward`` of its own."""
    return (
        isinstance(margin_loss, _MarginLoss)
        and type(margin_loss).forward is _MarginLoss.forward
        and not margin_loss.interclass_filtering_threshold > 0
    )


def _on_top(cos: Tensor, margin: margins.Margin) -> Tensor:
    """What the margin adds to the cosines, which may be overwritten; an angle is computed in float64."""
    assert isinstance(margin, (margins.ArcFace, margins.CosFace))
    if margin.m == 0 or isinstance(margin, margins.CosFace):
        return torch.full_like(cos, -margin.m)
    with_margin = cos.to(torch.float64, copy=True).clamp_(-1, 1).acos_().add_(margin.m).cos_()
    return cos.copy_(with_margin.sub_(cos))


def _flat_labels(where: str, name: str, labels: Any, like_name: str, like: Tensor) -> Tensor:
    """(B,) int64, of (B,) or (B, 1)."""
    if isinstance(labels, Tensor) and not labels.is_nested and labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    return _checks.class_labels(where, labels, like_name, like, name)
