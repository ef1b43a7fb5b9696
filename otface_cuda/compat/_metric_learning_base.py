"""What the losses of :mod:`otface_cuda.compat.metric_learning` have in common: pytorch-metric-learning's protocol."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .. import _checks, margins
from ..margin_reference import margin_reference
from ..margin_softmax import cosine_margin_logits
from ._inputs import check_embeddings

if TYPE_CHECKING:
    from .._typing import called_as

IGNORED = -100
LIBRARY = "pytorch_metric_learning"
# What a subclass may override to change the logits: then they are computed as in the original, by these.
LOGIT_HOOKS = ("get_cosine", "get_angles", "get_target_mask", "modify_cosine_of_target_classes", "scale_logits")
# What is called in the original and not here.
NOT_CALLED = (
    "get_cos_with_margin",
    "get_default_distance",
    "set_reducer",
    "reset_stats",
    "add_weight_regularization_to_loss_dict",
    "weight_regularization_loss",
    "add_embedding_regularization_to_loss_dict",
    "embedding_regularization_loss",
)


class CosineSimilarity:
    """What `distance` is unless one is given: called with (B, d) and (C, d), returns (B, C)."""

    p, power = 2, 1

    def __call__(self, query: Tensor, reference: Tensor | None = None) -> Tensor:
        return F.normalize(query) @ F.normalize(query if reference is None else reference).t()

    def get_norm(self, embeddings: Tensor, dim: int = 1) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(embeddings, dim=dim)
        return norm


class AngularLoss(nn.Module, ABC):
    """What all have; they differ in the margin, and in what becomes of the cosines.

    The methods that a subclass of the original may override are called here too: :meth:`init_margin`,
    :meth:`cast_types`, :meth:`compute_loss`, :meth:`get_default_reducer`, :meth:`get_default_weight_init_func`, and
    those of the logits. Where one of the latter is overridden, or the attribute ``cross_entropy`` is set, the logits
    (B, C) are computed by them and held, as in the original. A subclass with a method that is never called here is
    refused.

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
    _overrides_logits = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in NOT_CALLED:
            if _is_overridden(cls, name):
                raise TypeError(
                    f"{cls.__name__}: `{name}` must not be overridden, because the losses of "
                    f"otface_cuda.compat.metric_learning never call it; override compute_loss, or stay with {LIBRARY}"
                )
        cls._overrides_logits = any(_is_overridden(cls, name) for name in LOGIT_HOOKS)

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
        nn.Module.__init__(self)
        _join_the_library()
        where = type(self).__name__
        self.num_classes = _checks.check_int(where, "num_classes", num_classes, 1)
        self.embedding_size = _checks.check_int(where, "embedding_size", embedding_size, 1)
        self.margin = margin
        self.init_margin()
        if _checks.check_finite(where, "scale", scale) <= 0:
            raise _checks.wrong_value(where, "scale", "positive", scale)
        self.scale = scale
        self.weight_init_func = self.get_default_weight_init_func() if weight_init_func is None else weight_init_func
        self.weight_regularizer = weight_regularizer
        self.weight_reg_weight = weight_reg_weight
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        reducer = self.get_default_reducer() if reducer is None else reducer
        self.reducer = reducer if _takes_all_losses(reducer) else copy.deepcopy(reducer)
        _check_distance(where, distance)
        self.distance = CosineSimilarity() if distance is None else distance
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] | None = None
        self.collect_stats = bool(collect_stats)
        self._record_these = ["num_classes", "margin", "scale"]  # for the trainers' records
        self._record_these_stats = ["avg_angle"] if self.collect_stats else []
        self.W = nn.Parameter(torch.empty(embedding_size, num_classes))
        self.weight_init_func(self.W)
        self.W.data = self.W.data.t().contiguous().t()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _join_the_library()

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
        check_embeddings(where, "embeddings", embeddings, self.embedding_size)
        labels = self._labels(labels, embeddings)
        loss_dict = self.compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if self.embedding_regularizer is not None:
            of_embeddings = self.embedding_regularizer(embeddings) * self.embedding_reg_weight
            loss_dict["embedding_reg_loss"] = _reduced(of_embeddings)
        return self._reduce(loss_dict, embeddings, labels)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, Any]:
        """Embeddings (B, d) and labels (B,) int64 to what a reducer takes."""
        self.cast_types(embeddings.dtype, embeddings.device)
        if self._logits_are_changed():
            losses = self._losses_by_hooks(embeddings, labels)
        else:
            x, weight = self._operands(embeddings)
            if self.collect_stats:
                self._keep_angle(own_cosines(x.detach(), weight.detach(), labels, self.sub_centers).amax(1))
            losses = self._losses(x, weight, labels)
        if indices_tuple is not None:
            losses = losses * _frequencies(indices_tuple, losses)
        of_rows = {
            "losses": losses,
            "indices": torch.arange(len(losses), device=losses.device),
            "reduction_type": "element",
        }
        loss_dict = {"loss": of_rows}
        if self.weight_regularizer is not None:
            loss_dict["weight_reg_loss"] = _reduced(self.weight_regularizer(self.W.t()) * self.weight_reg_weight)
        return loss_dict

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C) without a margin, for inference."""
        check_embeddings(type(self).__name__, "embeddings", embeddings, self.embedding_size)
        self.cast_types(embeddings.dtype, embeddings.device)
        if self._logits_are_changed():
            return self.scale_logits(self.get_cosine(embeddings), embeddings)
        return self._logits(*self._operands(embeddings), None)

    def init_margin(self) -> None:
        """Turn the attribute ``margin`` from what the user gave into what the other methods take."""

    def cast_types(self, dtype: torch.dtype, device: torch.device) -> None:
        """Called with those of each batch. ``W`` is moved to its device, and keeps its dtype."""
        if self.W.device != device:
            self.W.data = self.W.data.to(device)

    def get_cosine(self, embeddings: Tensor) -> Tensor:
        """(B, C)."""
        x, weight = self._operands(embeddings)
        return cosine_margin_logits(x, weight, _nobody(x), margin=margins.CosFace(0.0), scale=1.0)

    def get_angles(self, cosine_of_target_classes: Tensor) -> Tensor:
        """(B,), in radians."""
        if self.collect_stats:
            self._keep_angle(cosine_of_target_classes)
        return cosine_of_target_classes.clamp(-1, 1).acos()

    def get_target_mask(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, C), 1 for the own class."""
        return F.one_hot(labels, self.num_classes).to(embeddings.dtype)

    def modify_cosine_of_target_classes(self, cosine_of_target_classes: Tensor) -> Tensor:
        """(B,), with the margin."""
        if self.collect_stats:
            self.get_angles(cosine_of_target_classes.detach())
        return margin_reference(cosine_of_target_classes, self._margin()).to(cosine_of_target_classes.dtype)

    def scale_logits(self, logits: Tensor, embeddings: Tensor) -> Tensor:
        """(B, C)."""
        return logits * self.scale

    def get_default_reducer(self) -> Any:
        """None: the mean."""
        return

    def get_default_weight_init_func(self) -> Callable[[Tensor], Any]:
        return nn.init.normal_

    def _is_changed(self, name: str) -> bool:
        """A method: by a subclass, or by an attribute of this very loss."""
        return name in self.__dict__ or _is_overridden(type(self), name)

    def _logits_are_changed(self) -> bool:
        changed = self._overrides_logits or self.cross_entropy is not None
        return changed or any(name in self.__dict__ for name in LOGIT_HOOKS)

    def _losses_by_hooks(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B,), as the original computes it."""
        _checks.check_classes(type(self).__name__, labels, self.num_classes)
        mask = self.get_target_mask(embeddings, labels)
        cosine = self.get_cosine(embeddings)
        own = cosine[mask == 1]
        change = self.modify_cosine_of_target_classes(own) - own
        logits = self.scale_logits(cosine + mask * change.unsqueeze(1), embeddings)
        if self.cross_entropy is not None:
            return self.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="none")

    def _keep_angle(self, cosines: Tensor) -> None:
        self.avg_angle = cosines.detach().clamp(-1, 1).acos().mean().rad2deg().item()

    def _operands(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, d) and weights (C, d), in the wider of their dtypes."""
        if embeddings.dtype == self.W.dtype:
            return embeddings, self.W.t()
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
            return cosine_margin_logits(x, weight, _nobody(x), margin=margins.CosFace(0.0), scale=self.scale)
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


def _is_overridden(cls: type, name: str) -> bool:
    """By a class that is neither from here nor from the library."""
    home = next((base.__module__ for base in cls.__mro__ if name in vars(base)), __name__)
    return not home.startswith((__name__.rpartition(".")[0], LIBRARY))


def _join_the_library() -> None:
    """Once pytorch-metric-learning is loaded, these are losses of its kind: its wrappers ask for its base class.

    It takes most of a second to load, and so is not loaded for this.
    """
    base = getattr(sys.modules.get(f"{LIBRARY}.losses"), "BaseMetricLossFunction", None)
    if base is not None and not issubclass(AngularLoss, base):
        AngularLoss.__bases__ = (base, ABC)


def _nobody(x: Tensor) -> Tensor:
    """Labels (B,) of rows without a margin."""
    return x.new_full(x.shape[:1], IGNORED, dtype=torch.int64)


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
