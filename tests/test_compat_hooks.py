"""Subclasses of the losses of `otface_cuda.compat.metric_learning`, beside the same subclasses of the originals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from otface_cuda.compat import metric_learning as ours
from otface_cuda.compat._metric_learning_base import NOT_CALLED, AngularLoss

from .margin_problems import random_margin_problem

losses: Any = pytest.importorskip("pytorch_metric_learning.losses")
reducers: Any = pytest.importorskip("pytorch_metric_learning.reducers")
distributed: Any = pytest.importorskip("pytorch_metric_learning.utils.distributed")
ModuleWithRecords: Any = pytest.importorskip("pytorch_metric_learning.utils.module_with_records").ModuleWithRecords

B, C, D = 20, 7, 3
NAMES = ["ArcFaceLoss", "CosFaceLoss", "SphereFaceLoss", "SubCenterArcFaceLoss"]
every_loss = pytest.mark.parametrize("name", NAMES)


class Cosine:
    def get_cosine(self: Any, embeddings: Tensor) -> Tensor:
        return 0.9 * super().get_cosine(embeddings)  # type: ignore[misc]


class Angles:
    def get_angles(self: Any, cosine_of_target_classes: Tensor) -> Tensor:
        return 0.9 * super().get_angles(cosine_of_target_classes)  # type: ignore[misc]


class Mask:
    def get_target_mask(self: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
        mask = super().get_target_mask(embeddings, labels)  # type: ignore[misc]
        return mask + 0.1 * mask.roll(1, dims=1)


class Margin:
    def modify_cosine_of_target_classes(self: Any, cosine_of_target_classes: Tensor) -> Tensor:
        return super().modify_cosine_of_target_classes(cosine_of_target_classes) - 0.1  # type: ignore[misc]


class Scale:
    def scale_logits(self: Any, logits: Tensor, embeddings: Tensor) -> Tensor:
        return super().scale_logits(logits, embeddings) * embeddings.norm(dim=1, keepdim=True)  # type: ignore[misc]


class InitMargin:
    def init_margin(self: Any) -> None:
        self.margin = 2
        super().init_margin()  # type: ignore[misc]


class Types:
    def cast_types(self: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().cast_types(dtype, device)  # type: ignore[misc]
        self.scale = 5


class Loss:
    def compute_loss(self: Any, *args: Any) -> Any:
        loss_dict = super().compute_loss(*args)  # type: ignore[misc]
        loss_dict["loss"]["losses"] = loss_dict["loss"]["losses"].square()
        return loss_dict


class Reducer:
    def get_default_reducer(self: Any) -> Any:
        return reducers.SumReducer()


class Weights:
    def get_default_weight_init_func(self: Any) -> Any:
        return torch.nn.init.uniform_


CHANGES = [Cosine, Angles, Mask, Margin, Scale, InitMargin, Types, Loss, Reducer, Weights]


def changed(mixin: type, name: str, seed: int = 3, **options: Any) -> list[Any]:
    """Ours and the original, of the same subclass and with the same class weights."""
    made = []
    for module in (ours, losses):
        torch.manual_seed(seed)
        kind: Any = type("Changed", (mixin, getattr(module, name)), {"__module__": __name__})
        made.append(kind(num_classes=C, embedding_size=D, **({"scale": 8} | options)).double())
    return made


def results(loss: Any, x: Tensor, labels: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, labels)
    return [value.detach(), loss.get_logits(x.detach()), *torch.autograd.grad(value, (x, loss.W))]


@every_loss
@pytest.mark.parametrize("mixin", CHANGES)
def test_what_a_subclass_changes(name: str, mixin: type) -> None:
    """As there; and, but for angles of CosFace, which only statistics read, not as without the change."""
    x, _, labels = random_margin_problem(B, C, D)
    mine, theirs = changed(mixin, name)
    found, expected = results(mine, x, labels), results(theirs, x, labels)
    for a, e in zip(found, expected, strict=True):
        # Logits of up to 8 * 5 in float64, and slopes of up to 10 times these.
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    plain = getattr(ours, name)(num_classes=C, embedding_size=D, scale=8).double()
    plain.load_state_dict(mine.state_dict())
    same = mixin is Weights or (mixin is Angles and name == "CosFaceLoss")
    assert torch.allclose(plain(x, labels), found[0]) == same


@every_loss
def test_attributes_of_one_loss(name: str) -> None:
    x, _, labels = random_margin_problem(B, C, D)
    mine, theirs = changed(Weights, name)
    for loss in (mine, theirs):
        loss.cross_entropy = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
        loss.scale_logits = lambda logits, embeddings: 3 * logits
    for a, e in zip(results(mine, x, labels), results(theirs, x, labels), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@every_loss
def test_statistics_of_a_subclass(name: str) -> None:
    x, _, labels = random_margin_problem(B, C, D)
    mine, theirs = changed(Scale, name, collect_stats=True)
    mine(x, labels)
    theirs(x, labels)
    assert mine.avg_angle == pytest.approx(theirs.avg_angle, rel=1e-9)


@every_loss
@pytest.mark.parametrize("method", NOT_CALLED)
def test_a_method_that_is_never_called_is_refused(name: str, method: str) -> None:
    assert hasattr(losses.SphereFaceLoss, method)
    with pytest.raises(TypeError, match=rf"Silent: `{method}` must not be overridden"):
        type("Silent", (getattr(ours, name),), {method: lambda self: None, "__module__": __name__})


def test_the_methods_of_the_originals_are_called_or_refused() -> None:
    """What the library's losses define themselves, down to its modules with records."""
    kinds = [getattr(losses, name) for name in NAMES]
    defined = {
        method
        for kind in kinds
        for base in kind.__mro__
        if base.__module__.startswith("pytorch_metric_learning") and base is not ModuleWithRecords
        for method, value in vars(base).items()
        if callable(value) and not method.startswith("__")
    }
    # How regularizers are called in its records: of no use to override.
    names = {x for x in defined if x.endswith("_loss_names") or x in ("zero_loss", "zero_losses")}
    for method in defined - names - set(NOT_CALLED):
        home = next(base for base in ours.SubCenterArcFaceLoss.__mro__ if method in vars(base))
        assert home.__module__.startswith("otface_cuda"), method


def test_labels_to_be_ignored_are_for_the_plain_losses() -> None:
    x, _, labels = random_margin_problem(B, C, D)
    labels[0] = -100
    mine, _ = changed(Scale, "ArcFaceLoss")
    with pytest.raises(ValueError, match="Changed: `labels` must be from 0 to 6, got -100 for row 0"):
        mine(x, labels)


@every_loss
def test_in_the_wrapper_of_the_library(name: str) -> None:
    x, _, labels = random_margin_problem(B, C, D)
    loss = getattr(ours, name)(num_classes=C, embedding_size=D).double()
    wrapped = distributed.DistributedLossWrapper(loss)
    assert isinstance(loss, losses.BaseMetricLossFunction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        assert torch.equal(wrapped(x, labels), loss(x, labels))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(twin) is type(loss)
        assert torch.equal(twin(x, labels), loss(x, labels))
        distributed.DistributedLossWrapper(twin)


def test_the_library_is_not_loaded_for_that() -> None:
    """Whichever of the two is imported first, a loss that is made once both are there is one of the library's."""
    code = """if True:
        import sys
        from otface_cuda.compat import metric_learning
        metric_learning.ArcFaceLoss(3, 2)
        assert not any(name.startswith("pytorch_metric_learning") for name in sys.modules)
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
        class Mine(metric_learning.CosFaceLoss):
            pass
        DistributedLossWrapper(metric_learning.ArcFaceLoss(3, 2))
        DistributedLossWrapper(Mine(3, 2))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_what_is_abstract_stays_so() -> None:
    with pytest.raises(TypeError, match="abstract"):
        AngularLoss(3, 2, 0.5, 64)  # type: ignore[abstract]
