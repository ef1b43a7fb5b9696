"""On the CPU the cosines of listed pairs come from one product for each first set: what comes out is what copies of the
point sets of each pair give.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from otface_cuda import SinkhornOutput, sinkhorn_pairs
from otface_cuda import pairs as pairs_module
from otface_cuda.pair_costs import GatheredCosts

from .test_points_pairs import cotangents, every_mode, gradients, points_of_pairs, random_features, tolerance_of_points


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """The operations here are small."""
    threads(1)


def all_pairs(count: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(count), torch.arange(count))


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 2**25])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 11])
def test_rows_are_gathered_pairs(count: int, share: float, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients. In float64: the same products, summed in another order."""
    features = random_features(count, 7, 5, seed=51)
    pairs = all_pairs(count)[torch.rand(count**2, generator=torch.Generator().manual_seed(52)) < share]
    made = []

    def gathered(*args: Any) -> GatheredCosts:
        made.append("gathered")
        return GatheredCosts(*args, "cosine")

    results = []
    for by_row in (True, False):
        if not by_row:
            monkeypatch.setattr(pairs_module, "RowCosts", gathered)
        leaf = features.clone().requires_grad_()
        out = sinkhorn_pairs(leaf, pairs, 0.5, max_iter=20, grad="unrolled", chunk_bytes=chunk_bytes)
        loss = sum((x * y).sum() for x, y in zip(out[:4], cotangents(list(out[:4])), strict=True))
        results.append((out, *torch.autograd.grad(loss, leaf)))
    assert bool(made) == (len(pairs) > 0)
    (out, grad), (expected, expected_grad) = results
    for name in ("value", "transport_cost", "f", "g"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=0, atol=1e-13)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_rows_of_float32() -> None:
    """Against the costs of the same points in float64, with the tolerance that copies of the points have."""
    features = random_features(6, 9, 70, seed=53, dtype=torch.float32)
    pairs = all_pairs(6)
    out = sinkhorn_pairs(features, pairs, 0.1, max_iter=20)
    expected = points_of_pairs(features.double(), pairs, 0.1, max_iter=20)
    tol = tolerance_of_points(features, features, "cosine", 0.1, 20, "cpu")
    torch.testing.assert_close(out.f.double(), expected.f, rtol=0, atol=tol.potential)
    torch.testing.assert_close(out.transport_cost.double(), expected.transport_cost, rtol=0, atol=2 * tol.plan)


@every_mode
def test_a_pair_with_two_settings_in_a_full_table(mode: str, device: str) -> None:
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


def test_poisoned_features_stay_alone_in_a_full_table(device: str) -> None:
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
    """Nobody looks at them there: NaN for their own pairs, in a full table too."""
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
