"""What the losses of :mod:`otface_cuda.compat.metric_learning` have in common: pytorch-metric-learning's protocol."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .. import _checks, margins
from ..margin_softmax import cosine_margin_logits

if TYPE_CHECKING:
    from .._typing import called_as

IGNORED = -100


class AngularLoss(nn.Module, ABC):
    """What all have; they differ in the margin, and in what becomes of the cosines.

    Args:
        num_classes, embedding_size: of the parameter ``W`` (embedding_size, num_classes).
        margin, scale: may be changed later, as attributes.
        weight_init_func: fills ``W`` in place; by default from N(0, 1).
        weight_regularizer, weight_reg_weight: a function of the class weights (C, d), and a factor of what it returns,
            which is added to the loss.
        embedding_regularizer, embedding_reg_weight: the same of the embeddings.
        reducer: called with (loss_dict, embeddings, labels) instead of taking the mean; it is copied.
        distance: None or a plain ``CosineSimilarity()``.
        collect_stats: leave the mean angle to the own class as attribute ``avg_angle``, in degrees; waits for a GPU.
    """

    sub_centers = 1
    avg_angle = 0.0

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float,
        scale: float,
        *,
        weight_init_func: Callable[[Tensor], Any] | None = None,
        weight_regularizer: Callable[[Tensor], Tensor] | None = None,
        weight_reg_weight: float = 1,
        embedding_regularizer: Callable[[Tensor], Tensor] | None = None,
        embedding_reg_weight: float = 1,
        reducer: Any = None,
        distance: Any = None,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.num_classes = _checks.check_int(where, "num_classes", num_classes, 1)
        self.embedding_size = _checks.check_int(where, "embedding_size", embedding_size, 1)
        self.margin = margin
        if _checks.check_finite(where, "scale", scale) <= 0:
            raise _checks.wrong_value(where, "scale", "positive", scale)
        self.scale = scale
        self.weight_init_func = nn.init.normal_ if weight_init_func is None else weight_init_func
        self.weight_regularizer = weight_regularizer
        self.weight_reg_weight = weight_reg_weight
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        self.reducer = reducer if _takes_all_losses(reducer) else copy.deepcopy(reducer)
        _check_distance(where, distance)
        self.distance = distance
        self.collect_stats = bool(collect_stats)
        self._record_these = ["num_classes", "margin", "scale"]  # for the trainers' records
        self._record_these_stats = ["avg_angle"] if self.collect_stats else []
        self.W = nn.Parameter(torch.empty(embedding_size, num_classes))
        self.weight_init_func(self.W)
        self.W.data = self.W.data.t().contiguous().t()

    @abstractmethod
    def _margin(self) -> margins.Margin:
        """The margin, of the attributes as they are now."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """Embeddings (B, d) and labels (B,), with indices of a miner, to a scalar, or to what the reducer returns."""
        where = type(self).__name__
        if labels is None:
            raise ValueError(f"{where}: `labels` must be given")
        if ref_emb is not None and not (ref_emb is embeddings and ref_labels is labels):
            raise ValueError(f"{where}: `ref_emb` must be None: the embeddings are compared with classes")
        x, weight = self._operands(embeddings)
        labels = self._labels(labels, embeddings)
        if self.collect_stats:
            cos = own_cosines(x.detach(), weight.detach(), labels, self.sub_centers).amax(1)
            self.avg_angle = cos.clamp(-1, 1).acos().mean().rad2deg().item()
        losses = self._losses(x, weight, labels)
        if indices_tuple is not None:
            losses = losses * _frequencies(indices_tuple, losses)
        loss_dict = {
            "loss": {
                "losses": losses,
                "indices": torch.arange(len(losses), device=losses.device),
                "reduction_type": "element",
            }
        }
        if self.weight_regularizer is not None:
            loss_dict["weight_reg_loss"] = _reduced(self.weight_regularizer(self.W.t()) * self.weight_reg_weight)
        if self.embedding_regularizer is not None:
            of_embeddings = self.embedding_regularizer(embeddings) * self.embedding_reg_weight
            loss_dict["embedding_reg_loss"] = _reduced(of_embeddings)
        return self._reduce(loss_dict, embeddings, labels)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C) without a margin, for inference."""
        return self._logits(*self._operands(embeddings), None)

    def _operands(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, d) and weights (C, d), in the wider of their dtypes."""
        where = type(self).__name__
        _checks.check_floating(where, "embeddings", embeddings, f"(B, {self.embedding_size})", (2,))
        if embeddings.shape[1] != self.embedding_size:
            raise _checks.wrong_value(where, "embeddings", f"of shape (B, {self.embedding_size})", embeddings)
        if self.W.device != embeddings.device:
            self.W.data = self.W.data.to(embeddings.device)
        dtype = torch.promote_types(embeddings.dtype, self.W.dtype)
        return embeddings.to(dtype), self.W.to(dtype).t()

    def _labels(self, labels: Any, embeddings: Tensor) -> Tensor:
        """(B,) int64 on the device of the embeddings."""
        where = type(self).__name__
        if isinstance(labels, Tensor):
            labels = labels.to(embeddings.device)
        whole = _checks.class_labels(where, labels, "embeddings", embeddings)
        _checks.check_classes(where, whole, self.num_classes, IGNORED)
        return whole

    def _logits(self, x: Tensor, weight: Tensor, labels: Tensor | None) -> Tensor:
        """(B, C), with the margin if there are labels."""
        if labels is None:
            labels = torch.full(x.shape[:1], IGNORED, device=x.device)
        return cosine_margin_logits(x, weight, labels, margin=self._margin(), scale=self.scale)

    def _losses(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """(B,)."""
        return F.cross_entropy(self._logits(x, weight, labels), labels, reduction="none")

    def _reduce(self, loss_dict: dict[str, Any], embeddings: Tensor, labels: Tensor) -> Any:
        if _takes_all_losses(self.reducer):
            return self.reducer(loss_dict, embeddings, labels)
        loss = loss_dict.pop("loss")
        total = loss["losses"].mean() if self.reducer is None else self.reducer({"loss": loss}, embeddings, labels)
        for regularizer in loss_dict.values():
            total = total + regularizer["losses"]
        return total


def own_cosines(x: Tensor, weight: Tensor, labels: Tensor, sub_centers: int) -> Tensor:
    """(B, sub_centers), with those of the own class; for an ignored label with those of the first."""
    first = labels.clamp(0, len(weight) // sub_centers - 1) * sub_centers
    return torch.stack([F.cosine_similarity(x, weight[first + k]) for k in range(sub_centers)], dim=1)


def _frequencies(indices_tuple: Sequence[Tensor], losses: Tensor) -> Tensor:
    """(B,): how often a row occurs in the indices, relative to the one that occurs most often."""
    indices = torch.cat([i.to(losses.device) for i in indices_tuple])
    if len(indices) == 0:
        return torch.ones_like(losses)
    counts = torch.zeros_like(losses).index_add(0, indices, torch.ones_like(indices, dtype=losses.dtype))
    return counts / counts.max()


def _reduced(loss: Tensor) -> dict[str, Any]:
    return {"losses": loss, "indices": None, "reduction_type": "already_reduced"}


def _takes_all_losses(reducer: Any) -> bool:
    """Of the reducers of pytorch-metric-learning, two take the loss together with those of the regularizers."""
    return any(base.__name__ in ("MultipleReducers", "DoNothingReducer") for base in type(reducer).__mro__)


def _check_distance(where: str, distance: Any) -> None:
    if distance is None:
        return
    if type(distance).__name__ != "CosineSimilarity" or (distance.p, distance.power) != (2, 1):
        raise AssertionError(
            f"{where}: `distance` must be None or CosineSimilarity(), got {_checks.describe(distance)}"
        )
