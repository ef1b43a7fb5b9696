"""The same problems solved by POT, an implementation that shares nothing with ours, in float64 on the CPU."""

from __future__ import annotations

import math
import warnings

import ot
import ot.batch
import pytest
import torch
from torch import Tensor

import otface_cuda

from .problems import Problem, Tolerance, one_thread, random_problem, tolerance

DTYPES = [torch.float64, torch.float32]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def centred(f: Tensor, a: Tensor) -> Tensor:
    """A potential up to its shift; where the weight is zero POT has none."""
    f = torch.where(a > 0, f, 0.0)
    return torch.where(a > 0, f - (a * f).sum(-1, keepdim=True) / a.sum(-1, keepdim=True), 0.0)


def converged_tolerance(problem: Problem, eps: float, n_iter: int, device: str = "cpu") -> Tolerance:
    """The tolerance of two solvers that both stopped near the fixed point, POT after `n_iter` iterations at 1e-13.

    1e-13 is exp(-30), so an iteration shrinks an error by exp(-30 / n_iter), and about n_iter / 30 iterations count:
    their rounding errors add up, and so do the steps still to come, each about POT's last one, which is at most
    1e-13 / (smallest weight) in a scaling.
    """
    counted = max(1, math.ceil(n_iter / 30))
    rounding = tolerance(problem.cost.dtype, eps, *problem.cost.shape[1:], n_iter=counted, device=device)
    smallest = min(w[w > 0].min().item() / w.sum().item() for w in (problem.a, problem.b))
    potential = rounding.potential + counted * eps * 1e-13 / smallest
    return Tolerance(potential, 3 * potential / eps)


def assert_same_plan_and_potentials(
    out: otface_cuda.SinkhornOutput,
    plan: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    problem: Problem,
    eps: float,
    tol: Tolerance,
) -> None:
    """POT's potentials are log-scalings: plan = exp(log_u + log_v - C / eps), so f = eps (log_u - log a)."""
    for ours, log_scaling, weights in ((out.f, log_u, problem.a.double()), (out.g, log_v, problem.b.double())):
        expected = centred(eps * (log_scaling - weights.log()), weights)
        # The shift is an average of potentials, so it doubles their error at most.
        torch.testing.assert_close(centred(ours.double().cpu(), weights), expected, rtol=0, atol=2 * tol.potential)
    assert out.plan is not None
    # An entry smaller than the largest one by 1e-20 may be lost: the exponentials of float32 underflow.
    torch.testing.assert_close(out.plan.double().cpu(), plan, rtol=tol.plan, atol=1e-20 * plan.max().item())
    # Every entry has the relative error of the plan, and no cost is above 1.
    cost = (plan * problem.cost.double()).sum((1, 2))
    torch.testing.assert_close(out.transport_cost.double().cpu(), cost, rtol=tol.plan, atol=0)


def assert_same_value(out: otface_cuda.SinkhornOutput, plan: Tensor, problem: Problem, eps: float, n_iter: int) -> None:
    """At convergence <a, f> + <b, g> is the primal objective of POT's plan."""
    tol = converged_tolerance(problem, eps, n_iter, out.value.device.type)
    cost, a, b = (x.double() for x in problem)
    relative_entropy = torch.xlogy(plan, plan / (a[:, :, None] * b[:, None, :])).nan_to_num().sum((1, 2))
    value = (plan * cost).sum((1, 2)) + eps * relative_entropy
    # Ours is two averages of potentials, times the mass; POT's has the relative error of its float64 plan.
    pot = converged_tolerance(problem._replace(cost=cost), eps, n_iter).plan
    atol = a.sum(1).max().item() * (2 * tol.potential + pot)
    torch.testing.assert_close(out.value.double().cpu(), value, rtol=0, atol=atol)


# eps is a fraction of the range of the cost; the smaller it is, the more iterations convergence takes.
CONVERGING = [
    (1, 1, 1e-3),
    (1, 10, 1e-3),
    (10, 1, 1e-3),
    (8, 12, 1e-3),
    (12, 8, 1e-2),
    (20, 30, 1e-2),
    (100, 37, 1e-2),
    (49, 49, 0.1),
    (300, 200, 0.1),
    (1, 1000, 0.1),
    (1000, 2, 0.1),
    (1000, 1000, 0.1),
    (64, 64, 1.0),
    (49, 49, 10.0),
    (300, 200, 10.0),
]


@pytest.mark.parametrize(("mass", "zero_weights"), [(1.0, False), (3.0, True)], ids=["plain", "mass 3, zero weights"])
@pytest.mark.parametrize(("n", "m", "eps"), CONVERGING)
def test_at_convergence(
    n: int, m: int, eps: float, mass: float, zero_weights: bool, dtype: torch.dtype, device: str
) -> None:
    problem = random_problem(1, n, m, seed=n + m, dtype=dtype, mass=mass, zero_weights=zero_weights)
    cost, a, b = (x[0].double() for x in problem)
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("error")  # POT warns if it did not converge
        plan, log = ot.sinkhorn(
            a, b, cost, eps, method="sinkhorn_log", stopThr=1e-13 * mass, numItermax=20_000, log=True
        )
    # POT has converged after log["niter"] iterations, so have we after some more.
    out = problem.to(device).solve(eps, max_iter=log["niter"] + 20, return_plan=True)
    tol = converged_tolerance(problem, eps, log["niter"], device)
    assert_same_plan_and_potentials(out, plan[None], log["log_u"][None], log["log_v"][None], problem, eps, tol)
    assert_same_value(out, plan[None], problem, eps, log["niter"])


@pytest.mark.parametrize(("n", "m", "eps"), [(8, 12, 1e-2), (49, 49, 0.1), (30, 70, 1.0)])
def test_batch_at_convergence(n: int, m: int, eps: float, dtype: torch.dtype, device: str) -> None:
    problem = random_problem(3, n, m, seed=1, dtype=dtype)
    cost, a, b = (x.double() for x in problem)
    with one_thread():
        pot = ot.batch.solve_batch(cost, eps, a, b, max_iter=20_000, tol=1e-13, method="log_sinkhorn", grad="detach")
    assert pot.log["n_iter"] < 19_999
    out = problem.to(device).solve(eps, max_iter=pot.log["n_iter"] + 20, return_plan=True)
    tol = converged_tolerance(problem, eps, pot.log["n_iter"], device)
    assert_same_plan_and_potentials(out, pot.plan, *pot.potentials, problem, eps, tol)
    assert_same_value(out, pot.plan, problem, eps, pot.log["n_iter"])


FINITE = [(1, 1), (3, 5), (49, 49), (130, 70), (1, 1000), (1000, 1000)]


@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("n", "m"), FINITE)
def test_after_ten_iterations(n: int, m: int, eps: float, dtype: torch.dtype, device: str) -> None:
    """POT starts from log_v = 0, we from g = 0, that is log_v = log b: for a uniform b the same up to a shift."""
    problem = random_problem(1 if n * m > 10_000 else 3, n, m, seed=2, dtype=dtype)
    problem = problem._replace(b=torch.full_like(problem.b, 1 / m))
    cost, a, b = (x.double() for x in problem)
    pot = ot.batch.solve_batch(cost, eps, a, b / b.sum(1, keepdim=True), max_iter=10, tol=0.0, grad="detach")
    out = problem.to(device).solve(eps, max_iter=10, return_plan=True)
    assert all(x.isfinite().all() for x in out)
    tol = tolerance(dtype, eps, *problem.cost.shape[1:], n_iter=10, device=device)
    assert_same_plan_and_potentials(out, pot.plan, *pot.potentials, problem, eps, tol)


@pytest.mark.parametrize("eps", [1e-3, 0.05, 10.0])
def test_after_ten_iterations_from_pots_start(eps: float, dtype: torch.dtype, device: str) -> None:
    """With uneven weights the warm start g = -eps log b is POT's start."""
    problem = random_problem(2, 40, 25, seed=3, dtype=dtype, mass=2.0)
    cost, a, b = (x.double() for x in problem)
    pot = ot.batch.solve_batch(cost, eps, a, b, max_iter=10, tol=0.0, grad="detach")
    init = (torch.zeros_like(problem.a).to(device), (-eps * problem.b.log()).to(device))
    out = problem.to(device).solve(eps, max_iter=10, init=init, return_plan=True)
    tol = tolerance(dtype, eps, *problem.cost.shape[1:], n_iter=10, device=device)
    assert_same_plan_and_potentials(out, pot.plan, *pot.potentials, problem, eps, tol)


@pytest.mark.parametrize("mass", [1.0, 5.0])
def test_unregularised_limit(mass: float, device: str) -> None:
    """As eps goes to 0 the value goes to that of the linear program, from above, by less than eps times an entropy.

    With P the plan of the linear program, OT_0 <= OT_eps <= OT_0 + eps KL(P | a b^T / W), and the divergence is at most
    the smaller entropy of the two marginals, times W for mass W. (Our relative entropy is to a b^T, not a b^T / W: the
    value is lower by eps W log W.)
    """
    problem = random_problem(1, 9, 14, seed=4, mass=mass)
    cost, a, b = (x[0] for x in problem)
    exact = ot.emd2(a, b, cost).item()
    entropy = mass * min(-(w / mass * (w / mass).log()).sum().item() for w in (a, b))
    gaps = []
    for eps in (0.3, 0.1, 0.03, 0.01):
        out = problem.to(device).solve(eps, max_iter=4000)
        assert out.error.item() < 1e-8
        slack = mass * 1e-8 * 2  # what the row error can move, as potentials and costs are of size 1
        value = out.value.item() + eps * mass * math.log(mass)
        assert exact - slack <= value <= exact + eps * entropy + slack
        assert exact - slack <= out.transport_cost.item() <= value + slack
        gaps.append(value - exact)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0] / 10
