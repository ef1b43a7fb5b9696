"""`CosineMarginLogits` and `MarginSoftmaxLoss` are the functions with class weights and fixed settings."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import otface_cuda
from otface_cuda import CosineMarginLogits, MarginSoftmaxLoss
from otface_cuda.margins import CosFace, SphereFace

from .margin_problems import random_margin_problem

C, D = 70, 6
LOGITS: dict[str, Any] = {"margin": SphereFace(2.0), "scale": 8.0, "ignore_index": 3}
LOSS: dict[str, Any] = LOGITS | {
    "reduction": "sum",
    "label_smoothing": 0.1,
    "class_weight": torch.linspace(0.5, 2, C),
    "store_logits": True,
    "chunk_bytes": 1,
}
TWINS = [
    (CosineMarginLogits, otface_cuda.cosine_margin_logits, LOGITS),
    (MarginSoftmaxLoss, otface_cuda.margin_softmax_loss, LOSS),
]
every_twin = pytest.mark.parametrize(("module", "function", "settings"), TWINS, ids=["logits", "loss"])


def data(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    problem = random_margin_problem(9, C, D, dtype=torch.float32, device=device)
    problem.labels[2] = 3
    return problem.x, problem.labels


@every_twin
def test_signatures(module: Any, function: Any, settings: dict[str, Any]) -> None:
    """The function's settings have the same names, kinds and defaults; the margin and the scale have one here."""
    of_function = inspect.signature(function).parameters
    of_module = inspect.signature(module).parameters
    assert set(of_module) - {"num_classes", "embedding_size", "device", "dtype"} == set(settings)
    assert set(of_function) - {"x", "weight", "labels"} == set(settings)
    for name in settings:
        assert of_module[name].kind == of_function[name].kind
        assert of_module[name].annotation == of_function[name].annotation
        assert settings[name] is not of_module[name].default
        if name not in ("margin", "scale"):
            assert of_module[name].default == of_function[name].default
    assert (of_module["margin"].default, of_module["scale"].default) == (otface_cuda.ArcFace(0.5), 64.0)


@every_twin
@pytest.mark.parametrize("defaults", [False, True])
def test_same_results(module: Any, function: Any, settings: dict[str, Any], defaults: bool, device: str) -> None:
    x, labels = data(device)
    if defaults:
        twin, settings = module(C, D, device=device), {"margin": otface_cuda.ArcFace(0.5), "scale": 64.0}
    else:
        settings = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in settings.items()}
        twin = module(C, D, device=device, **settings)
    expected = function(x, twin.weight, labels, **settings)
    assert torch.equal(twin(x, labels), expected)
    (grad,) = torch.autograd.grad(expected.sum(), twin.weight)
    twin(x, labels).sum().backward()
    assert torch.equal(twin.weight.grad, grad)


@every_twin
def test_every_setting_is_passed_on(module: Any, function: Any, settings: dict[str, Any], device: str) -> None:
    """A wrong one is refused by name."""
    x, labels = data(device)
    wrong = {"chunk_bytes": 0, "class_weight": torch.ones(C + 1, device=device), "store_logits": 1}
    for name in settings:
        with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
            module(C, D, device=device, **{name: wrong.get(name)})(x, labels)
    for name, arguments in (("num_classes", (0, D)), ("embedding_size", (C, 1.5)), ("num_classes", (True, D))):
        with pytest.raises((TypeError, ValueError), match=f"^{module.__name__}: `{name}` must be"):
            module(*arguments)


@every_twin
def test_state_dict_is_that_of_linear(module: Any, function: Any, settings: dict[str, Any]) -> None:
    """There and back; the class weights of the loss are settings, not state."""
    linear, twin = nn.Linear(D, C, bias=False), module(C, D, **settings)
    assert list(twin.state_dict()) == ["weight"]
    assert not torch.equal(twin.weight, linear.weight)
    twin.load_state_dict(linear.state_dict())
    assert torch.equal(twin.weight, linear.weight)
    twin.reset_parameters()
    linear.load_state_dict(twin.state_dict())
    assert torch.equal(twin.weight, linear.weight)


@every_twin
def test_reset_parameters(module: Any, function: Any, settings: dict[str, Any]) -> None:
    """Normal with standard deviation 0.01: of n numbers that is off by 1 / sqrt(2 n), the mean by 0.01 / sqrt(n)."""
    torch.manual_seed(0)
    twin = module(1000, 100)
    first = twin.weight.detach().clone()
    twin.reset_parameters()
    assert not torch.equal(first, twin.weight)
    for weight in (first, twin.weight.detach()):
        assert abs(weight.std().item() / 0.01 - 1) < 5 / 2e5**0.5
        assert abs(weight.mean().item()) < 5 * 0.01 / 1e5**0.5


@every_twin
def test_copies(module: Any, function: Any, settings: dict[str, Any]) -> None:
    x, labels = data("cpu")
    twin = module(C, D, **settings)
    for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert repr(copied) == repr(twin)
        assert torch.equal(copied(x, labels), twin(x, labels))
        assert copied.weight is not twin.weight


@every_twin
def test_dtypes(module: Any, function: Any, settings: dict[str, Any]) -> None:
    x, labels = data("cpu")
    assert module(C, D, **settings).double()(x.double(), labels).dtype == torch.float64
    half = module(C, D, dtype=torch.bfloat16, **settings)
    assert half.weight.dtype == torch.bfloat16
    assert half(x.bfloat16(), labels).dtype == torch.float32
    assert module(C, D, device="meta").weight.device.type == "meta"


@every_twin
def test_representation(module: Any, function: Any, settings: dict[str, Any]) -> None:
    text = repr(module(C, D, **settings))
    assert text.startswith(f"{module.__name__}(num_classes={C}, embedding_size={D}, margin=SphereFace(m=2.0, ")
    for name, value in settings.items():
        if name != "class_weight":
            assert f", {name}={value!r}" in text


def test_class_weight_is_a_buffer() -> None:
    loss = MarginSoftmaxLoss(C, D, margin=CosFace(0.1), class_weight=torch.ones(C))
    assert [name for name, _ in loss.named_buffers()] == ["class_weight"]
    assert loss.double().class_weight.dtype == torch.float64
    assert [name for name, _ in loss.named_parameters()] == ["weight"]
