"""Costs, eps and masses of every size that a dtype has: the results of the same problem at an ordinary size, scaled by
powers of two, or NaN where a bound is documented.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import otface_cuda

from .problems import has_cuda_kernels, random_problem

FLOATS = [torch.float32, torch.float64]
MODES = ["envelope", "unrolled", "implicit"]
# Exponents of 2: about the least normal numbers, below them, and up to the largest.
COSTS = {torch.float32: [-138, -126, -110, 100, 124], torch.float64: [-1050, -1022, -1000, 1000, 1020]}
MASSES = {torch.float32: [-136, -126, -70, 70, 124], torch.float64: [-1050, -1022, -520, 520, 1018]}
# Kernels on CUDA have no solution for an eps or a mass beyond these.
LEAST_EPS = {torch.float32: -120, torch.float64: -1016}
MOST_MASS = {torch.float32: 64, torch.float64: 512}


def times_power(x: Tensor, exponent: int) -> Tensor:
    """x 2^exponent in float64, in steps of which none is rounded unless the result has to be."""
    x = x.double()
    for step in (exponent // 2, exponent - exponent // 2):
        x = x * 2.0**step
    return x


class Results(NamedTuple):
    value: Tensor
    transport_cost: Tensor
    f: Tensor
    g: Tensor
    plan: Tensor
    grad_cost: Tensor
    grad_a: Tensor
    grad_b: Tensor


def solve(inputs: list[Tensor], eps: float, mode: str, of: str, iterations: int = 40) -> Results:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = otface_cuda.sinkhorn(leaves[0], eps, *leaves[1:], max_iter=iterations, grad=mode, return_plan=True)
    result = getattr(out, of)
    weights = torch.linspace(0.1, 1, result.numel(), dtype=torch.float64, device=result.device).square()
    result.backward(weights.reshape(result.shape).to(result.dtype))
    grads = [x.grad for x in leaves]
    # Those of the weights along directions that keep the masses equal.
    grads[1:] = [x.double() - x.double().mean(-1, keepdim=True) for x in grads[1:]]
    return Results(out.value, out.transport_cost, out.f, out.g, out.plan, *grads)


def check(dtype: torch.dtype, of_cost: int, of_mass: int, eps: float, mode: str, of: str, device: str) -> None:
    problem = random_problem(2, 6, 7, seed=1, dtype=torch.float64)
    given = [times_power(x, k).to(dtype) for x, k in zip(problem, (of_cost, of_mass, of_mass), strict=True)]
    # What was rounded on the way to a subnormal number is part of the problem.
    ordinary = [times_power(x, -k) for x, k in zip(given, (of_cost, of_mass, of_mass), strict=True)]
    out = solve([x.to(device) for x in given], math.ldexp(eps, of_cost), mode, of)
    ref = solve(ordinary, eps, mode, of)
    # f + g grows by -eps log of the mass, each by a half, and so does the value, times the mass.
    shift = -eps * of_mass * math.log(2)
    ref = ref._replace(value=ref.value + shift * ordinary[1].sum(1), f=ref.f + shift / 2, g=ref.g + shift / 2)
    of_loss = {"value": of_cost + of_mass, "transport_cost": of_cost + of_mass, "plan": of_mass, "f": of_cost}[of]
    scales = Results(
        of_cost + of_mass, of_cost + of_mass, of_cost, of_cost, of_mass, of_loss - of_cost, *[of_loss - of_mass] * 2
    )  # type: ignore[arg-type]
    # Exponents go up to 1 / eps and are rounded with the costs, and with the potentials at their size, of eps times
    # a logarithm of the mass; 40 iterations add up a few of these. A subnormal result is as precise as the least one.
    # The gradients read potentials that are kept in float64, where they may be subnormal.
    kept = math.ldexp(8 / eps, -1074 - of_cost)
    solved = {"implicit": 1e-4 if dtype == torch.float32 else 1e-8}.get(mode, 0.0)  # its residual, times a condition
    u, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, x, y, scale in zip(Results._fields, out, ref, scales, strict=True):
        expected = times_power(y, scale).to(x.dtype)
        largest = expected.abs().max().item()
        assert torch.equal(x.cpu().isfinite(), expected.isfinite()), name
        relative = 64 * u * (1 + abs(shift)) / min(1, eps) + solved + kept
        atol = relative * largest + 4 * least if math.isfinite(largest) else 0
        torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.instruction_set
@pytest.mark.parametrize("of", ["value", "transport_cost", "f"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eps", [0.5, 0.0625])  # subnormal ones too are exact
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_costs(dtype: torch.dtype, place: int, eps: float, mode: str, of: str, device: str) -> None:
    if mode == "envelope" and of != "value":
        pytest.skip("has no such gradient")
    exponent = COSTS[dtype][place]
    if has_cuda_kernels(device) and math.log2(eps) + exponent < LEAST_EPS[dtype]:
        check_no_solution(dtype, exponent, 0, eps, device)
    else:
        check(dtype, exponent, 0, eps, mode, of, device)


@pytest.mark.instruction_set
@pytest.mark.parametrize("of", ["value", "transport_cost", "plan"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("eps", [0.5, 0.0625])  # subnormal ones too are exact
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masses(dtype: torch.dtype, place: int, eps: float, mode: str, of: str, device: str) -> None:
    if mode == "envelope" and of != "value":
        pytest.skip("has no such gradient")
    exponent = MASSES[dtype][place]
    if has_cuda_kernels(device):  # a mass of 1 before it is scaled
        check_no_solution(dtype, 0, exponent, eps, device)
    else:
        check(dtype, 0, exponent, eps, mode, of, device)


def check_no_solution(dtype: torch.dtype, of_cost: int, of_mass: int, eps: float, device: str) -> None:
    problem = random_problem(2, 6, 7, seed=1, dtype=torch.float64)
    scales = (of_cost, of_mass, of_mass)
    given = [times_power(x, k).to(dtype).to(device) for x, k in zip(problem, scales, strict=True)]
    out = otface_cuda.sinkhorn(given[0], math.ldexp(eps, of_cost), *given[1:], return_plan=True)
    assert all(x.isnan().all() for x in (out.value, out.transport_cost, out.f, out.g, out.plan, out.error))
    assert not out.converged.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_eps_and_mass_extreme_at_once(dtype: torch.dtype, device: str) -> None:
    check_no_solution(dtype, COSTS[dtype][0], MASSES[dtype][0], 0.5, device)


@pytest.mark.instruction_set
@pytest.mark.parametrize("scale", [1e25, 1e31, 1e38])
def test_transport_cost_of_large_costs(scale: float, device: str) -> None:
    """At a small eps, sums of unscaled rows leave the range of float32 long before the answer does."""
    cost = random_problem(3, 20, 20, seed=2, dtype=torch.float32).cost * scale
    out = otface_cuda.sinkhorn(cost.to(device), 2e-3 * scale, max_iter=300)
    ordinary = otface_cuda.sinkhorn(cost.double() / scale, 2e-3, max_iter=300)
    # The exponents, of up to 1 / eps = 500, are rounded to 2^-24 of themselves.
    rtol = 500 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out.transport_cost.double().cpu() / scale, ordinary.transport_cost, rtol=rtol, atol=0)


def test_a_cost_that_is_too_large_beside_the_least_eps(device: str) -> None:
    """Below eps = 2^-120 float32 costs are multiplied by 2^64, so that there is no solution with one above 2^64."""
    cost = torch.tensor([[0.0, 1e20], [1.0, 0.0]], device=device)
    assert otface_cuda.sinkhorn(cost, 1e-40).value.isnan()
    assert otface_cuda.sinkhorn(cost, 1e-30).value.isfinite()
