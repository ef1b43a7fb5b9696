"""Devices without kernels are refused with a message, whichever function is asked, before torch can end the process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import otface_cuda
from otface_cuda import _build, _checks
from otface_cuda.compat import insightface, layers, metric_learning, otface, pot

pytestmark = pytest.mark.either_torch

B, N, C, D = 3, 4, 6, 2
MARGIN: dict[str, Any] = {"margin": otface_cuda.ArcFace(0.5), "scale": 64.0}


@pytest.fixture(autouse=True)
def tensors_without_data() -> Iterator[None]:
    """They can be on any device, whatever torch was built for."""
    with FakeTensorMode():
        yield


class On:
    """Makes arguments on a device. The floats need a gradient: that is where torch may end the process."""

    def __init__(self, device: str) -> None:
        self.device = device

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device).requires_grad_()

    def points(self) -> tuple[Tensor, Tensor]:
        return self.rand(B, N, D), self.rand(B, N, D)

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.int64, device=self.device)

    def labelled(self, size: int = D) -> tuple[Tensor, Tensor]:
        return self.rand(B, size), self.ones(B)

    def mapped(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rand(B, D), self.rand(B, D, 2, 2), self.ones(B)

    def one_problem(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rand(N), self.rand(N), self.rand(N, N)


# A call of each function and module; the modules' own parameters stay on the CPU.
CALLS: dict[Any, Callable[[On], Any]] = {
    otface_cuda.sinkhorn: lambda on: otface_cuda.sinkhorn(on.rand(B, N, N), 0.1),
    otface_cuda.sinkhorn_points: lambda on: otface_cuda.sinkhorn_points(*on.points(), 0.1),
    otface_cuda.sinkhorn_pairs: lambda on: otface_cuda.sinkhorn_pairs(on.rand(B, N, D), on.ones(5, 2), 0.1),
    otface_cuda.Sinkhorn: lambda on: otface_cuda.Sinkhorn(0.1)(on.rand(B, N, N)),
    otface_cuda.SinkhornPoints: lambda on: otface_cuda.SinkhornPoints(0.1)(*on.points()),
    otface_cuda.SinkhornPairs: lambda on: otface_cuda.SinkhornPairs(0.1)(on.rand(B, N, D), on.ones(5, 2)),
    otface_cuda.mine_hard_triplets: lambda on: otface_cuda.mine_hard_triplets(*on.labelled()),
    otface_cuda.ot_triplet_loss: lambda on: otface_cuda.ot_triplet_loss(on.rand(B, D, 2, 2), on.ones(5, 3)),
    otface_cuda.OTFaceLoss: lambda on: otface_cuda.OTFaceLoss(C, D)(*on.mapped()),
    otface_cuda.margin_softmax_loss: lambda on: otface_cuda.margin_softmax_loss(
        on.rand(B, D), on.rand(C, D), on.ones(B), **MARGIN
    ),
    otface_cuda.cosine_margin_logits: lambda on: otface_cuda.cosine_margin_logits(
        on.rand(B, D), on.rand(C, D), on.ones(B), **MARGIN
    ),
    otface_cuda.MarginSoftmaxLoss: lambda on: otface_cuda.MarginSoftmaxLoss(C, D, **MARGIN)(*on.labelled()),
    otface_cuda.CosineMarginLogits: lambda on: otface_cuda.CosineMarginLogits(C, D, **MARGIN)(*on.labelled()),
    layers.SinkhornDistance: lambda on: layers.SinkhornDistance(0.1, 5)(*on.points()),
    layers.SinkhornDistanceCost: lambda on: layers.SinkhornDistanceCost(0.1, 5)(on.rand(B, N, N)),
    pot.sinkhorn: lambda on: pot.sinkhorn(*on.one_problem(), 0.1),
    pot.sinkhorn2: lambda on: pot.sinkhorn2(*on.one_problem(), 0.1),
    pot.solve_batch: lambda on: pot.solve_batch(on.rand(B, N, N), 0.1),
    pot.solve_sample_batch: lambda on: pot.solve_sample_batch(*on.points(), 0.1),
    pot.dist_batch: lambda on: pot.dist_batch(*on.points()),
    pot.loss_linear_batch: lambda on: pot.loss_linear_batch(on.rand(B, N, N), on.rand(B, N, N)),
    pot.loss_linear_samples_batch: lambda on: pot.loss_linear_samples_batch(*on.points(), on.rand(B, N, N)),
    insightface.CombinedMarginLoss: lambda on: insightface.CombinedMarginLoss(64.0, 1, 0.5, 0)(*on.labelled(C)),
    insightface.ArcFace: lambda on: insightface.ArcFace(64.0, 0.5)(*on.labelled(C)),
    insightface.CosFace: lambda on: insightface.CosFace(64.0, 0.4)(*on.labelled(C)),
    insightface.PartialFC_V2: lambda on: insightface.PartialFC_V2(insightface.CosFace(), D, C)(*on.labelled()),
    metric_learning.ArcFaceLoss: lambda on: metric_learning.ArcFaceLoss(C, D)(*on.labelled()),
    metric_learning.CosFaceLoss: lambda on: metric_learning.CosFaceLoss(C, D)(*on.labelled()),
    metric_learning.SphereFaceLoss: lambda on: metric_learning.SphereFaceLoss(C, D)(*on.labelled()),
    metric_learning.SubCenterArcFaceLoss: lambda on: metric_learning.SubCenterArcFaceLoss(C, D)(*on.labelled()),
    otface.ArcFace: lambda on: otface.ArcFace(D, C)(*on.labelled()),
    otface.AMsoftmax: lambda on: otface.AMsoftmax(D, C)(*on.labelled()),
    otface.OTFace_Arcface: lambda on: otface.OTFace_Arcface(D, C)(*on.mapped(), 1),
    otface.OTFace_AMsoftmax: lambda on: otface.OTFace_AMsoftmax(D, C)(*on.mapped(), 1),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=[f"{f.__module__}.{f.__name__}" for f in CALLS])


def names(module: ModuleType) -> list[str]:
    """The public ones: a list of the module, or its classes."""
    classes = inspect.getmembers(module, lambda x: inspect.isclass(x) and x.__module__ == module.__name__)
    return getattr(module, "__all__", [name for name, _ in classes if not name.startswith("_")])


def test_every_function_is_called() -> None:
    """What takes tensors: the rest of the public names are margins, outputs, a warning, and functions that describe."""
    modules = otface_cuda, insightface, layers, metric_learning, otface, pot
    public = {getattr(module, name) for module in modules for name in names(module)}
    others = {x for x in public if inspect.isclass(x) and issubclass(x, (tuple, Warning, otface_cuda.Margin))}
    assert public - others - {otface_cuda.info, otface_cuda.kernel_for} == CALLS.keys()


@every_call
def test_a_torch_without_cuda(call: Callable[[On], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first operation that needs a gradient, at which such a torch ends the process."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_checks, "HAS_CUDA_KERNELS", True)
    with pytest.raises(
        ValueError, match=r"`\w+` must be on the CPU, because this torch \(.+\) has no CUDA, got .* cuda:0"
    ):
        call(On("cuda:0"))


def check_refused(device: str, *expected: str) -> None:
    x, index = torch.rand(B, N, D, device=device), torch.ones(B, 2, dtype=torch.int64, device=device)
    for name, call in {
        "cost": lambda: otface_cuda.sinkhorn(x, 0.1),
        "x": lambda: otface_cuda.sinkhorn_points(x, x, 0.1),
        "features": lambda: otface_cuda.sinkhorn_pairs(x, index, 0.1),
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be on the CPU") as caught:
            call()
        assert all(words in str(caught.value) for words in (device, *expected))


def test_a_build_without_cuda_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    monkeypatch.setattr(_checks, "HAS_CUDA_KERNELS", False)
    monkeypatch.setattr(_checks, "HOW_TO_GET_CUDA_KERNELS", _build.how_to_get_cuda_kernels())
    check_refused("cuda:0", "built without CUDA kernels", "CUDA toolkit", "then run `pip install --no-build-isolation")


@pytest.mark.parametrize("device", ["meta", "xpu:0", "mps:0"])
def test_other_devices(device: str) -> None:
    check_refused(device, "or on a CUDA device")
