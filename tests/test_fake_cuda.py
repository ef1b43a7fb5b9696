"""CUDA tensors that have a shape but no data (torch's FakeTensorMode), for which no GPU is needed: the functions accept
them, the results lie where they should, and on the way nothing asks for data, which on a GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

import otface_cuda
from otface_cuda import autograd, costs, mining, ot_triplet, pairs

from .fake_cuda import WaitError, fake_tensors, ones, rand  # noqa: F401
from .problems import DTYPES, output_dtype

pytestmark = pytest.mark.either_torch

MODES = ["envelope", "unrolled", "implicit"]
METRICS = ["cosine", "sqeuclidean", "euclidean"]
B, N, M, D, FEATURES = 3, 4, 5, 2, 6

every_mode = pytest.mark.parametrize("mode", MODES)
every_metric = pytest.mark.parametrize("metric", METRICS)


def check_outputs(out: otface_cuda.SinkhornOutput, batch: tuple[int, ...], n: int, m: int, real: torch.dtype) -> None:
    shapes = [batch, batch, (*batch, n), (*batch, m), (*batch, n, m), batch, batch, batch]
    for x, shape, dtype in zip(out, shapes, [real] * 6 + [torch.int64, torch.bool], strict=True):
        if x is not None:
            assert x.shape == shape
            assert x.dtype == dtype
            assert x.device == torch.device("cuda:0")


def check_gradients(gradients: Any, inputs: list[Tensor]) -> None:
    for gradient, x in zip(gradients, inputs, strict=True):
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype
        assert gradient.device == x.device


# What a call brings along.
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": lambda: {"eps": 0.1},
    "per problem": lambda: {"eps": rand(B), "tol": rand(B, dtype=torch.float64), "check_every": 3},
    "a": lambda: {"eps": 0.1, "a": rand(N)},
    "b": lambda: {"eps": 0.1, "b": rand(B, M, dtype=torch.bfloat16)},
    "both": lambda: {"eps": 0.1, "a": rand(B, N), "b": rand(M)},
    "lengths": lambda: {"eps": 0.1, "row_lengths": ones(B), "col_lengths": ones(B).to(torch.int32), "b": rand(B, M)},
    "init": lambda: {"eps": 0.1, "init": (None, rand(B, M, dtype=torch.float64))},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn(dtype: torch.dtype, options: str) -> None:
    out = otface_cuda.sinkhorn(rand(B, N, M, dtype=dtype), **OPTIONS[options](), return_plan=True)
    check_outputs(out, (B,), N, M, output_dtype(dtype))


def test_settings_from_the_cpu() -> None:
    """One number may lie there in a tensor, and is not copied."""
    out = otface_cuda.sinkhorn(rand(B, N, M), torch.tensor(0.1), tol=torch.tensor(1))
    check_outputs(out, (B,), N, M, torch.float32)


@pytest.mark.parametrize("options", OPTIONS)
@every_metric
def test_points(metric: str, options: str) -> None:
    x, y = rand(B, N, D, dtype=torch.bfloat16), rand(B, M, D, dtype=torch.bfloat16)
    out = otface_cuda.sinkhorn_points(x, y, metric=metric, **OPTIONS[options](), return_plan=True)
    check_outputs(out, (B,), N, M, torch.float32)


def test_unbatched() -> None:
    check_outputs(otface_cuda.sinkhorn(rand(N, M), 0.1, row_lengths=ones()), (), N, M, torch.float32)
    check_outputs(otface_cuda.sinkhorn_points(rand(N, D), rand(M, D), 0.1), (), N, M, torch.float32)


@pytest.mark.parametrize("requires_grad", [False, True])
@every_mode
def test_with_and_without_a_graph(mode: str, requires_grad: bool) -> None:
    cost, features = rand(B, N, M).requires_grad_(requires_grad), rand(FEATURES, N, D).requires_grad_(requires_grad)
    for out, m in (
        (otface_cuda.sinkhorn(cost, 0.1, grad=mode), M),
        (otface_cuda.sinkhorn_pairs(features, ones(B, 2), 0.1, grad=mode), N),
    ):
        check_outputs(out, (B,), N, m, torch.float32)
        assert out.value.requires_grad == requires_grad


def incoming_of(out: otface_cuda.SinkhornOutput, mode: str) -> autograd.OutputGradients:
    names = ["value"] if mode == "envelope" else autograd.OutputGradients._fields
    given = {name: torch.ones_like(getattr(out, name)) for name in names if getattr(out, name) is not None}
    return autograd.OutputGradients(**dict.fromkeys(autograd.OutputGradients._fields) | given)


# torch's autograd engine asks for a GPU, so the bodies of the derivatives are called here, as it would.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_mode
def test_gradients(mode: str, dtype: torch.dtype) -> None:
    real = output_dtype(dtype)
    cost, a, b = inputs = [rand(B, N, M, dtype=dtype), rand(B, N, dtype=real), rand(B, M, dtype=real)]
    eps, tol = rand(B, dtype=torch.float64), rand(B, dtype=torch.float64)
    problems = autograd.Problems(cost, eps, a, b, ones(B), None)
    settings = autograd.Settings("sinkhorn", 7, 1, mode, True, 1e-3)
    solution = autograd.solve(problems, tol, None, settings, want_history=mode == "unrolled")
    out = otface_cuda.SinkhornOutput(*solution[:8])
    gradients = autograd.gradients(problems, solution, settings, incoming_of(out, mode), (True, True, True))
    check_gradients(gradients, inputs)


@every_metric
def test_gradients_of_points(metric: str) -> None:
    points = [rand(B, N, D), rand(B, M, D)]
    x, y = (costs.prepare_points(p, metric) for p in points)
    cost = costs.cost_of_prepared(x, y, metric)
    assert cost.shape == (B, N, M)
    check_gradients(costs.cost_backward(torch.ones_like(cost), cost, x, y, metric), points)


def number_of_weights(kind: str, count: int) -> tuple[int, int] | None:
    return {"none": None, "shared": (1, 1), "own": (count, count), "shared and own": (1, count)}[kind]


@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
@pytest.mark.parametrize("weights", ["none", "shared", "own", "shared and own"])
@every_mode
@every_metric
def test_pairs(metric: str, mode: str, weights: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every listed pair is solved: to find those that are listed twice, the host would have to wait."""
    count, features = 7, rand(FEATURES, N, D)
    rows = number_of_weights(weights, count)
    a, b = (None, None) if rows is None else (rand(k, N) for k in rows)
    eps, tol = rand(count, dtype=torch.float64), rand(1, dtype=torch.float64).expand(count)
    arguments = (features, ones(count, 2), eps, a, b, tol, metric, 5, 2, mode, chunk_bytes, 1e-3)
    solved: list[int] = []
    solve = autograd.solve

    def count_problems(problems: autograd.Problems, *args: Any, **options: Any) -> autograd.Solution:
        solved.append(problems.cost.shape[0])
        return solve(problems, *args, **options)

    monkeypatch.setattr(autograd, "solve", count_problems)
    *results, potentials = pairs._forward(*arguments)
    value, transport_cost, f, g, error, n_iter, converged = results
    out = otface_cuda.SinkhornOutput(value, transport_cost, f, g, None, error, n_iter, converged)
    check_outputs(out, (count,), N, N, torch.float32)
    assert solved == ([1] * count if chunk_bytes == 1 else [count])
    incoming = incoming_of(out, mode)[:4]
    wanted = (True, a is not None, b is not None)
    gradients = pairs._backward(*arguments, potentials, n_iter, *incoming, *wanted)
    check_gradients(gradients[: 1 + 2 * (a is not None)], [x for x in (features, a, b) if x is not None])


@pytest.mark.parametrize("name", ["sinkhorn_pairs_forward", "sinkhorn_pairs_backward"])
def test_fakes_of_the_pairs(name: str) -> None:
    """What tracing is told of the operators is what their bodies give."""
    body = {"sinkhorn_pairs_forward": pairs._forward, "sinkhorn_pairs_backward": pairs._backward}[name]
    eps = rand(7, dtype=torch.float64)
    arguments = (
        rand(FEATURES, N, D),
        ones(7, 2),
        eps,
        rand(1, N),
        rand(7, N),
        eps,
        "cosine",
        5,
        2,
        "implicit",
        2**20,
        1e-3,
    )
    if name == "sinkhorn_pairs_backward":
        *results, potentials = pairs._forward(*arguments)
        arguments = (*arguments, potentials, results[5], *results[:4], True, True, True)
    for x, y in zip(body(*arguments), getattr(torch.ops.otface, name)(*arguments), strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
@every_metric
def test_triplets(metric: str, chunk_bytes: int, kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pairs are solved as there can be, and the bodies give what tracing is told."""
    monkeypatch.setattr(ot_triplet, "KEPT_BYTES", kept_bytes)
    points, triplets, numbers = rand(FEATURES, N, D), ones(9, 3), torch.tensor([0.5, 0.1], dtype=torch.float64)
    settings = (numbers, 3, metric, chunk_bytes)
    arguments = (points, triplets, *settings, True)
    out = ot_triplet._forward(*arguments)
    *_, hinge, kept = out
    told = torch.ops.otface.ot_triplet_forward(*arguments)
    arguments = (points, triplets, hinge, kept, rand(), *settings)
    out = (*out, ot_triplet._backward(*arguments))
    told = (*told, torch.ops.otface.ot_triplet_backward(*arguments))
    for x, y in zip(out, told, strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def test_mining_with_a_fixed_number() -> None:
    found = mining._hardest(rand(FEATURES, D), ones(FEATURES), torch.tensor([0.1], dtype=torch.float64), 20, None)
    assert (found.shape, found.dtype, found.device) == ((20, 3), torch.int64, torch.device("cuda:0"))


def test_the_whole_loss() -> None:
    """Nothing waits with `max_triplets`; without it the number of hard triplets is asked for."""
    data = rand(FEATURES, D), rand(FEATURES, 8, 2, 2).requires_grad_(), ones(FEATURES)
    loss = otface_cuda.OTFaceLoss(5, D, max_triplets=20, device="cuda")
    out = loss(*data)
    assert [x.shape for x in out] == [()] * 5
    assert out.loss.requires_grad
    with pytest.raises(Exception, match="nonzero"):
        otface_cuda.OTFaceLoss(5, D, device="cuda")(*data)


@pytest.mark.parametrize("function", ["sinkhorn", "sinkhorn_points", "sinkhorn_pairs"])
def test_values_are_looked_at_when_the_environment_says_so(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTFACE_CHECK", "1")
    arguments = {
        "sinkhorn": (rand(B, N, M), rand(B)),
        "sinkhorn_points": (rand(B, N, D), rand(B, M, D), rand(B)),
        "sinkhorn_pairs": (rand(FEATURES, N, D), ones(B, 2), 0.1),
    }
    with pytest.raises((DataDependentOutputException, WaitError)):
        getattr(otface_cuda, function)(*arguments[function])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[0] if x.any() else x[1],
        lambda x: x.nonzero(),
        lambda x: x.unique(dim=0),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x[0]),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.tensor(0.5).to("cuda"),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.tensor(1.0, device="cuda"),
        lambda x: torch.as_tensor([1.0], device="cuda"),
    ],
)
def test_these_tests_notice_what_waits(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011, torch has several for it
        wait(rand(2, 3))
    assert isinstance(caught.value, WaitError) or type(caught.value).__name__.startswith(
        ("DataDependent", "DynamicOutput")
    )
