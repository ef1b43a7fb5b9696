"""Wrong arguments of the margin functions are refused by name, a poisoned row stays alone, and extreme lengths and
unusual layouts change nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda.margins import ArcFace, CosFace

from .margin_problems import MarginProblem, gradients, logit_error, random_margin_problem
from .test_bad_input import Case, meta, refused, to

B, C, D = 4, 5, 3
FUNCTIONS = ["cosine_margin_logits", "margin_softmax_loss"]
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture(autouse=True)
def check_values_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTFACE_CHECK", "1")


MATRICES = {
    "vector": Case(torch.rand(D), ValueError, "(3,)"),
    "three dimensions": Case(torch.rand(1, B, D), ValueError, "(1, 4, 3)"),
    "no dimension": Case(torch.rand(B, 0), ValueError, "(4, 0)"),
    "int": Case(torch.ones(B, D, dtype=torch.int64), TypeError, "int64"),
    "bool": Case(torch.ones(B, D, dtype=torch.bool), TypeError, "bool"),
    "complex": Case(torch.ones(B, D, dtype=torch.complex64), TypeError, "complex64"),
    "sparse": Case(torch.ones(B, D).to_sparse(), TypeError, "dense"),
    "array": Case(np.ones((B, D)), TypeError, "ndarray"),
    "none": Case(None, TypeError, "got None"),
    "other device": Case(meta(B, D), ValueError, "meta"),
}
NUMBERS = {
    "zero": Case(0.0, ValueError, "got 0.0"),
    "negative": Case(-1, ValueError, "got -1"),
    "nan": Case(math.nan, ValueError, "got nan"),
    "inf": Case(math.inf, ValueError, "got inf"),
    "bool": Case(True, TypeError, "got True"),
    "string": Case("1", TypeError, "got '1'"),
    "tensor": Case(torch.tensor(1.0), TypeError, "float32 tensor"),
    "none": Case(None, TypeError, "got None"),
}
CASES: dict[str, dict[str, Case]] = {
    "x": MATRICES,
    "weight": MATRICES
    | {
        "no classes": Case(torch.rand(0, D), ValueError, "(0, 3)"),
        "other size": Case(torch.rand(C, D + 1), ValueError, "(5, 4)"),
        "other dtype": Case(torch.rand(C, D).double(), TypeError, "float64"),
    },
    "labels": {
        "negative": Case(torch.tensor([0, 1, -1, 2]), ValueError, "got -1 for row 2"),
        "too large": Case(torch.tensor([0, C, 1, 2]), ValueError, "got 5 for row 1"),
        "too short": Case(torch.zeros(B - 1, dtype=torch.int64), ValueError, "(3,)"),
        "matrix": Case(torch.zeros(B, 1, dtype=torch.int64), ValueError, "(4, 1)"),
        "float": Case(torch.zeros(B), TypeError, "float32"),
        "bool": Case(torch.zeros(B, dtype=torch.bool), TypeError, "bool"),
        "complex": Case(torch.zeros(B, dtype=torch.complex64), TypeError, "complex64"),
        "list": Case([0] * B, TypeError, "list"),
        "none": Case(None, TypeError, "got None"),
        "other device": Case(meta(B, dtype=torch.int64), ValueError, "meta"),
    },
    "margin": {
        "float": Case(0.5, TypeError, "got 0.5"),
        "class": Case(ArcFace, TypeError, "got the class ArcFace"),
        "none": Case(None, TypeError, "got None"),
    },
    "scale": NUMBERS,
    "ignore_index": {
        "float": Case(-100.0, TypeError, "got -100.0"),
        "bool": Case(False, TypeError, "got False"),
        "none": Case(None, TypeError, "got None"),
    },
}
LOSS_CASES: dict[str, dict[str, Case]] = {
    "reduction": {
        "unknown": Case("average", ValueError, "got 'average'"),
        "none": Case(None, ValueError, "got None"),
        "bool": Case(True, ValueError, "got True"),
    },
    "label_smoothing": {name: case for name, case in NUMBERS.items() if name != "zero"}
    | {"too large": Case(1.01, ValueError, "got 1.01")},
    "class_weight": {
        "negative": Case(torch.tensor([1.0, 1, -2, 1, 1]), ValueError, "got -2.0 for class 2"),
        "nan": Case(torch.tensor([1.0, 1, 1, 1, math.nan]), ValueError, "got nan for class 4"),
        "inf": Case(torch.tensor([math.inf, 1, 1, 1, 1]), ValueError, "got inf for class 0"),
        "too long": Case(torch.ones(C + 1), ValueError, "(6,)"),
        "matrix": Case(torch.ones(C, 1), ValueError, "(5, 1)"),
        "int": Case(torch.ones(C, dtype=torch.int64), TypeError, "int64"),
        "list": Case([1.0] * C, TypeError, "list"),
        "requires grad": Case(torch.ones(C, requires_grad=True), ValueError, "require grad"),
        "other device": Case(meta(C), ValueError, "meta"),
    },
    "store_logits": {
        "int": Case(1, TypeError, "got 1"),
        "word": Case("yes", TypeError, "got 'yes'"),
    },
    "chunk_bytes": {
        "zero": Case(0, ValueError, "got 0"),
        "float": Case(1e6, TypeError, "got 1000000.0"),
        "bool": Case(True, TypeError, "got True"),
    },
}
ALL = [
    pytest.param(function, name, case, id=f"{function}-{name}-{kind}")
    for function in FUNCTIONS
    for name, cases in (CASES if function == FUNCTIONS[0] else CASES | LOSS_CASES).items()
    for kind, case in cases.items()
]


@pytest.mark.parametrize(("function", "name", "case"), ALL)
def test_refused(function: str, name: str, case: Case, device: str) -> None:
    x, weight, labels = random_margin_problem(B, C, D, dtype=torch.float32)
    arguments = {"x": x, "weight": weight, "labels": labels, "margin": ArcFace(0.5), "scale": 8.0, name: case.value}
    arguments = {key: to(value, device) for key, value in arguments.items()}
    with refused(case.error, function, name, case.came):
        getattr(otface_cuda, function)(**arguments)


@every_function
def test_refused_without_what_is_needed(function: str) -> None:
    x, weight, labels = random_margin_problem(B, C, D)
    for missing in ("margin", "scale"):
        settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
        del settings[missing]
        with pytest.raises(TypeError, match=missing):
            getattr(otface_cuda, function)(x, weight, labels, **settings)
    with refused(ValueError, function, "x", "meta"):
        getattr(otface_cuda, function)(x.to("meta"), weight.to("meta"), labels.to("meta"), margin=CosFace(), scale=1.0)


@every_function
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_of_any_integer_dtype(function: str, dtype: torch.dtype, device: str) -> None:
    x, weight, labels = random_margin_problem(B, C, D, device=device)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
    expected = getattr(otface_cuda, function)(x, weight, labels, **settings)
    assert torch.equal(getattr(otface_cuda, function)(x, weight, labels.to(dtype), **settings), expected)


# A poisoned row stays alone


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("store_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_poisoned_rows_of_x(poison: float, store_logits: bool, dtype: torch.dtype, device: str) -> None:
    problem = random_margin_problem(B, 70, D, dtype=dtype, device=device)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
    options = {"reduction": "none", "label_smoothing": 0.1, "store_logits": store_logits}
    spoilt = problem._replace(x=problem.x.clone())
    spoilt.x[1, 2] = poison
    others = [0, 2, 3]
    for function, extra in ((otface_cuda.cosine_margin_logits, {}), (otface_cuda.margin_softmax_loss, options)):
        clean = gradients(function, problem, **settings, **extra)
        out, grad_x, _ = gradients(function, spoilt, **settings, **extra)
        assert out[1].isnan().all()
        assert torch.equal(out[others], clean[0][others])
        assert torch.equal(grad_x[others], clean[1][others])
        assert grad_x[1].isnan().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_poisoned_classes(poison: float, dtype: torch.dtype, device: str) -> None:
    """Of the logits its column is NaN, of the loss everything: so it is for F.cross_entropy."""
    problem = random_margin_problem(B, 70, D, dtype=dtype, device=device)
    problem.labels[0] = 7
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
    clean = otface_cuda.cosine_margin_logits(*problem, **settings)
    problem.weight[7, 0] = poison
    logits = otface_cuda.cosine_margin_logits(*problem, **settings)
    others = torch.arange(70, device=device) != 7
    assert logits[:, 7].isnan().all()
    assert torch.equal(logits[:, others], clean[:, others])
    assert otface_cuda.margin_softmax_loss(*problem, reduction="none", **settings).isnan().all()


# Lengths and layouts


@every_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("of_weight", [2.0**-100, 2.0**100])
def test_lengths_do_not_matter(function: str, dtype: torch.dtype, of_x: float, of_weight: float, device: str) -> None:
    """Powers of two change no rounding; the gradients are divided by them."""
    problem = random_margin_problem(B, 70, 16, dtype=dtype, device=device)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
    expected = gradients(getattr(otface_cuda, function), problem, **settings)
    scaled = MarginProblem(of_x * problem.x, of_weight * problem.weight, problem.labels)
    out, grad_x, grad_weight = gradients(getattr(otface_cuda, function), scaled, **settings)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=logit_error(dtype, 16, 8.0))
    rtol = 4 * torch.finfo(dtype).eps + 4 * logit_error(dtype, 16, 8.0)
    for x, y, factor in zip((grad_x, grad_weight), expected[1:], (of_x, of_weight), strict=True):
        atol = rtol * y.abs().max().item()
        torch.testing.assert_close(x.double() * factor, y.double(), rtol=0, atol=atol)


def layouts(x: Tensor) -> dict[str, Tensor]:
    wide = torch.full((x.shape[0], 2 * x.shape[1] + 1), math.nan, dtype=x.dtype, device=x.device)
    wide[:, 1 : 1 + x.shape[1]] = x
    apart = torch.full((x.shape[0], 2 * x.shape[1]), math.nan, dtype=x.dtype, device=x.device)
    apart[:, ::2] = x
    return {
        "transposed": x.mT.contiguous().mT,
        "between NaN": wide[:, 1 : 1 + x.shape[1]],
        "every second": apart[:, ::2],
        "reversed twice": x.flip(0).flip(0),
    }


@every_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts(function: str, dtype: torch.dtype, device: str) -> None:
    problem = random_margin_problem(9, 130, 17, dtype=dtype, device=device)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
    cotangent: Tensor | None = None

    def run(x: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
        nonlocal cotangent
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = getattr(otface_cuda, function)(x, weight, labels, **settings)
        cotangent = torch.ones((), dtype=out.dtype, device=device).expand(out.shape)  # its strides are 0
        return [out.detach(), *torch.autograd.grad(out, (x, weight), cotangent)]

    expected = run(*problem)
    for name in layouts(problem.x):
        actual = run(layouts(problem.x)[name], layouts(problem.weight)[name], problem.labels.flip(0).flip(0))
        for x, y in zip(actual, expected, strict=True):
            assert torch.allclose(x, y, rtol=1e-5, atol=1e-6), name  # a product of strided rows may add up otherwise
    shared = run(problem.x[:1].expand(9, 17), problem.weight, problem.labels[:1].expand(9))
    packed = run(problem.x[:1].repeat(9, 1), problem.weight, problem.labels[:1].repeat(9))
    assert all(torch.equal(x, y) for x, y in zip(shared, packed, strict=True))


@every_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_not_modified(function: str, dtype: torch.dtype, device: str) -> None:
    problem = random_margin_problem(B, 70, D, dtype=dtype, device=device)
    for store_logits in (False, True) if function == "margin_softmax_loss" else (None,):
        options = {} if store_logits is None else {"store_logits": store_logits, "chunk_bytes": 1}
        x, weight = (v.clone().requires_grad_() for v in problem[:2])
        labels = problem.labels.clone()
        versions = [v._version for v in (x, weight, labels)]
        out = getattr(otface_cuda, function)(x, weight, labels, margin=ArcFace(0.5), scale=8.0, **options)
        kept, cotangent = out.detach().clone(), torch.rand_like(out)
        cotangent_before = cotangent.clone()
        first = torch.autograd.grad(out, (x, weight), cotangent, retain_graph=True)
        second = torch.autograd.grad(out, (x, weight), cotangent)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for a, b in zip((x, weight, labels, out, cotangent), (*problem, kept, cotangent_before), strict=True):
            assert torch.equal(a, b)
        assert versions == [v._version for v in (x, weight, labels)]


def test_empty_batch(device: str) -> None:
    problem = random_margin_problem(0, C, D, dtype=torch.float32, device=device)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
    assert otface_cuda.cosine_margin_logits(*problem, **settings).shape == (0, C)
    assert otface_cuda.margin_softmax_loss(*problem, reduction="none", **settings).shape == (0,)
    assert otface_cuda.margin_softmax_loss(*problem, **settings).isnan()
    out, grad_x, grad_weight = gradients(otface_cuda.margin_softmax_loss, problem, reduction="sum", **settings)
    assert out == 0
    assert grad_x.shape == (0, D)
    assert (grad_weight == 0).all()
