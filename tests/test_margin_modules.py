"""`CosineMarginLogits` and `MarginSoftmaxLoss` are the functions with class weights and fixed settings."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

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


WRONG: dict[str, list[Any]] = {
    "margin": [0.5, None],
    "scale": [-1, 0.0, math.nan, "64", True],
    "ignore_index": [None, 1.5],
    "reduction": ["avg", None],
    "label_smoothing": [1.5, -0.1, None],
    "class_weight": [torch.ones(C + 1), -torch.ones(C), [1.0] * C, torch.ones(C, requires_grad=True)],
    "store_logits": [1],
    "chunk_bytes": [0, 1.5],
}


@every_twin
def test_wrong_settings(module: Any, function: Any, settings: dict[str, Any]) -> None:
    """They are refused when they are given and when they are assigned, by the names of the class and the setting."""
    twin = module(C, D)
    for name in settings:
        before = getattr(twin, name)
        for wrong in WRONG[name]:
            with pytest.raises((TypeError, ValueError), match=f"^{module.__name__}: `{name}` must"):
                module(C, D, **{name: wrong})
            with pytest.raises((TypeError, ValueError), match=f"^{module.__name__}: `{name}` must"):
                setattr(twin, name, wrong)
            assert getattr(twin, name) is before
    for name, arguments in (("num_classes", (0, D)), ("embedding_size", (C, 1.5)), ("num_classes", (True, D))):
        with pytest.raises((TypeError, ValueError), match=f"^{module.__name__}: `{name}` must be"):
            module(*arguments)


@every_twin
def test_settings_that_are_assigned(module: Any, function: Any, settings: dict[str, Any], device: str) -> None:
    """Each takes effect, and is what is shown and copied."""
    x, labels = data(device)
    twin = module(C, D, device=device)
    for name, value in settings.items():
        value = value.to(device) if isinstance(value, torch.Tensor) else value
        setattr(twin, name, value)
        now = {known: getattr(twin, known) for known in settings}
        assert now[name] is value
        expected = function(x, twin.weight, labels, **now)
        for each in (twin, copy.deepcopy(twin)):
            assert torch.equal(each(x, labels), expected)
        assert name == "class_weight" or f"{name}={value!r}" in repr(twin)


def schedules() -> list[Any]:
    """Modules, calls and the values of a number that changes in every step."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    x, maps = torch.randn(6, D), torch.randn(6, 4, 2, 2)
    numbers = [0.1 + 0.05 * k for k in range(20)]
    growing = [otface_cuda.ArcFace(m) for m in numbers]
    loss, logits = (
        {"label_smoothing": [0.9 * m for m in numbers]},
        {"scale": [20 * m for m in numbers], "margin": growing},
    )
    otface = dict.fromkeys(("ot_weight", "eps", "beta"), numbers)
    otface["alpha"] = [0.2 * k - 1.9 for k in range(20)]  # from no triplet to all
    made = []
    for make, call, values in (
        (lambda: CosineMarginLogits(3, D), lambda head: head(x, labels), logits),
        (lambda: MarginSoftmaxLoss(3, D), lambda head: head(x, labels), logits | loss),
        (
            lambda: otface_cuda.OTFaceLoss(3, D, max_triplets=24),
            lambda head: head(x, maps, labels).loss,
            logits | loss | otface,
        ),
    ):
        for name, steps in values.items():
            made.append(pytest.param(make, call, name, steps, id=f"{type(make()).__name__}-{name}"))
    return made


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("make", "call", "name", "values"), schedules())
def test_schedules_are_compiled_once(make: Any, call: Any, name: str, values: list[Any]) -> None:
    """A graph for the first number, another for all that follow; both results and gradients go by it."""
    head = make()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, fullgraph=True, backend=graphs)
    seen = set()
    for value in values:
        setattr(head, name, value)
        outcomes = []
        for each in (compiled, head):
            head.zero_grad()
            out = call(each)
            out.sum().backward()
            outcomes.append((out.detach(), head.weight.grad.clone()))
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)
        seen.add(outcomes[0][0].sum().item())
    assert graphs.frame_count <= 2
    assert len(seen) > (1 if name == "alpha" else 10)  # which triplets are hard changes seldom


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
