"""The OTFace loss: margin softmax of the embeddings, and transport between the feature maps of hard triplets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._documented import documented_fields
from .margin_modules import MarginHead
from .margin_softmax import margin_softmax_loss
from .margins import ArcFace, Margin
from .mining import mine_hard_triplets
from .ot_triplet import ot_triplet_loss

if TYPE_CHECKING:
    from ._typing import called_as

_ARCFACE = ArcFace(0.45)


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

    >>> loss = OTFaceLoss(num_classes=10, embedding_size=16)
    >>> embeddings, maps = torch.randn(6, 16), torch.randn(6, 32, 7, 7, requires_grad=True)
    >>> out = loss(embeddings, maps, torch.tensor([0, 0, 1, 1, 2, 2]))
    >>> out.loss.backward()
    >>> maps.grad.shape
    torch.Size([6, 32, 7, 7])
    """

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
        )
        if _checks.check_finite("OTFaceLoss", "ot_weight", ot_weight) < 0:
            raise _checks.wrong_value("OTFaceLoss", "ot_weight", "at least 0", ot_weight)

    def forward(self, embeddings: Tensor, feature_map: Tensor, labels: Tensor) -> OTFaceOutput:
        s = self.settings
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
        margin_loss = margin_softmax_loss(embeddings, self.weight, labels, margin=s["margin"], scale=s["scale"])
        if s["ot_weight"] == 0:
            none = torch.zeros((), dtype=torch.int64, device=labels.device)
            return OTFaceOutput(margin_loss, margin_loss, torch.zeros_like(margin_loss), none, none)
        triplets = mine_hard_triplets(embeddings, labels, s["alpha"], s["max_triplets"])
        ot_loss, n_hard, n_active = ot_triplet_loss(
            feature_map, triplets, eps=s["eps"], n_iter=s["n_iter"], beta=s["beta"], metric=s["metric"]
        )
        return OTFaceOutput(margin_loss + s["ot_weight"] * ot_loss, margin_loss, ot_loss, n_hard, n_active)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
