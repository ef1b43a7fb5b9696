"""The OTFace loss: margin softmax of the embeddings, and transport between the feature maps of hard triplets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, margin_softmax, mining, ot_triplet
from ._documented import documented_fields
from ._warnings import warn_users_line
from .margin_modules import Checks, MarginHead
from .margins import ArcFace, Margin

if TYPE_CHECKING:
    from ._typing import called_as

_ARCFACE = ArcFace(0.45)


def _check_ot_weight(where: str, ot_weight: Any) -> float:
    number = _checks.check_finite(where, "ot_weight", ot_weight)
    if number < 0:
        raise _checks.wrong_value(where, "ot_weight", "at least 0", ot_weight)
    return number


def _check_max_triplets(where: str, max_triplets: Any) -> int | None:
    return None if max_triplets is None else mining.check_most(where, max_triplets)


CHECKS: Checks = {
    "margin": margin_softmax.check_margin,
    "scale": margin_softmax.check_scale,
    "ot_weight": _check_ot_weight,
    "eps": ot_triplet.check_eps,
    "n_iter": ot_triplet.check_iterations,
    "alpha": mining.check_alpha,
    "beta": ot_triplet.check_beta,
    "max_triplets": _check_max_triplets,
    "metric": ot_triplet.check_metric,
    "ignore_index": margin_softmax.check_index,
    "label_smoothing": margin_softmax.check_smoothing,
}


@documented_fields
class OTFaceOutput(NamedTuple):
    """What :class:`OTFaceLoss` returns: scalars; only ``loss`` need be differentiated."""

    loss: Tensor
    """margin_loss + ot_weight * ot_loss."""
    margin_loss: Tensor
    """That of :func:`margin_softmax_loss`."""
    ot_loss: Tensor
    """That of :func:`ot_triplet_loss`, before ``ot_weight``."""
    n_hard: Tensor
    """int64: hard triplets of the batch."""
    n_active: Tensor
    """int64: those whose transport distances are in the wrong order too."""


class OTFaceLoss(MarginHead):
    """The OTFace loss: margin softmax plus a hinge on transport distances between the feature maps of hard triplets.

    Qian, Zhu, Zhao, Yang, Wong 2022, arXiv 2203.14461. loss = :func:`margin_softmax_loss` of the embeddings
    + ``ot_weight`` * :func:`ot_triplet_loss` of the feature maps, for the triplets of :func:`mine_hard_triplets`. For
    triplets to exist, a batch needs several images of a class.

    ``forward(embeddings, feature_map, labels)`` takes embeddings (N, d), the last feature map of the same images
    (N, C, H, W) or (N, P, D), and labels (N,); it returns :class:`OTFaceOutput`.

    Args:
        num_classes, embedding_size: of the class weights (num_classes, embedding_size), parameter ``weight``.
        margin: any margin; ``ArcFace(0.45)`` and ``CosFace(0.35)`` are those of the paper.
        scale: of the logits.
        ot_weight: of the transport term, at least 0; at 0 it is left out.
        eps, n_iter, beta, metric: as in :func:`ot_triplet_loss`.
        alpha, max_triplets: as in :func:`mine_hard_triplets`; with ``max_triplets`` the module can be compiled as a
            whole and nothing waits for a GPU.
        ignore_index, label_smoothing, class_weight: as in :class:`MarginSoftmaxLoss`. A row whose label is
            ``ignore_index`` is no person: it has no loss and is in no triplet. Its embedding may hold anything, its
            feature map has to be finite.

    All of them are attributes that ``forward`` reads, and may be assigned at any time, as a schedule of the margin or
    of ``ot_weight`` does: see :class:`MarginSoftmaxLoss`.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.

    Warns:
        UserWarning: where the labels of a batch allow no triplet, because there are no two rows of one class beside one
            of another: once for each line that calls, by the standard filters; on CUDA only with ``OTFACE_CHECK=1``.

    >>> loss = OTFaceLoss(num_classes=10, embedding_size=16)
    >>> embeddings, maps = torch.randn(6, 16), torch.randn(6, 32, 7, 7, requires_grad=True)
    >>> out = loss(embeddings, maps, torch.tensor([0, 0, 1, 1, 2, 2]))
    >>> out.loss.backward()
    >>> maps.grad.shape
    torch.Size([6, 32, 7, 7])
    """

    checks = CHECKS
    margin: Margin
    scale: float
    ot_weight: float
    eps: float
    n_iter: int
    alpha: float
    beta: float
    max_triplets: int | None
    metric: str
    ignore_index: int
    label_smoothing: float
    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        margin: Margin = _ARCFACE,
        scale: float = 64.0,
        ot_weight: float = 10.0,
        eps: float = 1.0,
        n_iter: int = 10,
        alpha: float = 0.0,
        beta: float = 0.0,
        max_triplets: int | None = None,
        metric: str = "cosine",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            device,
            dtype,
            margin=margin,
            scale=scale,
            ot_weight=ot_weight,
            eps=eps,
            n_iter=n_iter,
            alpha=alpha,
            beta=beta,
            max_triplets=max_triplets,
            metric=metric,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
        )

    def forward(self, embeddings: Tensor, feature_map: Tensor, labels: Tensor) -> OTFaceOutput:
        if not isinstance(embeddings, Tensor):
            raise _checks.wrong_type("OTFaceLoss", "embeddings", "a tensor of shape (N, d)", embeddings)
        if not isinstance(feature_map, Tensor):
            raise _checks.wrong_type(
                "OTFaceLoss", "feature_map", "a tensor of shape (N, C, H, W) or (N, P, D)", feature_map
            )
        for name, x in (("embeddings", embeddings), ("feature_map", feature_map)):
            _checks.check_dense("OTFaceLoss", name, x, pad=True)
        if feature_map.shape[:1] != embeddings.shape[:1]:
            expected = f"a tensor of {embeddings.shape[0]} feature maps to go with `embeddings`"
            raise _checks.wrong_value("OTFaceLoss", "feature_map", expected, feature_map)
        margin_loss = margin_softmax.margin_softmax_loss(
            embeddings,
            self.weight,
            labels,
            margin=self.margin,
            scale=self.scale,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
        )
        if self.ot_weight == 0:
            none = torch.zeros((), dtype=torch.int64, device=labels.device)
            return OTFaceOutput(margin_loss, margin_loss, torch.zeros_like(margin_loss), none, none)
        triplets = mining.mine_hard_triplets(
            embeddings, labels, self.alpha, self.max_triplets, ignore_index=self.ignore_index
        )
        ot_loss, n_hard, n_active = ot_triplet.ot_triplet_loss(
            feature_map, triplets, eps=self.eps, n_iter=self.n_iter, beta=self.beta, metric=self.metric
        )
        if _checks.checks_data(labels) and n_hard == 0:
            _warn_if_impossible(type(self).__name__, labels[labels != self.ignore_index])
        return OTFaceOutput(margin_loss + self.ot_weight * ot_loss, margin_loss, ot_loss, n_hard, n_active)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _warn_if_impossible(where: str, labels: Tensor) -> None:
    """Of the labels (N,) that are not ignored."""
    people, counts = labels.unique(return_counts=True)
    if len(labels) == 0 or (len(people) > 1 and counts.max() > 1):
        return
    what = "here each has one of its own" if counts.max() == 1 else "here all are of one"
    warn_users_line(
        f"{where}: a batch needs several rows of one class, and of more than one class, for the transport loss, which "
        f"is 0 otherwise; {what}",  # no number: `warnings` knows by the text what it has shown
        UserWarning,
    )
