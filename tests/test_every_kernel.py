"""A small problem for every kernel, with every feature at once. On a GPU, tools/gpu_check.sh runs these under the four
tools of compute-sanitizer, which are slow: what is tested here is memory as much as results.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import otface_cuda

from .problems import output_dtype, random_problem

# At and around the limits between the tiers, in both directions. The last three are large for a GPU's shared memory.
SIZES = [(1, 1), (7, 16), (17, 16), (48, 49), (64, 64), (65, 40), (90, 130), (300, 257), (16, 4000), (4000, 3)]
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}  # relative to the largest entry; the problems are well-behaved

pytestmark = pytest.mark.sanitize


def results(cost: Tensor, leaves: list[Tensor], eps: Tensor, grad: str, **options) -> list[Tensor]:
    """All outputs, and the gradients of a mixture of those that have one."""
    a, b = leaves[1:] or (None, None)
    out = otface_cuda.sinkhorn(cost, eps, a, b, grad=grad, return_plan=True, max_iter=30, **options)
    mixture = out.value.sum()
    if grad != "envelope":
        generator = torch.Generator().manual_seed(7)
        for x in (out.transport_cost, out.plan, out.f, out.g):
            weights = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
            mixture = mixture + (weights * x).sum()
    gradients = torch.autograd.grad(mixture, leaves)
    return [x.detach() for x in (out.value, out.transport_cost, out.plan, out.f, out.g, out.error, *gradients)]


def compare(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for x, y in zip(actual, expected, strict=True):
        scale = max(1e-3, float(y.nan_to_num().abs().max()))
        rounding = max(TOLERANCE[output_dtype(dtype)], 2 * torch.finfo(x.dtype).eps)  # a half type has half gradients
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=rounding * scale, equal_nan=True)


@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_zeros_infinities_strides_and_eps(
    dtype: torch.dtype, size: tuple[int, int], grad: str, device: str
) -> None:
    """Three problems, one of them spoilt by a NaN; the cost is transposed, so that no row of it is contiguous."""
    n, m = size
    cost, a, b = random_problem(3, n, m, seed=n + m, dtype=dtype, zero_weights=True)
    if min(n, m) > 2:
        cost[0, 0, 0] = float("inf")
    cost[1, n // 2, m // 2] = float("nan")

    def solve(where: str, real: torch.dtype, weights: torch.dtype) -> list[Tensor]:
        strided = cost.to(where, real).mT.contiguous().mT
        leaves = [x.requires_grad_() for x in (strided, a.to(where, weights), b.to(where, weights))]
        return results(strided, leaves, torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64, device=where), grad)

    actual = solve(device, dtype, a.dtype)
    compare(actual, solve("cpu", torch.float64, torch.float64), dtype)
    assert actual[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("grad", ["envelope", "unrolled", "implicit"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ragged_warm_and_early(dtype: torch.dtype, size: tuple[int, int], grad: str, device: str) -> None:
    """Sizes of their own, a warm start, one problem that may stop at once, and padding that holds NaN."""
    n, m = size
    cost = random_problem(3, n, m, seed=n * m, dtype=dtype).cost
    lengths = torch.tensor([n, (n + 1) // 2, 1]), torch.tensor([(m + 1) // 2, m, 1])
    rows, cols = (torch.arange(k) < length[:, None] for k, length in zip(size, lengths, strict=True))
    cost[~(rows[:, :, None] & cols[:, None, :])] = float("nan")
    start = 0.01 * torch.arange(m, dtype=torch.float64).expand(3, m)
    tol = torch.tensor([0.0, 2.0 if grad != "implicit" else 0.0, 0.0], dtype=torch.float64)

    def solve(where: str, real: torch.dtype) -> list[Tensor]:
        leaf = cost.to(where, real).requires_grad_()
        g = start.to(where, output_dtype(real))
        return results(
            leaf,
            [leaf],
            torch.full((3,), 0.4, dtype=torch.float64, device=where),
            grad,
            init=(None, g),
            tol=tol.to(where),
            row_lengths=lengths[0].to(where),
            col_lengths=lengths[1].to(where),
        )

    compare(solve(device, dtype), solve("cpu", torch.float64), dtype)


def test_pairs_that_share_points(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 9, 16, generator=generator)
    pairs = torch.tensor([[0, 1], [1, 0], [2, 3], [0, 1], [4, 4], [5, 0]])

    def solve(where: str, real: torch.dtype) -> list[Tensor]:
        leaf = features.to(where, real).requires_grad_()
        out = otface_cuda.sinkhorn_pairs(leaf, pairs.to(where), eps=0.5, max_iter=10, grad="unrolled")
        (gradient,) = torch.autograd.grad(out.transport_cost.sum(), leaf)
        return [out.transport_cost.detach(), gradient]

    compare(solve(device, torch.float32), solve("cpu", torch.float64), torch.float32)
