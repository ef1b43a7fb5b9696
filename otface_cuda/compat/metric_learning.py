"""The angular losses of pytorch-metric-learning 2.9, for use with its miners, reducers, regularizers and trainers.

They have its conventions: the parameter ``W`` (embedding_size, num_classes) from N(0, 1), the margin of ArcFace in
degrees, and as the loss the mean over the batch, weighted by how often a miner chose each row. The package itself is
not imported; what is passed in from it is called by its protocol.

``W`` has that shape, but a row per class in memory (its strides are those of a transposed matrix), because the kernels
read it so. A ``W`` with other strides, as from ``load_state_dict(..., assign=True)``, is copied in each call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks, margins
from ..margin_reference import margin_reference
from ..margin_softmax import margin_softmax_loss
from ._inputs import check_embeddings, cosine_margin
from ._metric_learning_base import IGNORED, AngularLoss, own_cosines

__all__ = ["ArcFaceLoss", "CosFaceLoss", "SphereFaceLoss", "SubCenterArcFaceLoss"]


class _FusedLoss(AngularLoss):
    """Without logits in memory where these are large."""

    def _losses(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return margin_softmax_loss(
            x, weight, labels, margin=self._margin(), scale=self.scale, reduction="none", ignore_index=IGNORED
        )


class _ArcFaceMargin(AngularLoss):
    """A margin that is given in degrees, and kept in radians."""

    def init_margin(self) -> None:
        if not 0 <= _checks.check_finite(type(self).__name__, "margin", self.margin) <= 180:
            raise _checks.wrong_value(type(self).__name__, "margin", "an angle from 0 to 180, in degrees", self.margin)
        self.margin = math.radians(self.margin)

    def modify_cosine_of_target_classes(self, cosine_of_target_classes: Tensor) -> Tensor:
        if not self._is_changed("get_angles"):
            return super().modify_cosine_of_target_classes(cosine_of_target_classes)
        angles = self.get_angles(cosine_of_target_classes)
        fallback = angles.cos() - self.margin * math.sin(self.margin)
        return torch.where(angles <= math.pi - self.margin, (angles + self.margin).cos(), fallback)

    def _margin(self) -> margins.Margin:
        return margins.ArcFace(self.margin)


class ArcFaceLoss(_FusedLoss, _ArcFaceMargin):
    r"""cos(theta + margin) for the own class, and cos(theta) - margin sin(margin) beyond theta = pi - margin.

    Large logits are never held: see :func:`otface_cuda.margin_softmax_loss`. The gradient is exact and finite, also
    where \|cos(theta)\| = 1. Half types are computed, and the loss returned, in float32, and
    ``W`` keeps its dtype, which the original changes to that of each batch. A ``W`` on another device than the
    embeddings is moved to theirs.

    ``forward(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)`` takes embeddings (B, d), labels
    (B,) from 0 to num_classes - 1 (or -100: the loss of the row is 0), and the three or four tensors of indices of a
    miner: the loss of a row is multiplied by how often it occurs in them, relative to the row that occurs most often,
    and the mean is over all rows. References cannot be compared with: they are a ValueError. ``get_logits(embeddings)``
    returns (B, C) without a margin.

    Args:
        num_classes, embedding_size: of the parameter ``W`` (embedding_size, num_classes).
        margin: in degrees, from 0 to 180; as attribute in radians.
        scale: of the cosines, positive.
        **kwargs: ``weight_init_func``, ``weight_regularizer``, ``weight_reg_weight``, ``embedding_regularizer``,
            ``embedding_reg_weight``, ``reducer``, ``distance`` (only a plain ``CosineSimilarity()``), ``collect_stats``
            (the mean angle as ``avg_angle``; False unless given), as in pytorch-metric-learning.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.
        AssertionError: for another ``distance``.

    >>> loss = ArcFaceLoss(num_classes=10, embedding_size=4)
    >>> loss(torch.randn(3, 4), torch.tensor([0, 7, 2])).backward()
    >>> loss.W.grad.shape, loss.get_logits(torch.randn(3, 4)).shape
    (torch.Size([4, 10]), torch.Size([3, 10]))
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 28.6, scale: float = 64, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **kwargs)


class CosFaceLoss(_FusedLoss):
    """cos(theta) - margin for the own class; everything else as in :class:`ArcFaceLoss`.

    >>> loss = CosFaceLoss(num_classes=10, embedding_size=4, margin=0.2)
    >>> loss(torch.randn(3, 4), torch.tensor([0, 7, 2])).shape
    torch.Size([])
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.35, scale: float = 64, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **kwargs)

    def init_margin(self) -> None:
        self._margin()

    def _margin(self) -> margins.Margin:
        return cosine_margin(type(self).__name__, "margin", self.margin)


class SphereFaceLoss(AngularLoss):
    r"""(-1)^k cos(margin theta) - 2 k for the own class, with k = floor(margin theta / pi), and all logits times \|x\|.

    Everything else as in :class:`ArcFaceLoss`, but for the memory: because of the length of x, which gets a gradient
    too, the logits (B, C) are held.

    Args:
        margin: at least 1; a fraction is cut off.

    >>> loss = SphereFaceLoss(num_classes=10, embedding_size=4)
    >>> x = torch.randn(3, 4)
    >>> bool(torch.allclose(loss.get_logits(2 * x), 2 * loss.get_logits(x)))
    True
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 4, scale: float = 1, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **kwargs)

    def init_margin(self) -> None:
        where = type(self).__name__
        self.margin = int(_checks.check_finite(where, "margin", self.margin))
        if self.margin < 1:
            raise _checks.wrong_value(where, "margin", "at least 1", self.margin)

    def modify_cosine_of_target_classes(self, cosine_of_target_classes: Tensor) -> Tensor:
        if not self._is_changed("get_angles"):
            return super().modify_cosine_of_target_classes(cosine_of_target_classes)
        k = (self.get_angles(cosine_of_target_classes).detach() / (math.pi / self.margin)).floor()
        of_multiple = margin_reference(cosine_of_target_classes, margins.CombinedMargin(self.margin))
        return (1 - 2 * k.remainder(2)) * of_multiple.to(cosine_of_target_classes.dtype) - 2 * k

    def scale_logits(self, logits: Tensor, embeddings: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        return super().scale_logits(logits, embeddings) * length

    def _margin(self) -> margins.Margin:
        return margins.SphereFace(self.margin)

    def _logits(self, x: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return super()._logits(x, weight, labels) * length


class SubCenterArcFaceLoss(_ArcFaceMargin):
    """:class:`ArcFaceLoss` with several weight vectors per class, of which the nearest counts.

    Deng, Guo, Liu, Gong, Zafeiriou: Sub-center ArcFace, ECCV 2020. The logits of all sub-centers
    (B, num_classes * sub_centers) are held.

    Args:
        sub_centers: how many a class has; ``W`` is (embedding_size, num_classes * sub_centers), those of a class
            side by side.

    >>> loss = SubCenterArcFaceLoss(num_classes=10, embedding_size=4)
    >>> loss.W.shape, loss.get_logits(torch.randn(3, 4)).shape
    (torch.Size([4, 30]), torch.Size([3, 10]))
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        **kwargs: Any,
    ) -> None:
        where = type(self).__name__
        classes = _checks.check_int(where, "num_classes", num_classes, 1)
        columns = classes * _checks.check_int(where, "sub_centers", sub_centers, 1)
        super().__init__(columns, embedding_size, margin, scale, **kwargs)
        self.num_classes = classes
        self.sub_centers = sub_centers

    def get_cosine(self, embeddings: Tensor) -> Tensor:
        return self._nearest(super().get_cosine(embeddings))

    def _logits(self, x: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            return self._nearest(super()._logits(x, weight, None))
        own = labels.clamp(0, self.num_classes - 1)
        column = own * self.sub_centers + self._nearest_of(x.detach(), weight.detach(), own)
        logits = super()._logits(x, weight, column.where(labels == own, IGNORED))
        # With its margin the nearest may not be the nearest any more: it counts all the same.
        return self._nearest(logits).scatter(1, own[:, None], logits.gather(1, column[:, None]))

    def _nearest_of(self, x: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
        """(B,): which sub-center of these classes is nearest to each row of x; one of length 0 has cosine 0."""
        centers = weight.unflatten(0, (self.num_classes, self.sub_centers)).index_select(0, classes).double()
        products = torch.bmm(centers, x.double().unsqueeze(2)).squeeze(2)
        lengths = torch.linalg.vector_norm(centers, dim=2).clamp_(min=torch.finfo(torch.float64).tiny)
        return products.div_(lengths).argmax(1)

    def _nearest(self, logits: Tensor) -> Tensor:
        by_class: Tensor = logits.unflatten(1, (self.num_classes, self.sub_centers))
        return by_class.max(2).values

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rows at more than an angle from the dominant sub-center of their class, to be left out of the training set.

        The dominant one is the nearest to most rows of the class, the first if there are several.

        Args:
            embeddings, labels: (N, d) and (N,), often of all training data.
            threshold: the angle in degrees.
            return_dominant_centers: also return (d, C), the dominant sub-centers, zero for a class without rows.

        Returns:
            Row numbers, int64, by class; or these and the sub-centers. The original returns both in any case, float32
            instead of int64 where there are no outliers, and what was in memory for a class without rows.

        >>> loss = SubCenterArcFaceLoss(num_classes=2, embedding_size=2, sub_centers=2)
        >>> _ = loss.W.data.copy_(torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]]))
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
        >>> loss.get_outliers(x, torch.tensor([0, 0, 0]))
        (tensor([1]), tensor([[1., 0.],
                [0., 0.]]))
        """
        check_embeddings(type(self).__name__, "embeddings", embeddings, self.embedding_size)
        self.cast_types(embeddings.dtype, embeddings.device)
        x, weight = self._operands(embeddings)
        labels = self._labels(labels, embeddings)
        cosines = own_cosines(x, weight, labels, self.sub_centers)
        votes = weight.new_zeros(self.num_classes, self.sub_centers, dtype=torch.int64)
        own = labels.clamp(0, self.num_classes - 1)
        votes.index_put_((own, cosines.argmax(1)), (labels == own).long(), accumulate=True)
        dominant = votes.argmax(1)
        is_far = cosines.gather(1, dominant[own][:, None])[:, 0] < math.cos(math.radians(threshold))
        is_far &= labels == own
        by_class = labels.argsort(stable=True)
        outliers = by_class[is_far[by_class]]
        if not return_dominant_centers:
            return outliers
        centers = weight[torch.arange(self.num_classes, device=x.device) * self.sub_centers + dominant]
        return outliers, centers.where(votes.any(1, keepdim=True), 0).to(embeddings.dtype).t()
