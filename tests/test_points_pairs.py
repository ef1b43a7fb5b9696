"""`sinkhorn_points` and `sinkhorn_pairs` against `sinkhorn` on the cost matrices of `reference.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda import SinkhornOutput, sinkhorn_pairs, sinkhorn_points
from otface_cuda.reference import cost_matrix, sinkhorn_reference

from .problems import DTYPES, Tolerance, assert_same_solution, output_dtype, tolerance

METRICS = ["cosine", "sqeuclidean", "euclidean"]
MODES = ["envelope", "unrolled", "implicit"]
OUTPUTS = {mode: ["value"] if mode == "envelope" else ["value", "transport_cost", "f", "g"] for mode in MODES}

every_metric = pytest.mark.parametrize("metric", METRICS)
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def one_thread_unless_a_test_wants_more(threads: Callable[[int], None]) -> None:
    """The operations here are small: torch's threads would wait for one another most of the time."""
    threads(1)


class Points(NamedTuple):
    x: Tensor  # (B, n, d)
    y: Tensor  # (B, m, d)


def random_points(
    batch: int, n: int, m: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Points:
    """Coordinates uniform in [-1/2, 1/2)."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(batch, k, d, generator=generator, dtype=torch.float64) - 0.5 for k in (n, m))
    return Points(x.to(dtype).to(device), y.to(dtype).to(device))


def random_features(
    count: int, p: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Tensor:
    return random_points(count, p, 1, d, seed=seed, dtype=dtype, device=device).x


def random_weights(count: int, size: int, *, seed: int, device: str = "cpu") -> Tensor:
    w = 0.2 + torch.rand(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (w / w.sum(1, keepdim=True)).to(device)


def cost_error(x: Tensor, y: Tensor, metric: str, dtype: torch.dtype) -> float:
    """What rounding may change in a cost that a matrix product of dtype's arithmetic makes.

    With u the unit roundoff, a product of two vectors of d entries and norms r has an error like sqrt(d) u r^2; the
    norms that it is subtracted from, or divided by, add a few u r^2. A distance is the root of a square with an error
    of e: it is off by e / (2 distance). And, as every cost, by 2^12 u of itself at most: see test_near_points.py.
    """
    u = torch.finfo(output_dtype(dtype)).eps / 2
    x, y = x.double(), y.double()
    product = (math.sqrt(x.shape[-1]) + 4) * u
    if metric == "cosine":
        return 2 * product
    centre = x.mean(-2, keepdim=True)
    square = 4 * product * max((points - centre).square().sum(-1).max().item() for points in (x, y))
    if metric == "sqeuclidean":
        return square
    distances = cost_matrix(x, y, "euclidean")
    least, most = distances[distances > 0].min().item(), distances.max().item()
    return min(square / (2 * least), 2**12 * u * most)


def tolerance_of_points(x: Tensor, y: Tensor, metric: str, eps: float, n_iter: int, device: str) -> Tolerance:
    """That of the solver, plus the error of the cost, which a (soft) minimum passes on without enlarging it."""
    span = cost_matrix(x.double(), y.double(), metric).abs().max().item()
    solver = tolerance(x.dtype, eps, x.shape[-2], y.shape[-2], n_iter, span, device)
    error = cost_error(x, y, metric, x.dtype)
    return Tolerance(solver.potential + error, solver.plan + 3 * error / eps)


def cotangents(outputs: list[Tensor], seed: int = 11) -> list[Tensor]:
    """Random incoming gradients, the same numbers for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]


def gradients(solve: Callable[..., SinkhornOutput], inputs: list[Tensor], mode: str) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = solve(*leaves)
    outputs = [getattr(out, name) for name in OUTPUTS[mode]]
    return list(torch.autograd.grad(outputs, leaves, cotangents(outputs)))


def assert_equal_outputs(out: SinkhornOutput, expected: SinkhornOutput) -> None:
    """Bit for bit."""
    for name, x in out._asdict().items():
        y = getattr(expected, name)
        assert (x is None and y is None) or torch.equal(x, y), name


# Points


@every_metric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_points_against_the_reference(dtype: torch.dtype, metric: str, device: str) -> None:
    x, y = random_points(3, 13, 9, 17, seed=1, dtype=dtype)
    a, b = random_weights(3, 13, seed=2), random_weights(3, 9, seed=3)
    eps, max_iter = 0.1, 20
    cost = cost_matrix(x.double(), y.double(), metric)
    out = sinkhorn_points(
        x.to(device), y.to(device), eps, a.to(device), b.to(device), metric=metric, max_iter=max_iter, return_plan=True
    )
    # The weights are rounded to the dtype of the arithmetic, which changes their mass by a rounding too.
    real = output_dtype(dtype)
    ref = sinkhorn_reference(cost, eps, a.to(real), b.to(real), max_iter=max_iter, return_plan=True)
    assert_same_solution(out, ref, tolerance_of_points(x, y, metric, eps, max_iter, device), span=cost.max().item())
    assert out.value.dtype == real
    assert out.n_iter.tolist() == [max_iter] * 3


@every_metric
def test_points_with_every_option(metric: str, device: str) -> None:
    """The same as `sinkhorn` on the cost, option by option."""
    x, y = random_points(3, 7, 8, 5, seed=4, device=device)
    b = random_weights(1, 8, seed=5, device=device)[0]
    options = {
        "eps": torch.tensor([0.1, 0.2, 0.4], device=device),
        "tol": torch.tensor([1e-2, 1e-4, 1e-6], device=device),
        "check_every": 3,
        "max_iter": 400,
        "init": (None, random_points(1, 3, 1, 8, device=device).x[0]),
        "return_plan": True,
    }
    out = sinkhorn_points(x, y, b=b, metric=metric, **options)
    expected = otface_cuda.sinkhorn(cost_matrix(x, y, metric), b=b, **options)
    assert out.n_iter.tolist() == expected.n_iter.tolist()
    assert len(set(out.n_iter.tolist())) > 1
    assert out.converged.all()
    # Two solutions in float64 of costs that differ by rounding; thousands of operations on numbers of size 1.
    for name in ("value", "transport_cost", "f", "g", "plan"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=0, atol=1e-12)


@every_metric
def test_points_unbatched(metric: str, device: str) -> None:
    x, y = random_points(1, 6, 5, 4, seed=6, dtype=torch.float32, device=device)
    batch = sinkhorn_points(x, y, 0.1, metric=metric, return_plan=True)
    one = sinkhorn_points(x[0], y[0], 0.1, metric=metric, return_plan=True)
    for alone, batched in zip(one, batch, strict=True):
        assert torch.equal(alone, batched[0])


@every_metric
def test_points_of_any_strides(metric: str, device: str) -> None:
    """To rounding: a matrix product may go another way where its operands lie in another order."""
    x, y = random_points(3, 6, 5, 8, seed=7, device=device)
    plain = sinkhorn_points(x, y, 0.1, metric=metric)
    strided = sinkhorn_points(
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0), y.repeat_interleave(2, 2)[:, :, ::2], 0.1, metric=metric
    )
    torch.testing.assert_close(strided.f, plain.f, rtol=0, atol=1e-13)
    shared = sinkhorn_points(x[:1].expand(3, 6, 8), y, 0.1, metric=metric)
    torch.testing.assert_close(shared.f[0], plain.f[0], rtol=0, atol=1e-13)


@every_mode
@every_metric
def test_gradcheck_of_points(metric: str, mode: str, device: str) -> None:
    """In float64, against finite differences, in both point sets and both weights at once."""
    x, y = random_points(2, 4, 3, 3, seed=8, device=device)
    logits = [random_weights(2, size, seed=9, device=device).log() for size in (4, 3)]
    # Costs below 3 at eps 1: an iteration shrinks the error by tanh(3/2)^2 = 0.82 at least, so by 1e-17 in 200.
    max_iter = 3 if mode == "unrolled" else 200

    def solve(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        out = sinkhorn_points(
            x, y, 1.0, a.softmax(1), b.softmax(1), metric=metric, max_iter=max_iter, grad=mode, return_plan=True
        )
        return tuple(getattr(out, name) for name in OUTPUTS[mode] + ["plan"] * (mode != "envelope"))

    inputs = [t.clone().requires_grad_() for t in (x, y, *logits)]
    # A difference of forward values has 1e-16 / 1e-6 of noise, the step an error of 1e-12.
    assert torch.autograd.gradcheck(solve, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


@every_mode
@every_metric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_points_against_float64(dtype: torch.dtype, metric: str, mode: str, device: str) -> None:
    """The gradient in the points is what autograd makes of the float64 reference cost, and has the points' dtype."""
    x, y = random_points(3, 8, 10, 6, seed=10, dtype=dtype, device=device)
    options = {"max_iter": 8 if mode == "unrolled" else 300, "grad": mode}
    eps = 0.5
    actual = gradients(lambda x, y: sinkhorn_points(x, y, eps, metric=metric, **options), [x, y], mode)
    expected = gradients(
        lambda x, y: otface_cuda.sinkhorn(cost_matrix(x, y, metric), eps, **options), [x.double(), y.double()], mode
    )
    # The derivatives in the cost have the relative error of the plan; the gradients add them up, and are rounded to the
    # dtype in the end.
    error = tolerance_of_points(x, y, metric, eps, 2 * options["max_iter"], device).plan
    for g, ref, points in zip(actual, expected, (x, y), strict=True):
        assert g.dtype == points.dtype
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(g.double(), ref, rtol=rounding, atol=error * ref.abs().max().item())


@every_metric
def test_half_points_are_read_exactly(metric: str, device: str) -> None:
    """They are the same numbers in float32, and give the same bits."""
    for dtype in (torch.bfloat16, torch.float16):
        x, y = random_points(2, 6, 7, 9, seed=12, dtype=dtype, device=device)
        out = sinkhorn_points(x, y, 0.1, metric=metric, return_plan=True)
        assert_equal_outputs(out, sinkhorn_points(x.float(), y.float(), 0.1, metric=metric, return_plan=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_points_far_from_the_origin(metric: str, padded: bool, device: str) -> None:
    """What they have in common is not squared: values and gradients are as precise as near the origin."""
    x, y = random_points(2, 12, 10, 3, seed=13, dtype=torch.float32, device=device)
    x, y = x + 1e4, y + 1e4  # rounded to 1e-3; from here on these are the points
    eps = 0.1
    lengths = {"row_lengths": torch.tensor([12, 5], device=device), "col_lengths": torch.tensor([4, 9], device=device)}

    def solve(x: Tensor, y: Tensor) -> SinkhornOutput:
        return sinkhorn_points(x, y, eps, metric=metric, **lengths if padded else {})

    actual = solve(x, y)
    near = [points.double() - 1e4 for points in (x, y)]
    expected = solve(*near)
    tol = tolerance_of_points(*(points.float() for points in near), metric, eps, 100, device)
    torch.testing.assert_close(actual.f.double(), expected.f, rtol=0, atol=tol.potential)
    for g, ref in zip(gradients(solve, [x, y], "envelope"), gradients(solve, near, "envelope"), strict=True):
        torch.testing.assert_close(g.double(), ref, rtol=0, atol=tol.plan * ref.abs().max().item())


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-14, 1e14, 1e18, 1e30])
def test_cosine_of_tiny_and_huge_vectors(scale: float, device: str) -> None:
    """Their squares leave the range of float32, the cosine and its gradient do not."""
    x, y = random_points(2, 5, 6, 4, seed=14, dtype=torch.float32, device=device)
    factor = 2.0 ** round(math.log2(scale))  # a power of two: the scaled coordinates are the same digits

    def solve(x: Tensor, y: Tensor) -> SinkhornOutput:
        return sinkhorn_points(x, y, 0.1, max_iter=300)

    tol = tolerance_of_points(x, y, "cosine", 0.1, 300, device)
    torch.testing.assert_close(solve(factor * x, y).f, solve(x, y).f, rtol=0, atol=tol.potential)
    scaled, plain = (gradients(solve, [points, y], "envelope") for points in (factor * x, x))
    torch.testing.assert_close(factor * scaled[0], plain[0], rtol=0, atol=tol.plan * plain[0].abs().max().item())
    torch.testing.assert_close(scaled[1], plain[1], rtol=0, atol=tol.plan * plain[1].abs().max().item())


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zero_vectors(dtype: torch.dtype, mode: str, device: str) -> None:
    """Cosine 0 with everything, another zero vector too, and a gradient of exactly 0."""
    x, y = random_points(2, 5, 6, 4, seed=15, dtype=dtype, device=device)
    x[0, 2] = 0
    x[1, :] = 0
    y[0, 3] = 0
    cost = cost_matrix(x.double(), y.double(), "cosine")
    assert (cost[0, 2] == 1).all()
    assert (cost[1] == 1).all()

    def solve(x: Tensor, y: Tensor) -> SinkhornOutput:
        return sinkhorn_points(x, y, 0.3, grad=mode, max_iter=300)

    tol = tolerance_of_points(x, y, "cosine", 0.3, 300, device)
    expected = otface_cuda.sinkhorn(cost, 0.3, max_iter=300)
    torch.testing.assert_close(solve(x, y).f.double(), expected.f, rtol=0, atol=tol.potential)
    grad_x, grad_y = gradients(solve, [x, y], mode)
    assert grad_x.isfinite().all()
    assert grad_y.isfinite().all()
    assert (grad_x[0, 2] == 0).all()
    assert (grad_x[1] == 0).all()
    assert (grad_y[0, 3] == 0).all()
    assert (grad_x[0] != 0).any()


@every_mode
@every_metric
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_coincident_points(dtype: torch.dtype, metric: str, mode: str, device: str) -> None:
    """A set against itself, and points that are all the same: the root of 0 has no derivative, the gradient takes 0."""
    x, _ = random_points(2, 6, 6, 4, seed=16, dtype=dtype, device=device)
    x[1] = x[1, 0]
    eps, max_iter = 0.5, 300

    def solve(x: Tensor, y: Tensor) -> SinkhornOutput:
        return sinkhorn_points(x, y, eps, metric=metric, grad=mode, max_iter=max_iter)

    def reference(x: Tensor, y: Tensor) -> SinkhornOutput:
        return otface_cuda.sinkhorn(cost_matrix(x, y, metric), eps, grad=mode, max_iter=max_iter)

    tol = tolerance_of_points(x, x, metric, eps, max_iter, device)
    doubles = [x.double(), x.double()]
    torch.testing.assert_close(solve(x, x).f.double(), reference(*doubles).f, rtol=0, atol=tol.potential)
    for g, ref in zip(gradients(solve, [x, x], mode), gradients(reference, doubles, mode), strict=True):
        size = max(ref[0].abs().max().item(), 1 / 6)
        torch.testing.assert_close(g.double(), ref, rtol=0, atol=tol.plan * size)


@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
@every_mode
@every_metric
def test_padding_of_points_may_hold_anything(metric: str, mode: str, filling: float, device: str) -> None:
    x, y = random_points(3, 7, 9, 4, seed=17, device=device)
    rows, cols = torch.tensor([7, 3, 5], device=device), torch.tensor([9, 8, 1], device=device)
    padding_x = (torch.arange(7, device=device) >= rows[:, None])[:, :, None].expand_as(x)
    padding_y = (torch.arange(9, device=device) >= cols[:, None])[:, :, None].expand_as(y)

    def solve(x: Tensor, y: Tensor) -> SinkhornOutput:
        return sinkhorn_points(
            x, y, 0.5, metric=metric, grad=mode, row_lengths=rows, col_lengths=cols, max_iter=200, return_plan=True
        )

    clean = [x.masked_fill(padding_x, 0.25), y.masked_fill(padding_y, 0.25)]
    filled = [x.masked_fill(padding_x, filling), y.masked_fill(padding_y, filling)]
    out, expected = solve(*filled), solve(*clean)
    # The same problems in float64, whose costs may differ by a rounding.
    for name in ("value", "transport_cost", "f", "g", "plan"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=0, atol=1e-12)
    actual = gradients(solve, filled, mode)
    for g, ref, padding in zip(actual, gradients(solve, clean, mode), (padding_x, padding_y), strict=True):
        assert (g[padding] == 0).all()
        torch.testing.assert_close(g, ref, rtol=0, atol=1e-9)  # 1e-11 is the residual of the implicit gradient


@pytest.mark.parametrize("shape", [(), (1,)])
@every_metric
def test_padding_of_one_problem_may_hold_anything(metric: str, shape: tuple[int, ...], device: str) -> None:
    (x,), (y,) = random_points(1, 7, 9, 4, seed=17, device=device)
    padded = torch.cat([x[:5], x.new_full((2, 4), math.nan)]), torch.cat([y[:6], y.new_full((3, 4), math.inf)])
    lengths = {"row_lengths": torch.tensor(5).reshape(shape), "col_lengths": torch.tensor(6).reshape(shape)}
    lengths = {name: length.to(device) for name, length in lengths.items()}

    def solve(x: Tensor, y: Tensor) -> SinkhornOutput:
        return sinkhorn_points(x, y, 0.5, metric=metric, **lengths)

    expected = sinkhorn_points(x[:5], y[:6], 0.5, metric=metric)
    torch.testing.assert_close(solve(*padded).value, expected.value, rtol=0, atol=1e-13)
    for g in gradients(solve, list(padded), "envelope"):
        assert g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_metric
def test_points_under_autocast(metric: str, dtype: torch.dtype, device: str) -> None:
    """The cost and the solve stay in float32: autocast changes no bit, forward or backward."""
    points = random_points(2, 6, 7, 32, seed=18, dtype=dtype, device=device)

    def solve(x: Tensor, y: Tensor) -> SinkhornOutput:
        return sinkhorn_points(x, y, 0.1, metric=metric, return_plan=True)

    plain, plain_gradients = solve(*points), gradients(solve, list(points), "envelope")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert (points.x.float() @ points.y.float().mT).dtype == torch.bfloat16  # it would be rounded here
        assert_equal_outputs(solve(*points), plain)
        inside = gradients(solve, list(points), "envelope")
    leaves = [t.clone().requires_grad_() for t in points]
    with torch.autocast(device, dtype=torch.bfloat16):
        value = solve(*leaves).value
    outside = torch.autograd.grad(value, leaves, cotangents([value]))
    for g, g_outside, expected in zip(inside, outside, plain_gradients, strict=True):
        assert g.dtype == dtype
        assert torch.equal(g, expected)
        assert torch.equal(g_outside, expected)


# Pairs

PAIRS = torch.tensor([[0, 1], [4, 2], [3, 3], [1, 0], [0, 1], [2, 4], [0, 5], [4, 2]])  # twice (0, 1) and (4, 2)


def points_of_pairs(features: Tensor, pairs: Tensor, *args: Any, **options: Any) -> SinkhornOutput:
    """What `sinkhorn_pairs` stands for."""
    first, second = pairs.to(torch.int64).unbind(1)
    return sinkhorn_points(features[first], features[second], *args, **options)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many problems each call of an operator gets, by the operator's name."""
    seen: dict[str, list[int]] = {}

    def spy(name: str) -> None:
        operator = getattr(torch.ops.otface, name)
        seen[name] = []

        def call(cost: Tensor, *args: Any) -> Any:
            seen[name].append(cost.shape[0])
            return operator(cost, *args)

        monkeypatch.setattr(torch.ops.otface, name, call)

    for name in ("sinkhorn_forward", *(f"sinkhorn_{mode}_backward" for mode in MODES)):
        spy(name)
    return seen


@every_metric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_against_the_reference(dtype: torch.dtype, metric: str, device: str) -> None:
    features = random_features(6, 9, 17, seed=20, dtype=dtype)
    x, y = features[PAIRS[:, 0]], features[PAIRS[:, 1]]
    eps, max_iter = 0.1, 20
    out = sinkhorn_pairs(features.to(device), PAIRS.to(device), eps, metric=metric, max_iter=max_iter)
    cost = cost_matrix(x.double(), y.double(), metric)
    ref = sinkhorn_reference(cost, eps, max_iter=max_iter)
    assert_same_solution(out, ref, tolerance_of_points(x, y, metric, eps, max_iter, device), span=cost.max().item())
    assert out.plan is None
    assert out.n_iter.tolist() == [max_iter] * len(PAIRS)
    shapes = [(len(PAIRS),)] * 2 + [(len(PAIRS), 9)] * 2 + [(len(PAIRS),)] * 3
    assert [tuple(t.shape) for t in out if t is not None] == shapes
    assert [t.dtype for t in out if t is not None] == [output_dtype(dtype)] * 5 + [torch.int64, torch.bool]


@every_mode
@every_metric
@pytest.mark.parametrize("weights", ["none", "shared a", "own b", "shared a, own b", "own a and b"])
def test_pairs_are_points(weights: str, metric: str, mode: str, device: str) -> None:
    """Values, settings per pair, weights, and gradients in all of them."""
    features = random_features(6, 7, 5, seed=21, device=device)
    pairs, count = PAIRS.to(device), len(PAIRS)
    inputs = {"features": features}
    if "a" in weights.replace("shared", "").replace("and", ""):
        own = "own a" in weights
        inputs["a"] = random_weights(count, 7, seed=22, device=device)[slice(None) if own else 0]
    if "b" in weights:
        inputs["b"] = random_weights(count, 7, seed=23, device=device)
    options = {
        # The pairs that are listed twice have the same and another eps.
        "eps": torch.tensor([0.5, 0.5, 0.5, 0.6, 0.5, 0.7, 0.8, 0.9], device=device),
        "tol": torch.tensor([1e-3, 0.0, 0.0, 0.0, 1e-3, 1e-2, 0.0, 0.0], device=device),
        "max_iter": 20 if mode == "unrolled" else 200,
        "check_every": 4,
        "metric": metric,
        "grad": mode,
    }

    def solve(solver: Callable[..., SinkhornOutput]) -> tuple[SinkhornOutput, list[Tensor]]:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out = solver(leaves["features"], pairs, a=leaves.get("a"), b=leaves.get("b"), **options)
        outputs = [getattr(out, name) for name in OUTPUTS[mode]]
        return out, list(torch.autograd.grad(outputs, list(leaves.values()), cotangents(outputs)))

    out, grads = solve(sinkhorn_pairs)
    expected, expected_grads = solve(points_of_pairs)
    assert torch.equal(out.n_iter, expected.n_iter)
    assert len(out.n_iter.unique()) > 1
    stops = options["tol"] > 0  # else the last bit of a cost decides whether the error ends at zero
    assert torch.equal(out.converged[stops], expected.converged[stops])
    for name in ("value", "transport_cost", "f", "g", "error"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=0, atol=1e-12)
    for name, g, ref in zip(inputs, grads, expected_grads, strict=True):
        assert g.shape == inputs[name].shape
        torch.testing.assert_close(g, ref, rtol=0, atol=1e-10 * ref.abs().max().item())


@every_mode
@every_metric
def test_gradcheck_of_pairs(metric: str, mode: str, device: str) -> None:
    """With pairs listed twice, a shared and an own weight, and, where it has a derivative, a pair (i, i)."""
    features = random_features(3, 4, 3, seed=24, device=device)
    pairs = torch.tensor([[0, 1], [2, 1], [0, 1], [1, 2], [2, 2]], device=device)
    if metric == "euclidean":
        pairs = pairs[:4]
    shared, own = (random_weights(k, 4, seed=25 + k, device=device).log() for k in (1, len(pairs)))
    max_iter = 3 if mode == "unrolled" else 200  # as for the points

    def solve(features: Tensor, shared: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        out = sinkhorn_pairs(
            features, pairs, 1.0, shared[0].softmax(0), own.softmax(1), metric=metric, max_iter=max_iter, grad=mode
        )
        return tuple(getattr(out, name) for name in OUTPUTS[mode])

    def solve_unweighted(features: Tensor) -> tuple[Tensor, ...]:  # here the pairs listed twice are solved once
        out = sinkhorn_pairs(features, pairs, 1.0, metric=metric, max_iter=max_iter, grad=mode)
        return tuple(getattr(out, name) for name in OUTPUTS[mode])

    inputs = [t.clone().requires_grad_() for t in (features, shared, own)]
    assert torch.autograd.gradcheck(solve, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradcheck(solve_unweighted, inputs[:1], eps=1e-6, atol=1e-8, rtol=1e-6)


def signs(count: int, p: int, d: int, device: str) -> Tensor:
    """Features of +-1, whose costs are exact in float32 (d = 16: norms of 4; p = 8: means in eighths), so that a matrix
    product cannot round differently from call to call."""
    assert (p, d) == (8, 16)
    drawn = torch.randint(0, 2, (count, p, d), generator=torch.Generator().manual_seed(34))
    return (2 * drawn - 1).float().to(device)


# Of PAIRS. To find out which are listed twice, the host would have to wait for a GPU.
NUMBER_SOLVED = {"cpu": 6, "cuda": 8}


@every_mode
def test_duplicates_are_solved_once(mode: str, solved: dict[str, list[int]], device: str) -> None:
    """Or, on CUDA, all of them: with the same bits."""
    features = signs(6, 8, 16, device).requires_grad_()
    pairs = PAIRS.to(device)
    out = sinkhorn_pairs(features, pairs, 0.5, metric="sqeuclidean", grad=mode)
    assert sum(solved["sinkhorn_forward"]) == NUMBER_SOLVED[device]
    once = [0, 1, 2, 3, 5, 6]
    alone = sinkhorn_pairs(features, pairs[once], 0.5, metric="sqeuclidean", grad=mode)
    for name in ("value", "transport_cost", "f", "g", "error", "n_iter", "converged"):
        x = getattr(out, name)
        assert torch.equal(x[0], x[4]), name
        assert torch.equal(x[1], x[7]), name
        assert torch.equal(x[once], getattr(alone, name)), name
    out.value.sum().backward()
    assert sum(solved[f"sinkhorn_{mode}_backward"]) == NUMBER_SOLVED[device]


def test_equal_pairs_with_other_settings_are_other_problems(solved: dict[str, list[int]], device: str) -> None:
    features = random_features(3, 7, 5, seed=28, device=device)
    pairs = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [1, 0]], device=device)
    eps = torch.tensor([0.5, 0.25, 0.5, 0.5, 0.5, 0.5], device=device)
    tol = torch.tensor([0.0, 0.0, 1e-3, 0.0, 1e-3, 0.0], device=device)
    out = sinkhorn_pairs(features, pairs, eps, tol=tol)
    assert sum(solved["sinkhorn_forward"]) == (4 if device == "cpu" else 6)
    expected = points_of_pairs(features, pairs, eps, tol=tol)
    assert torch.equal(out.n_iter, expected.n_iter)
    torch.testing.assert_close(out.f, expected.f, rtol=0, atol=1e-12)
    # Weights per pair are not compared with one another.
    solved["sinkhorn_forward"].clear()
    a = random_weights(6, 7, seed=29, device=device)
    out = sinkhorn_pairs(features, pairs, eps, a, tol=tol)
    assert sum(solved["sinkhorn_forward"]) == 6
    expected = points_of_pairs(features, pairs, eps, a, tol=tol)
    torch.testing.assert_close(out.f, expected.f, rtol=0, atol=1e-12)


@every_metric
def test_order_of_the_list(metric: str, device: str) -> None:
    """A permuted list gives permuted results, bit for bit."""
    features = signs(6, 8, 16, device)
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(0))
    out = sinkhorn_pairs(features, PAIRS.to(device), 0.1, metric=metric)
    permuted = sinkhorn_pairs(features, PAIRS[order].to(device), 0.1, metric=metric)
    for name in ("value", "transport_cost", "f", "g", "error"):
        assert torch.equal(getattr(permuted, name), getattr(out, name)[order.to(device)])


def test_a_set_against_itself(device: str) -> None:
    """At a small eps every point stays where it is, and the derivative of nothing is nothing."""
    features = random_features(4, 7, 5, seed=31, device=device).requires_grad_()
    pairs = torch.arange(4, device=device)[:, None].expand(4, 2)
    out = sinkhorn_pairs(features, pairs, 1e-3, metric="sqeuclidean", max_iter=50)
    smallest = min(
        cost_matrix(x.detach(), x.detach(), "sqeuclidean").fill_diagonal_(math.inf).min().item() for x in features
    )
    moved = 7 * math.exp(-smallest / 1e-3)  # at most: the other entries of the plan
    assert moved < 1e-20
    assert (out.transport_cost <= 5 * moved).all()  # distances are at most sqrt(5)
    torch.testing.assert_close(out.value, torch.full_like(out.value, 1e-3 * math.log(7)), rtol=0, atol=1e-14)
    out.value.sum().backward()
    torch.testing.assert_close(features.grad, torch.zeros_like(features), rtol=0, atol=1e-18)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_the_gradient_of_features(dtype: torch.dtype, device: str) -> None:
    """That of the features; half types are summed in float32 and rounded once."""
    features = random_features(6, 7, 5, seed=32, dtype=dtype, device=device)

    def solve(x: Tensor) -> SinkhornOutput:
        return sinkhorn_pairs(x, PAIRS.to(device), 0.5)

    (g,) = gradients(solve, [features], "envelope")
    (wide,) = gradients(solve, [features.to(output_dtype(dtype))], "envelope")
    assert g.dtype == dtype
    assert torch.equal(g, wide.to(dtype))


def test_strided_features_and_small_indices(device: str) -> None:
    features = random_features(6, 7, 5, seed=33, device=device)
    plain = sinkhorn_pairs(features, PAIRS.to(device), 0.1)
    strided = features.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    columns = PAIRS.to(torch.int32).mT.contiguous().mT.to(device)
    assert strided.stride() != features.stride()
    out = sinkhorn_pairs(strided, columns, 0.1)
    torch.testing.assert_close(out.f, plain.f, rtol=0, atol=1e-13)


@every_mode
@every_metric
def test_chunks_do_not_change_the_result(metric: str, mode: str, solved: dict[str, list[int]], device: str) -> None:
    """Bit for bit forward, to rounding in the gradient, where the order of a sum changes."""
    p, d = 8, 16
    features = signs(6, p, d, device)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6)).to(device)
    a = random_weights(1, p, seed=35, device=device)[0].float()
    options = {"metric": metric, "grad": mode, "max_iter": 30}
    # In float32 at least: the points and the cost of a pair; or, where no points are copied, the cost and its gradient.
    held = 4 * p * (2 * p if metric == "cosine" and device == "cpu" else 2 * d + p)
    results = []
    for chunk_bytes in (1, 5 * held, 16 * held, 2**30):
        for calls in solved.values():
            calls.clear()
        leaves = [features.clone().requires_grad_(), a.clone().requires_grad_()]
        out = sinkhorn_pairs(leaves[0], pairs, 2.0, leaves[1], chunk_bytes=chunk_bytes, **options)
        outputs = [getattr(out, name) for name in OUTPUTS[mode]]
        results.append((out, torch.autograd.grad(outputs, leaves, cotangents(outputs))))
        for calls in (solved["sinkhorn_forward"], solved[f"sinkhorn_{mode}_backward"]):
            assert sum(calls) in (36, 72)  # "unrolled" solves again
            assert max(calls) <= max(1, chunk_bytes // held)
            assert (len(calls) == 1) == (chunk_bytes == 2**30) or mode == "unrolled"
    out, (grad_features, grad_a) = results[-1]
    for other, (other_features, other_a) in results[:-1]:
        assert_equal_outputs(other, out)
        # Each feature stands in 12 pairs, the shared weight in all 36: sums of so many terms, of the largest's size.
        eps = torch.finfo(torch.float32).eps
        for g, ref, terms in ((other_features, grad_features, 12), (other_a, grad_a, 36)):
            torch.testing.assert_close(g, ref, rtol=0, atol=terms * eps * ref.abs().max().item())


def allocations(work: Callable[[], Any], path: Path, device: str) -> tuple[Any, int, int]:
    """What `work` returns, the peak of the bytes that torch held for it, and what is held in the end."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    profile.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return result, peak, held


@every_mode
@every_metric
def test_working_memory_stays_below_chunk_bytes(metric: str, mode: str, tmp_path: Path, device: str) -> None:
    """Forward and backward, beyond the results, the gradient of the features, and copies of what is as small."""
    count, p, d, chunk_bytes = 16, 16, 128, 2**20
    features = random_features(count, p, d, seed=36, dtype=torch.float32, device=device).requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count)).to(device)
    all_pairs = len(pairs) * 4 * p * (2 * d + p)
    assert all_pairs > 4 * chunk_bytes  # without chunks, the points and the costs alone would need that

    def solve() -> SinkhornOutput:
        return sinkhorn_pairs(features, pairs, 2.0, metric=metric, grad=mode, max_iter=20, chunk_bytes=chunk_bytes)

    solve().value.sum().backward()  # the workspace of the matrix products is made once and kept
    features.grad = None
    out, peak, results = allocations(solve, tmp_path / "forward.json", device)
    # A few numbers per point of a pair or a feature, where a chunk has d: the list of distinct pairs, the results of a
    # chunk before they are put in their places, and up to four copies of the features for their norms.
    small = len(pairs) * 8 * (4 * p + 16) + 4 * features.numel() * 4
    assert small < chunk_bytes
    assert peak - results < chunk_bytes + small
    _, peak, _ = allocations(out.value.sum().backward, tmp_path / "backward.json", device)
    assert peak < chunk_bytes + small + features.numel() * 4


@every_mode
@every_metric
def test_gradients_of_shared_features_are_summed_in_a_fixed_order(
    metric: str, mode: str, threads: Callable[[int], None], device: str
) -> None:
    """Two runs give the same bits where three features get the gradients of 150 pairs."""
    threads(2)
    features = random_features(3, 7, 5, seed=37, dtype=torch.float32, device=device)
    pairs = torch.randint(0, 3, (150, 2), generator=torch.Generator().manual_seed(38)).to(device)
    a = random_weights(150, 7, seed=39, device=device).float()  # of its own, so that no two pairs are one problem
    inputs = [features, a, a.mean(0)]

    def run() -> list[Tensor]:
        return gradients(
            lambda x, a, b: sinkhorn_pairs(
                x, pairs, 0.5, a, b, metric=metric, grad=mode, max_iter=20, chunk_bytes=100_000
            ),
            inputs,
            mode,
        )

    # The weights' masses are equal to rounding only, which the adjoint system does not mind.
    first, second = run(), run()
    for x, y in zip(first, second, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)


@every_metric
def test_poisoned_features_stay_alone(metric: str, device: str) -> None:
    """Only the pairs that have them, and only the gradients of features that stand in such a pair."""
    features = random_features(6, 7, 5, seed=40, dtype=torch.float32, device=device)
    pairs = torch.tensor([[0, 1], [2, 5], [1, 3], [5, 5], [4, 3], [5, 2]], device=device)
    spoilt = (pairs == 5).any(1)

    def solve(x: Tensor) -> SinkhornOutput:
        return sinkhorn_pairs(x, pairs, 0.2, metric=metric)

    clean, (clean_gradient,) = solve(features), gradients(solve, [features], "envelope")
    for value in (math.nan, math.inf):
        bad = features.clone()
        bad[5, 3, 1] = value
        out, (gradient,) = solve(bad), gradients(solve, [bad], "envelope")
        assert torch.equal(out.value.isnan(), spoilt)
        assert not out.converged[spoilt].any()
        for name in ("value", "f", "g", "error", "n_iter"):
            assert torch.equal(getattr(out, name)[~spoilt], getattr(clean, name)[~spoilt])
        assert torch.equal(gradient[[0, 1, 3, 4]], clean_gradient[[0, 1, 3, 4]])


@every_metric
def test_zero_and_coincident_features(metric: str, device: str) -> None:
    features = random_features(4, 7, 5, seed=41, dtype=torch.float32, device=device)
    features[1, 2] = 0
    features[2] = 0
    features[3] = features[0]
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4)).to(device)
    for mode in MODES:
        leaf = features.clone().requires_grad_()
        out = sinkhorn_pairs(leaf, pairs, 0.5, metric=metric, grad=mode, max_iter=300)
        assert all(x.isfinite().all() for x in out if x is not None)
        out.value.sum().backward()
        assert leaf.grad.isfinite().all()
        assert (leaf.grad != 0).any()
        if metric == "cosine":
            assert (leaf.grad[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
def test_pairs_under_autocast(mode: str, dtype: torch.dtype, device: str) -> None:
    """As for the points: no bit changes."""
    features = random_features(6, 7, 32, seed=42, dtype=dtype, device=device)

    def solve(x: Tensor) -> SinkhornOutput:
        return sinkhorn_pairs(x, PAIRS.to(device), 0.5, grad=mode, max_iter=40)

    plain, (expected,) = solve(features), gradients(solve, [features], mode)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert (features[0].float() @ features[1].float().mT).dtype == torch.bfloat16
        assert_equal_outputs(solve(features), plain)
        (inside,) = gradients(solve, [features], mode)
    assert inside.dtype == dtype
    assert torch.equal(inside, expected)


def test_gradients_only_where_asked_for(device: str) -> None:
    features = random_features(6, 7, 5, seed=43, device=device)
    a = random_weights(1, 7, seed=44, device=device)[0]
    assert not sinkhorn_pairs(features, PAIRS.to(device), 0.5, a).value.requires_grad
    a.requires_grad_()
    out = sinkhorn_pairs(features, PAIRS.to(device), 0.5, a)
    assert out.value.requires_grad
    assert not any(x.requires_grad for x in (out.error, out.n_iter, out.converged))
    out.value.sum().backward()
    assert features.grad is None
    assert a.grad.shape == a.shape


@pytest.mark.parametrize("name", ["transport_cost", "f", "g", "plan"])
def test_envelope_has_the_gradient_of_the_value_only(name: str, device: str) -> None:
    features = random_features(6, 7, 5, seed=45, device=device).requires_grad_()
    if name != "plan":
        out = sinkhorn_pairs(features, PAIRS.to(device), 0.5)
        with pytest.raises(RuntimeError, match=f"sinkhorn_pairs: `{name}` has no gradient with grad='envelope'"):
            getattr(out, name).sum().backward()
    out = points_of_pairs(features, PAIRS.to(device), 0.5, return_plan=True)
    with pytest.raises(RuntimeError, match=f"sinkhorn_points: `{name}` has no gradient with grad='envelope'"):
        getattr(out, name).sum().backward()


# torch.compile


def check_compiled(solve: Callable[..., SinkhornOutput], inputs: list[Tensor], mode: str) -> None:
    """One graph without a break, with the same bits, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    assert_equal_outputs(compiled(*inputs), solve(*inputs))
    for x, y in zip(gradients(compiled, inputs, mode), gradients(solve, inputs, mode), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("metric", "mode"), list(zip(METRICS, MODES, strict=True)))
def test_compiled_points(metric: str, mode: str, device: str) -> None:
    points = random_points(2, 5, 6, 4, seed=46, dtype=torch.float32, device=device)
    check_compiled(
        lambda x, y: sinkhorn_points(x, y, 0.5, metric=metric, grad=mode, max_iter=30, return_plan=True),
        list(points),
        mode,
    )


@pytest.mark.parametrize(("metric", "mode"), list(zip(METRICS, MODES, strict=True)))
def test_compiled_pairs(metric: str, mode: str, device: str) -> None:
    features = random_features(6, 7, 5, seed=47, dtype=torch.float32, device=device)
    a = random_weights(1, 7, seed=48, device=device)[0].float()
    pairs = PAIRS.to(device)
    check_compiled(
        lambda x, a: sinkhorn_pairs(x, pairs, 0.5, a, metric=metric, grad=mode, max_iter=30), [features, a], mode
    )


def test_compiled_for_any_number_of_pairs(device: str) -> None:
    features = random_features(6, 7, 5, seed=49, dtype=torch.float32, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda features, pairs: sinkhorn_pairs(features, pairs, 0.5),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for count in (8, 3, 1, 0):
        pairs = PAIRS[:count].to(device)
        assert_equal_outputs(compiled(features, pairs), sinkhorn_pairs(features, pairs, 0.5))


@every_mode
def test_opcheck_of_the_pair_operators(mode: str, device: str) -> None:
    features = random_features(6, 7, 5, seed=50, dtype=torch.float32, device=device)
    pairs, count = PAIRS.to(device), len(PAIRS)
    eps = torch.full((count,), 0.5, dtype=torch.float64, device=device)
    w = torch.full((1, 7), 1 / 7, device=device)
    arguments = (features, pairs, eps, w, w, torch.zeros_like(eps), "cosine", 20, 10, mode, 2**20, 1e-3)
    forward = torch.ops.otface.sinkhorn_pairs_forward
    torch.library.opcheck(forward, arguments)
    out = forward(*arguments)
    incoming = [torch.ones_like(out[0])] + [None if mode == "envelope" else torch.ones_like(x) for x in out[1:4]]
    torch.library.opcheck(
        torch.ops.otface.sinkhorn_pairs_backward, (*arguments, out[7], out[5], *incoming, True, True, True)
    )
