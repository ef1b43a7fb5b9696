"""On the CPU the cosines of listed pairs come from kernels that read the point sets where they lie: what comes out is
what copies of the point sets of each pair give.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from otface_cuda import SinkhornOutput, sinkhorn_pairs
from otface_cuda import pairs as pairs_module
from otface_cuda.pair_costs import CopiedSets, PackedSets

from .problems import DTYPES, output_dtype
from .test_points_pairs import (
    METRICS,
    cotangents,
    every_mode,
    gradients,
    points_of_pairs,
    random_features,
    tolerance_of_points,
)


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """The operations here are small."""
    threads(1)


def all_pairs(count: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(count), torch.arange(count))


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 2**25])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 11])
def test_packed_is_copied(count: int, share: float, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients. In float64: the same products, summed in another order."""
    features = random_features(count, 7, 5, seed=51)
    pairs = all_pairs(count)[torch.rand(count**2, generator=torch.Generator().manual_seed(52)) < share]
    made = []

    def copied(points: Tensor, metric: str, want_costs: bool = True) -> CopiedSets:
        made.append("copied")
        return CopiedSets(points, metric)

    results = []
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(pairs_module, "point_sets", copied)
        leaf = features.clone().requires_grad_()
        out = sinkhorn_pairs(leaf, pairs, 0.5, max_iter=20, grad="unrolled", chunk_bytes=chunk_bytes)
        loss = sum((x * y).sum() for x, y in zip(out[:4], cotangents(list(out[:4])), strict=True))
        results.append((out, *torch.autograd.grad(loss, leaf)))
    assert bool(made) == (len(pairs) > 0)
    (out, grad), (expected, expected_grad) = results
    for name in ("value", "transport_cost", "f", "g"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=0, atol=1e-13)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


# Around the 16 of a panel, the 4 or 6 rows of a tile, and the 64 to 256 dimensions of a block.
POINTS = [1, 2, 6, 7, 15, 16, 17, 31, 33, 49, 64]
SIZES = [1, 15, 16, 17, 70, 257, 600]


def expected_costs(points: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """In float64, differentiable."""
    x = points.double()
    length = x.norm(dim=2, keepdim=True)
    unit = x / torch.where(length > 0, length, 1.0)
    return 1 - unit[first] @ unit[second].mT


@pytest.mark.instruction_set
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "d"), [*((p, 70) for p in POINTS), *((49, d) for d in SIZES)])
def test_costs_and_gradient(p: int, d: int, dtype: torch.dtype) -> None:
    """Against float64 from the same points: sums of d products of numbers below 1, and of p for each pair of a set."""
    points = random_features(5, p, d, seed=57, dtype=dtype)
    first, second = torch.tensor([[0, 1], [0, 3], [3, 0], [2, 2], [4, 3], [0, 1]]).unbind(1)
    leaf = points.double().requires_grad_()
    expected = expected_costs(leaf, first, second)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(58), dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad(expected, leaf, cotangent)

    sets = PackedSets(points)
    pairs = sets.pairs(first, second)
    cost = pairs.cost()
    pairs.add_gradient(cotangent.to(cost.dtype), cost)
    grad = sets.gradient()
    u = torch.finfo(cost.dtype).eps
    assert cost.dtype == output_dtype(dtype)
    assert grad.dtype == dtype
    torch.testing.assert_close(cost.double(), expected, rtol=0, atol=(math.sqrt(d) + 4) * u)
    # A gradient is a sum of 6 p random signs at most, taken to the length of a point; half types round it once more.
    size = expected_grad.abs().max().item() + 6 * math.sqrt(p) / points.double().norm(dim=2).min().item()
    atol = size * ((math.sqrt(6 * p) + 8) * u + torch.finfo(dtype).eps)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=atol)


def test_nothing_to_multiply() -> None:
    """No dimension, no pair, no set."""
    index = torch.tensor([0, 1])
    sets = PackedSets(torch.ones(2, 3, 0))
    pairs = sets.pairs(index, index)
    cost = pairs.cost()
    assert torch.equal(cost, torch.ones(2, 3, 3))
    pairs.add_gradient(cost, cost)
    assert sets.gradient().shape == (2, 3, 0)
    for points in (torch.ones(2, 3, 4), torch.ones(0, 3, 4)):
        sets = PackedSets(points)
        pairs = sets.pairs(index[:0], index[:0])
        assert pairs.cost().shape == (0, 3, 3)
        pairs.add_gradient(pairs.cost(), pairs.cost())
        assert torch.equal(sets.gradient(), torch.zeros_like(points))


@pytest.mark.instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_layout_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Maps of a convolution, a slice, and one set for all; the gradient comes in the layout of the points."""
    first, second = torch.tensor([[0, 1], [2, 1]]).unbind(1)
    dense = random_features(3, 20, 37, seed=59, dtype=dtype)
    wide = random_features(3, 20, 74, seed=59, dtype=dtype)
    for view in (dense.mT.contiguous().mT, wide[:, :, ::2], dense[1:2].expand(3, -1, -1)):
        results = []
        for points in (view, view.contiguous()):
            sets = PackedSets(points)
            pairs = sets.pairs(first, second)
            cost = pairs.cost()
            pairs.add_gradient(torch.sin(cost), cost)
            results.append((cost, sets.gradient()))
        (cost, grad), (expected, expected_grad) = results
        assert torch.equal(cost, expected)
        assert torch.equal(grad, expected_grad)
    mapped = dense.mT.contiguous().mT
    sets = PackedSets(mapped)
    pairs = sets.pairs(first, second)
    pairs.add_gradient(torch.ones(2, 20, 20, dtype=dtype), pairs.cost())
    assert sets.gradient().stride() == mapped.stride()


@pytest.mark.instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    """Unit vectors do not depend on the length, down to where the coordinates themselves lose digits; 0 stays 0."""
    info = torch.finfo(dtype)
    plain = random_features(1, 4, 24, seed=60, dtype=dtype)
    index = torch.tensor([0])
    expected = PackedSets(plain).pairs(index, index).cost()
    least, most = math.frexp(info.tiny)[1], math.frexp(info.max)[1]
    for exponent in (least + 20, least // 2, most // 2, most - 1):
        scaled = plain * math.ldexp(1.0, exponent)  # changes no digit
        cost = PackedSets(scaled).pairs(index, index).cost()
        torch.testing.assert_close(cost, expected, rtol=0, atol=8 * info.eps)
    plain[0, 2] = 0
    sets = PackedSets(plain)
    pairs = sets.pairs(index, index)
    cost = pairs.cost()
    assert (cost[0, 2] == 1).all()
    assert (cost[0, :, 2] == 1).all()
    pairs.add_gradient(torch.ones_like(cost), cost)
    grad = sets.gradient()
    assert (grad[0, 2] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.instruction_set
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_point_stays_alone(bad: float) -> None:
    points = random_features(3, 17, 20, seed=61, dtype=torch.float32)
    points[1, 16, 3] = bad
    first, second = torch.tensor([[0, 1], [0, 2], [1, 2]]).unbind(1)
    cost = PackedSets(points).pairs(first, second).cost()
    assert cost[0, :, 16].isnan().all()
    assert cost[2, 16].isnan().all()
    assert int(cost.isnan().sum()) == 2 * 17


@pytest.mark.instruction_set
def test_the_number_of_threads_changes_no_bit(threads: Any) -> None:
    points = random_features(9, 49, 130, seed=62, dtype=torch.float32)
    for listed in (all_pairs(9), all_pairs(9)[:1]):  # many pairs for a task, and rows of one pair
        first, second = listed.unbind(1)
        results = []
        for count in (1, 2, 5):
            threads(count)
            sets = PackedSets(points)
            pairs = sets.pairs(first, second)
            cost = pairs.cost()
            pairs.add_gradient(torch.cos(cost), cost)
            results.append((cost, sets.gradient()))
        for cost, grad in results[1:]:
            assert torch.equal(cost, results[0][0])
            assert torch.equal(grad, results[0][1])


def test_operators() -> None:
    """opcheck, and what the operators insist on so that nothing is read or written out of bounds."""
    ops = torch.ops.otface
    points = random_features(3, 18, 20, seed=63, dtype=torch.float32)
    first, second = torch.tensor([[0, 1], [2, 1]]).unbind(1)
    for given in (points, points.half(), points[:, :, :0], points[:, :0], points[:0]):
        for want in (True, False):
            torch.library.opcheck(ops.pack_points, (given, want))
    rows, columns, lengths = ops.pack_points(points, True)
    cost, sums = torch.rand(2, 18, 18), torch.zeros_like(rows)
    for op, args in (
        (ops.pair_costs, (rows, columns, first.contiguous(), second.contiguous(), cost)),
        (ops.pair_costs_backward, (rows, cost, first.contiguous(), second.contiguous(), sums)),
        (ops.unpack_gradient, (sums, rows, lengths, torch.empty_like(points))),
    ):
        torch.library.opcheck(op, args)
    index = torch.tensor([0, 1])
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(RuntimeError, match="between 0 and N - 1"):
            ops.pair_costs(rows, columns, index, wrong, cost)
        with pytest.raises(RuntimeError, match="between 0 and N - 1"):
            ops.pair_costs_backward(rows, cost, wrong, index, sums)
    with pytest.raises(RuntimeError, match="cost has the wrong shape"):
        ops.pair_costs(rows, columns, index, index, cost[:1])
    with pytest.raises(RuntimeError, match="columns has the wrong shape"):
        ops.pair_costs(rows, columns[:2], index, index, cost)
    with pytest.raises(RuntimeError, match="sums has the wrong dtype"):
        ops.pair_costs_backward(rows, cost, index, index, sums.double())
    with pytest.raises(RuntimeError, match="grad must be"):
        ops.unpack_gradient(sums, rows, lengths, torch.empty(3, 18, 40))


def test_packed_float32() -> None:
    """Against the costs of the same points in float64, with the tolerance that copies of the points have."""
    features = random_features(6, 9, 70, seed=53, dtype=torch.float32)
    pairs = all_pairs(6)
    out = sinkhorn_pairs(features, pairs, 0.1, max_iter=20)
    expected = points_of_pairs(features.double(), pairs, 0.1, max_iter=20)
    tol = tolerance_of_points(features, features, "cosine", 0.1, 20, "cpu")
    torch.testing.assert_close(out.f.double(), expected.f, rtol=0, atol=tol.potential)
    torch.testing.assert_close(out.transport_cost.double(), expected.transport_cost, rtol=0, atol=2 * tol.plan)


@every_mode
def test_a_pair_with_two_settings(mode: str, device: str) -> None:
    """The gradients of both reach the features."""
    features = random_features(5, 7, 5, seed=54, device=device)
    pairs = torch.cat([all_pairs(5), all_pairs(5)[3:9]]).to(device)
    eps = torch.full((len(pairs),), 0.5, device=device)
    eps[25:] = 0.8
    (grad,), (expected,) = (
        gradients(lambda x, solve=solve: solve(x, pairs, eps, grad=mode), [features], mode)
        for solve in (sinkhorn_pairs, points_of_pairs)
    )
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_poisoned_features_stay_alone(device: str) -> None:
    """One that no pair names, and one that some do."""
    features = random_features(6, 7, 5, seed=55, device=device)
    pairs = all_pairs(6).to(device)
    features[3, 2, 1] = math.nan

    def solve(x: Tensor, listed: Tensor) -> SinkhornOutput:
        return sinkhorn_pairs(x, listed, 0.5)

    without = pairs[(pairs != 3).all(1)]
    out, (grad,) = solve(features, without), gradients(lambda x: solve(x, without), [features], "envelope")
    assert out.value.isfinite().all()
    assert grad[[0, 1, 2, 4, 5]].isfinite().all()
    some = pairs[((pairs != 3).all(1)) | (pairs[:, 0] == 0)]  # 3 is paired with 0
    out, (grad,) = solve(features, some), gradients(lambda x: solve(x, some), [features], "envelope")
    assert torch.equal(out.value.isnan(), (some == 3).any(1))
    assert grad[[1, 2, 4, 5]].isfinite().all()
    assert grad[0].isnan().any()


@pytest.mark.parametrize("name", ["transport_cost", "value"])
def test_compiled_with_indices_out_of_range(name: str, device: str) -> None:
    """Nobody looks at them there: NaN for their own pairs."""
    features = random_features(6, 7, 5, seed=56, device=device)
    pairs = all_pairs(6).to(device)
    pairs[3, 0], pairs[20, 0], pairs[30, 1] = -1, 17, 6
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sinkhorn_pairs(x, pairs, 0.5), fullgraph=True, backend="aot_eager")
    out = getattr(compiled(features), name)
    assert out.isnan().nonzero()[:, 0].tolist() == [3, 20, 30]
    expected = getattr(sinkhorn_pairs(features, pairs.clamp(0, 5), 0.5), name)
    good = ~out.isnan()
    torch.testing.assert_close(out[good], expected[good], rtol=0, atol=1e-13)


def test_an_index_out_of_range_takes_no_nan_elsewhere() -> None:
    """The set that it is paired with holds one: its own gradient may be NaN, no other one."""
    features = random_features(4, 7, 5, seed=64)
    features[3, 2, 1] = math.nan
    pairs = torch.tensor([[0, 1], [-1, 3], [1, 2], [3, 9]])
    leaf = features.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sinkhorn_pairs(x, pairs, 0.5).value, fullgraph=True, backend="aot_eager")
    value = compiled(leaf)
    assert value.isnan().tolist() == [False, True, False, True]
    (grad,) = torch.autograd.grad(value[[0, 2]].sum(), leaf)
    assert grad[:3].isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_have_the_layout_that_tracing_is_told(metric: str) -> None:
    """Of maps of a convolution: a compiled graph relies on it."""
    points = random_features(3, 7, 5, seed=65, dtype=torch.float32).mT.contiguous().mT
    pairs = torch.tensor([[0, 1], [2, 1]])
    eps, tol = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    arguments = (points, pairs, eps, None, None, tol, metric, 5, 5, "envelope", 1 << 20, 0.1)
    out = torch.ops.otface.sinkhorn_pairs_forward(*arguments)
    backward = (*arguments, out[7], out[5], torch.ones(2), None, None, None, True, False, False)
    torch.library.opcheck(torch.ops.otface.sinkhorn_pairs_backward, backward)
    assert torch.ops.otface.sinkhorn_pairs_backward(*backward)[0].stride() == points.stride()
