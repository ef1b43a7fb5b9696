"""`ot_triplet_loss` against one triplet at a time in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import otface_cuda
from otface_cuda import OTTripletLossOutput, ot_triplet, ot_triplet_loss, sinkhorn_pairs

from .otface_problems import distance_error, random_batch, transport_term
from .problems import DTYPES, output_dtype
from .test_bad_input import Case, meta, refused, to
from .test_operators import Recorder
from .test_points_pairs import METRICS, allocations, solved  # noqa: F401

CHANNELS, SIDE, N_ITER = 16, 3, 10
# In both orders, some twice, one with an anchor that is its own negative's positive.
TRIPLETS = [(0, 1, 2), (1, 0, 2), (4, 0, 3), (0, 1, 2), (3, 5, 1), (2, 3, 5), (5, 3, 1), (4, 5, 0), (2, 0, 4)]


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """The operations here are small."""
    threads(1)


def maps_of(count: int = 6, seed: int = 0, **sizes: int) -> Tensor:
    return random_batch([0] * count, channels=CHANNELS, side=SIDE, seed=seed, **sizes).maps


def with_gradient(maps: Tensor, triplets: Any, **options: Any) -> tuple[OTTripletLossOutput, Tensor]:
    leaf = maps.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    listed = triplets if isinstance(triplets, Tensor) else torch.tensor(triplets, dtype=torch.int64).reshape(-1, 3)
    out = ot_triplet_loss(leaf, listed.to(maps.device), **options)
    assert [x.shape for x in out] == [()] * 3
    assert [x.dtype for x in out] == [output_dtype(maps.dtype), torch.int64, torch.int64]
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert grad.dtype == maps.dtype
    return out, grad


def expected_of(maps: Tensor, triplets: Any, **options: Any) -> tuple[Tensor, Tensor, int]:
    leaf = maps.detach().cpu().double().requires_grad_()
    loss, active = transport_term(leaf, list(triplets), **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], active


@pytest.mark.parametrize("beta", [0.0, 0.05, -0.01, 3.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_one_at_a_time(dtype: torch.dtype, seed: int, beta: float, device: str) -> None:
    maps = maps_of(seed=seed).to(device, dtype)
    out, grad = with_gradient(maps, TRIPLETS, beta=beta)
    loss, expected, active = expected_of(maps, TRIPLETS, beta=beta)
    assert out.n_hard == len(TRIPLETS)
    assert out.n_active == active
    # The hinge has two distances.
    error = 2 * distance_error(dtype, SIDE**2, CHANNELS, 1.0, N_ITER)
    torch.testing.assert_close(out.loss.double().cpu(), loss, rtol=0, atol=error)
    # The gradient of a cost is of the plan's relative error, and the sums over cells, channels and triplets mix signs;
    # then it is rounded to the dtype of the maps.
    size = max(expected.abs().max().item(), 1e-300)
    torch.testing.assert_close(
        grad.double().cpu(), expected, rtol=torch.finfo(dtype).eps, atol=(4 * error + torch.finfo(dtype).tiny) * size
    )


@pytest.mark.parametrize(("eps", "n_iter"), [(1.0, 1), (0.2, 10), (0.05, 30), (5.0, 3)])
@pytest.mark.parametrize("metric", METRICS)
def test_is_made_of_sinkhorn_pairs(metric: str, eps: float, n_iter: int, device: str) -> None:
    """Each pair from the lower to the higher index, at any eps, and the metrics."""
    maps = maps_of().to(device)
    triplets = torch.tensor(TRIPLETS, device=device)

    def reference(maps: Tensor) -> tuple[Tensor, Tensor]:
        points = maps.flatten(2).mT
        sides = [triplets[:, [0, k]].sort(1).values for k in (1, 2)]
        positive, negative = (
            sinkhorn_pairs(points, side, eps, metric=metric, max_iter=n_iter, grad="unrolled").transport_cost
            for side in sides
        )
        hinge = functional.relu(positive - negative + 0.02)
        return hinge.sum() / (hinge > 0).sum(), (hinge > 0).sum()

    out, grad = with_gradient(maps, triplets, eps=eps, n_iter=n_iter, beta=0.02, metric=metric)
    leaf = maps.clone().requires_grad_()
    loss, active = reference(leaf)
    assert out.n_active == active
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=1e-13)
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


def test_points_are_cells(device: str) -> None:
    maps = maps_of().to(device)
    triplets = torch.tensor(TRIPLETS, device=device)
    assert torch.equal(
        ot_triplet_loss(maps, triplets).loss, ot_triplet_loss(maps.flatten(2).mT.contiguous(), triplets).loss
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layouts(dtype: torch.dtype, device: str) -> None:
    """To rounding: a reduction over channels may go another way where they lie in another order."""
    maps = maps_of().to(device, dtype)
    layouts = [
        maps.contiguous(memory_format=torch.channels_last),
        maps.repeat_interleave(2, 3)[..., ::2],
        maps.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        maps.flip(2).contiguous().flip(2),
    ]
    out, grad = with_gradient(maps, TRIPLETS)
    error = 2 * distance_error(dtype, SIDE**2, CHANNELS, 1.0, N_ITER)
    for other in layouts:
        assert torch.equal(other, maps)
        again, other_grad = with_gradient(other, TRIPLETS)
        torch.testing.assert_close(again.loss, out.loss, rtol=0, atol=error)
        torch.testing.assert_close(
            other_grad, grad, rtol=torch.finfo(dtype).eps, atol=4 * error * grad.abs().max().item()
        )


def test_order_and_padding_of_the_list(device: str) -> None:
    """Rows of -1 do not count, wherever they stand; any integer dtype; another order of the rows."""
    maps = maps_of().to(device)
    out, grad = with_gradient(maps, TRIPLETS)
    padding = [(-1, -1, -1)]
    for listed in (TRIPLETS + 3 * padding, padding + TRIPLETS[:4] + padding + TRIPLETS[4:], TRIPLETS[::-1]):
        again, other = with_gradient(maps, torch.tensor(listed, dtype=torch.int16, device=device))
        assert again[1:] == out[1:]
        torch.testing.assert_close(again.loss, out.loss, rtol=1e-14, atol=0)
        torch.testing.assert_close(other, grad, rtol=0, atol=1e-14 * grad.abs().max().item())


def test_a_triplet_that_is_listed_twice_counts_twice(device: str) -> None:
    maps = maps_of().to(device)
    listed = [t for t in TRIPLETS if expected_of(maps, [t])[2]]
    once, twice = ot_triplet_loss(maps, torch.tensor(listed, device=device)), torch.tensor(2 * listed, device=device)
    out = ot_triplet_loss(maps, twice)
    assert out.n_active == 2 * once.n_active == 2 * len(listed)
    torch.testing.assert_close(out.loss, once.loss, rtol=1e-14, atol=0)


@pytest.mark.parametrize("count", [0, 1, 2, 6])
@pytest.mark.parametrize("listed", [0, 3])
def test_nothing_active(count: int, listed: int, device: str) -> None:
    """No triplet, padding only, or none that is in the wrong order: exactly 0, and a gradient of zeros."""
    maps = maps_of(count).to(device)
    out, grad = with_gradient(maps, [(-1, -1, -1)] * listed)
    assert (out.loss, out.n_hard, out.n_active) == (0, 0, 0)
    assert out.loss.requires_grad
    assert not out.n_hard.requires_grad
    assert torch.equal(grad, torch.zeros_like(maps))
    if count == 6:
        out, grad = with_gradient(maps, TRIPLETS, beta=-3.0)
        assert (out.loss, out.n_hard, out.n_active) == (0, len(TRIPLETS), 0)
        assert torch.equal(grad, torch.zeros_like(maps))


def test_a_batch_of_one_image_with_itself(device: str) -> None:
    """D(a, a) - D(a, a) is 0, and the hinge is beta."""
    maps = maps_of(1).to(device)
    out, grad = with_gradient(maps, [(0, 0, 0)], beta=0.25)
    assert out.loss == 0.25
    assert torch.equal(grad, torch.zeros_like(maps))
    assert ot_triplet_loss(maps, torch.tensor([[0, 0, 0]], device=device)).n_active == 0


def test_one_cell(device: str) -> None:
    """P = 1: the distance is the cost."""
    maps = random_batch([0] * 4, channels=CHANNELS, side=1).maps.to(device)
    out, grad = with_gradient(maps, [(0, 1, 2), (0, 2, 1), (3, 1, 0)])
    leaf = maps.clone().requires_grad_()
    unit = functional.normalize(leaf.flatten(1))
    cost = 1 - unit @ unit.T
    hinge = functional.relu(torch.stack([cost[0, 1] - cost[0, 2], cost[0, 2] - cost[0, 1], cost[3, 1] - cost[3, 0]]))
    loss = hinge.sum() / (hinge > 0).sum()
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, leaf)[0], rtol=0, atol=1e-13)


def test_no_channels_and_zero_maps(device: str) -> None:
    """Cosine 0 with everything: all distances are 1, the gradient of the zeros is 0."""
    maps = maps_of().to(device)
    maps[0] = 0
    out, grad = with_gradient(maps, [(0, 1, 2), (0, 2, 3)], beta=0.5)
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, 0.5), rtol=0, atol=1e-14)
    assert (grad[0] == 0).all()
    assert grad.isfinite().all()
    out, _ = with_gradient(maps[:, :0], [(0, 1, 2)], beta=0.5)
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, 0.5), rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunk_bytes", [1, 2**25])
def test_work_for_pairs_of_active_triplets_only(
    chunk_bytes: int,
    solved: dict[str, list[int]],  # noqa: F811
    device: str,
) -> None:
    """Forward: each unordered pair once. Backward: those whose distance the loss depends on."""
    maps = maps_of().to(device)
    pairs, needed = set(), dict[tuple[int, int], int]()
    for a, p, n in TRIPLETS:
        positive, negative = (min(a, p), max(a, p)), (min(a, n), max(a, n))
        pairs |= {positive, negative}
        if expected_of(maps, [(a, p, n)])[2]:
            needed[positive] = needed.get(positive, 0) + 1
            needed[negative] = needed.get(negative, 0) - 1
    wanted = sum(count != 0 for count in needed.values())
    assert 0 < wanted < len(pairs)
    leaf = maps.clone().requires_grad_()
    out = ot_triplet_loss(leaf, torch.tensor(TRIPLETS, device=device), chunk_bytes=chunk_bytes)
    room = min(2 * len(TRIPLETS), 6 * 7 // 2)  # on CUDA the host does not know how many there are
    assert sum(solved["sinkhorn_forward"]) == (len(pairs) if device == "cpu" else room)
    solved["sinkhorn_forward"].clear()
    out.loss.backward()
    assert sum(solved["sinkhorn_forward"]) == (wanted if device == "cpu" else room)
    assert sum(solved["sinkhorn_unrolled_backward"]) == (wanted if device == "cpu" else room)
    assert (max(solved["sinkhorn_unrolled_backward"]) == 1) == (chunk_bytes == 1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kept_bytes", [0, 2**26])
def test_chunks_and_kept_costs_do_not_change_the_result(
    kept_bytes: int, metric: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    maps = maps_of().to(device)
    expected, expected_grad = with_gradient(maps, TRIPLETS, metric=metric)
    monkeypatch.setattr(ot_triplet, "KEPT_BYTES", kept_bytes)
    for chunk_bytes in (1, 20_000, 2**25):
        out, grad = with_gradient(maps, TRIPLETS, metric=metric, chunk_bytes=chunk_bytes)
        assert out[1:] == expected[1:]
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12 * expected_grad.abs().max().item())


def test_the_number_of_threads_changes_no_bit(threads: Callable[[int], None]) -> None:
    """For the cosine, whose products are our own."""
    maps = maps_of().float()
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(with_gradient(maps, TRIPLETS))
    for out, grad in results[1:]:
        assert torch.equal(out.loss, results[0][0].loss)
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("metric", METRICS)
def test_working_memory_stays_below_chunk_bytes(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Forward and backward, beside the tables and what is as small as the maps."""
    count, channels, side, chunk_bytes = 24, 128, 4, 2**20
    monkeypatch.setattr(ot_triplet, "KEPT_BYTES", 0)
    p = side**2
    maps = random_batch([0] * count, channels=channels, side=side).maps.float().to(device).requires_grad_()
    every = torch.arange(count, device=device)
    triplets = torch.cartesian_prod(every, every, every)
    pairs = count * (count + 1) // 2
    assert pairs * 4 * p * (channels + 4 * p) > 3 * chunk_bytes  # all of them at once

    def solve() -> OTTripletLossOutput:
        return ot_triplet_loss(maps, triplets, metric=metric, chunk_bytes=chunk_bytes)

    solve().loss.backward()  # the workspace of the matrix products is made once and kept
    maps.grad = None
    # The tables, the results of a pair, the list and what it becomes, and up to six copies of the maps for their norms.
    small = 25 * count**2 + pairs * 8 * (6 * p + 16) + len(triplets) * 120 + 6 * maps.numel() * 4
    out, peak, results = allocations(solve, tmp_path / "forward.json", device)
    assert peak - results < chunk_bytes + small
    _, peak, _ = allocations(out.loss.backward, tmp_path / "backward.json", device)
    assert peak < chunk_bytes + small


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poisoned_maps(poison: float, device: str) -> None:
    """In a map that a triplet names: the loss and the gradient are NaN. In one that none does: nothing changes."""
    maps = maps_of(7).to(device)
    expected, expected_grad = with_gradient(maps, TRIPLETS)
    for spoilt in (6, 2):
        bad = maps.clone()
        bad[spoilt, 3, 1, 2] = poison
        out, grad = with_gradient(bad, TRIPLETS)
        assert out.n_hard == len(TRIPLETS)
        if spoilt == 2:
            assert out.loss.isnan()
            assert grad[2].isnan().any()
        else:
            assert torch.equal(out.loss, expected.loss)
            assert out.n_active == expected.n_active
            assert torch.equal(grad[:6], expected_grad[:6])


def test_gradcheck(device: str) -> None:
    """In float64; no hinge of these is within a difference quotient of 0."""
    maps = random_batch([0] * 5, channels=5, side=2, seed=3).maps.to(device).requires_grad_()
    triplets = torch.tensor([t for t in TRIPLETS if max(t) < 5], device=device)

    def loss(maps: Tensor) -> Tensor:
        return ot_triplet_loss(maps, triplets, beta=0.01, n_iter=4).loss

    # A difference of forward values has 1e-16 / 1e-6 of noise, the step an error of 1e-12.
    assert torch.autograd.gradcheck(loss, [maps], eps=1e-6, atol=1e-8, rtol=1e-6)


def test_scaled_gradient_and_backward_twice(device: str) -> None:
    """As a loss scaler does; what is saved is read, not used up; the second derivative is refused."""
    maps = maps_of().to(device).requires_grad_()
    loss = ot_triplet_loss(maps, torch.tensor(TRIPLETS, device=device)).loss
    (once,) = torch.autograd.grad(loss, maps, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 1024, maps, retain_graph=True)
    assert torch.equal(scaled, 1024 * once)
    (overflown,) = torch.autograd.grad(loss * math.inf, maps, retain_graph=True)
    assert not overflown.isfinite().all()
    (grad,) = torch.autograd.grad(loss, maps, create_graph=True)
    with pytest.raises(RuntimeError, match="ot_triplet_loss"):
        grad.sum().backward()


def test_no_graph_where_none_is_asked_for(device: str) -> None:
    maps = maps_of().to(device)
    triplets = torch.tensor(TRIPLETS, device=device)
    assert not ot_triplet_loss(maps, triplets).loss.requires_grad
    with torch.no_grad():
        assert not ot_triplet_loss(maps.requires_grad_(), triplets).loss.requires_grad


def test_nothing_is_modified(device: str) -> None:
    maps, triplets = maps_of().to(device), torch.tensor(TRIPLETS, device=device)
    before = maps.clone(), triplets.clone()
    with_gradient(maps, triplets)
    assert torch.equal(maps, before[0])
    assert torch.equal(triplets, before[1])
    leaf = maps.requires_grad_()
    loss = ot_triplet_loss(leaf * 1, triplets).loss
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype: torch.dtype, device: str) -> None:
    """No bit changes: costs are computed in float32."""
    maps = maps_of().to(device, dtype)
    plain, expected = with_gradient(maps, TRIPLETS)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, grad = with_gradient(maps, TRIPLETS)
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(grad, expected)


# torch's rules


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("listed", ["all", "padded", "none"])
def test_opcheck(listed: str, keep: bool, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if not keep:
        monkeypatch.setattr(ot_triplet, "KEPT_BYTES", 0)
    maps = maps_of().to(device, torch.float32)
    rows = {"all": TRIPLETS, "padded": [*TRIPLETS, (-1, -1, -1)], "none": []}[listed]
    recorder = Recorder()
    with recorder:
        with_gradient(maps, rows)
    calls = [(op, args) for op, args in recorder.calls if "ot_triplet" in op.name()]
    assert [op.name() for op, _ in calls] == ["otface::ot_triplet_forward", "otface::ot_triplet_backward"]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for op, args in calls:
        # What is kept of pairs that there are not is never written, so two runs cannot be compared.
        compared = [] if keep and op.name().endswith("forward") else ["test_aot_dispatch_dynamic"]
        torch.library.opcheck(op, args, test_utils=utils + compared)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(device: str) -> None:
    """One graph, forward and backward, with the same bits; also for other numbers of triplets, and wrong indices."""

    def loss(maps: Tensor, triplets: Tensor) -> OTTripletLossOutput:
        return ot_triplet_loss(maps.relu(), triplets, beta=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (9, 4, 2):
        triplets = torch.tensor(TRIPLETS[:count], device=device)
        results = []
        for function in (loss, compiled):
            leaf = maps_of().to(device).requires_grad_()
            out = function(leaf, triplets)
            results.append((*(x.detach() for x in out), *torch.autograd.grad(out.loss, leaf)))
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)
    wrong = torch.tensor([*TRIPLETS, (0, 1, 6)], device=device)
    assert compiled(maps_of().to(device), wrong).loss.isnan()


# Wrong arguments

N = 6
GOOD: dict[str, Any] = {"feature_map": torch.rand(N, 4, 2, 2), "triplets": torch.tensor(TRIPLETS)}
POSITIVE = {
    "zero": Case(0.0, ValueError, "got 0.0"),
    "negative": Case(-1.0, ValueError, "got -1.0"),
    "nan": Case(math.nan, ValueError, "got nan"),
    "inf": Case(math.inf, ValueError, "got inf"),
    "bool": Case(True, TypeError, "got True"),
    "string": Case("1", TypeError, "got '1'"),
    "tensor": Case(torch.tensor(1.0), TypeError, "float32 tensor"),
    "none": Case(None, TypeError, "got None"),
}
COUNT = {
    "zero": Case(0, ValueError, "got 0"),
    "float": Case(2.0, TypeError, "got 2.0"),
    "bool": Case(True, TypeError, "got True"),
    "string": Case("1", TypeError, "got '1'"),
}
CASES: dict[str, dict[str, Case]] = {
    "feature_map": {
        "matrix": Case(torch.rand(N, 4), ValueError, "(6, 4)"),
        "five dimensions": Case(torch.rand(N, 4, 2, 2, 1), ValueError, "(6, 4, 2, 2, 1)"),
        "no cells": Case(torch.rand(N, 4, 0, 2), ValueError, "(6, 4, 0, 2)"),
        "no points": Case(torch.rand(N, 0, 4), ValueError, "(6, 0, 4)"),
        "int": Case(torch.ones(N, 4, 4, dtype=torch.int64), TypeError, "int64"),
        "complex": Case(torch.ones(N, 4, 4, dtype=torch.complex64), TypeError, "complex64"),
        "sparse": Case(torch.ones(N, 4, 4).to_sparse(), TypeError, "dense"),
        "array": Case(np.ones((N, 4, 4)), TypeError, "ndarray"),
        "none": Case(None, TypeError, "got None"),
        "other device": Case(meta(N, 4, 4), ValueError, "meta"),
    },
    "triplets": {
        "vector": Case(torch.tensor([0, 1, 2]), ValueError, "(3,)"),
        "pairs": Case(torch.tensor([[0, 1]]), ValueError, "(1, 2)"),
        "float": Case(torch.zeros(2, 3), TypeError, "float32"),
        "bool": Case(torch.zeros(2, 3, dtype=torch.bool), TypeError, "bool"),
        "complex": Case(torch.zeros(2, 3, dtype=torch.complex64), TypeError, "complex64"),
        "sparse": Case(torch.ones(2, 3, dtype=torch.int64).to_sparse(), TypeError, "dense"),
        "list": Case([(0, 1, 2)], TypeError, "list"),
        "none": Case(None, TypeError, "got None"),
        "too large": Case(torch.tensor([[0, 1, 2], [0, 1, 6]]), ValueError, "got [0, 1, 6] in row 1"),
        "negative": Case(torch.tensor([[0, 1, 2], [-2, -2, -2]]), ValueError, "got [-2, -2, -2] in row 1"),
        "partly -1": Case(torch.tensor([[0, 1, -1]]), ValueError, "got [0, 1, -1] in row 0"),
        "other device": Case(meta(2, 3, dtype=torch.int64), ValueError, "meta"),
    },
    "eps": POSITIVE,
    "n_iter": COUNT | {"none": Case(None, TypeError, "got None")},
    "beta": {name: case for name, case in POSITIVE.items() if name not in ("zero", "negative")},
    "metric": {
        "unknown": Case("manhattan", ValueError, "got 'manhattan'"),
        "none": Case(None, ValueError, "got None"),
    },
    "chunk_bytes": COUNT,
}


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{kind}") for name, some in CASES.items() for kind, case in some.items()],
)
def test_refused(name: str, case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTFACE_CHECK", "1")
    arguments = GOOD | {name: case.value}
    with refused(case.error, "ot_triplet_loss", name, case.came):
        ot_triplet_loss(**{key: to(value, device) for key, value in arguments.items()})


def test_every_argument_has_its_cases() -> None:
    assert CASES.keys() == inspect.signature(otface_cuda.ot_triplet_loss).parameters.keys()
    assert torch.equal(ot_triplet_loss(**GOOD).n_hard, torch.tensor(len(TRIPLETS)))
