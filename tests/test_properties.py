"""What holds for every problem: laws of optimal transport, and bits that may not depend on how a problem is posed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

import otface_cuda

from .problems import Problem, gradient_rtol, has_cuda_kernels, random_problem, tolerance

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)
# Half of them so small that convergence is out of reach and potentials are absorbed again and again.
EPS = st.sampled_from([1e-3, 1e-2, 0.05, 0.3, 2.0, 10.0])
DTYPES = st.sampled_from([torch.float64, torch.float32])


@st.composite
def problems(draw: st.DrawFn, batch: int = 1, **options: Any) -> Problem:
    options.setdefault("zero_weights", draw(st.booleans()))
    options.setdefault("dtype", draw(DTYPES))
    return random_problem(batch, draw(SIZES), draw(SIZES), seed=draw(SEEDS), **options)


@st.composite
def converging_problems(draw: st.DrawFn) -> tuple[Problem, float]:
    """Costs that differ by at most eps: a step shrinks the error by tanh(1/4)^2 < 0.06 at least (Birkhoff)."""
    return draw(problems(dtype=torch.float64)), draw(st.sampled_from([1.0, 3.0, 10.0]))


CONVERGED = 40  # 0.06^40 is nothing


def close(x: Tensor, y: Tensor, atol: float) -> None:
    torch.testing.assert_close(x.double().cpu(), y.double().cpu(), rtol=0, atol=atol)


def same_bits(xs: Any, ys: Any) -> None:
    for x, y in zip(xs, ys, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


class TestLaws:
    @given(problem=problems(), eps=EPS)
    def test_column_marginals_are_exact_and_error_is_that_of_the_rows(
        self, problem: Problem, eps: float, device: str
    ) -> None:
        cost, a, b = problem.to(device)
        out = otface_cuda.sinkhorn(cost, eps, a, b, max_iter=7, return_plan=True)
        tol = tolerance(cost.dtype, eps, *cost.shape[1:], n_iter=7, device=device).plan
        close(out.plan.sum(1), b, tol)
        close((out.plan.sum(2) - a).abs().sum(1), out.error, 2 * tol)
        assert (out.plan >= 0).all()

    @given(converging=converging_problems())
    def test_row_marginals_at_convergence(self, converging: tuple[Problem, float], device: str) -> None:
        problem, eps = converging
        cost, a, b = problem.to(device)
        out = otface_cuda.sinkhorn(cost, eps, a, b, max_iter=CONVERGED, return_plan=True)
        close(out.plan.sum(2), a, tolerance(cost.dtype, eps, *cost.shape[1:], n_iter=CONVERGED, device=device).plan)

    @given(problem=problems(), eps=EPS)
    def test_row_shift_of_the_cost_moves_f_alone(self, problem: Problem, eps: float, device: str) -> None:
        """C_ij + s_i gives f_i + s_i at every iteration: the first half-step takes it up."""
        shift = torch.linspace(-1, 1, problem.cost.shape[1], dtype=problem.cost.dtype)
        shifted = problem._replace(cost=problem.cost + shift[:, None]).to(device)
        x = problem.to(device).solve(eps, max_iter=5, return_plan=True)
        y = shifted.solve(eps, max_iter=5, return_plan=True)
        tol = tolerance(problem.cost.dtype, eps, *problem.cost.shape[1:], n_iter=5, span=2.0, device=device)
        # Adding the shift has already rounded the cost, once more than the tolerance of one solve knows.
        moved = (problem.a * shift).sum(1, keepdim=True).to(device) / 2
        close(y.f - shift.to(device), x.f - moved, 3 * tol.potential)
        close(y.g, x.g + moved, 3 * tol.potential)
        close(y.plan, x.plan, 3 * tol.plan)

    @given(converging=converging_problems())
    def test_column_shift_of_the_cost_moves_g_at_convergence(
        self, converging: tuple[Problem, float], device: str
    ) -> None:
        problem, eps = converging
        shift = torch.linspace(-1, 1, problem.cost.shape[2], dtype=torch.float64)
        shifted = problem._replace(cost=problem.cost + shift).to(device)
        x = problem.to(device).solve(eps, max_iter=CONVERGED, return_plan=True)
        y = shifted.solve(eps, max_iter=CONVERGED + 20, return_plan=True)
        tol = tolerance(torch.float64, eps, *problem.cost.shape[1:], n_iter=CONVERGED, span=2.0, device=device)
        moved = (problem.b * shift).sum(1, keepdim=True).to(device) / 2
        close(y.g - shift.to(device), x.g - moved, 3 * tol.potential)
        close(y.f, x.f + moved, 3 * tol.potential)
        close(y.plan, x.plan, 3 * tol.plan)

    @given(converging=converging_problems())
    def test_transposition_at_convergence(self, converging: tuple[Problem, float], device: str) -> None:
        problem, eps = converging
        cost, a, b = problem.to(device)
        x = otface_cuda.sinkhorn(cost, eps, a, b, max_iter=CONVERGED, return_plan=True)
        y = otface_cuda.sinkhorn(cost.mT, eps, b, a, max_iter=CONVERGED, return_plan=True)
        tol = tolerance(torch.float64, eps, *cost.shape[1:], n_iter=CONVERGED, device=device)
        close(y.f, x.g, 2 * tol.potential)
        close(y.g, x.f, 2 * tol.potential)
        close(y.plan, x.plan.mT, 2 * tol.plan)
        close(y.value, x.value, 4 * tol.potential)

    @given(problem=problems(), eps=EPS, scale=st.sampled_from([2.0**-20, 0.25, 8.0, 2.0**30]))
    def test_scaling_cost_and_eps_together(self, problem: Problem, eps: float, scale: float, device: str) -> None:
        """Only C / eps enters. A scale of a power of 2 does not even round."""
        x = problem.to(device).solve(eps, max_iter=9, return_plan=True)
        y = problem._replace(cost=problem.cost * scale).to(device).solve(eps * scale, max_iter=9, return_plan=True)
        tol = tolerance(problem.cost.dtype, eps, *problem.cost.shape[1:], n_iter=9, device=device)
        close(y.f / scale, x.f, tol.potential)
        close(y.g / scale, x.g, tol.potential)
        close(y.value / scale, x.value, 2 * tol.potential)
        close(y.plan, x.plan, tol.plan)

    @given(problem=problems(), eps=EPS, seed=SEEDS)
    def test_permutation(self, problem: Problem, eps: float, seed: int, device: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows, cols = (torch.randperm(size, generator=generator) for size in problem.cost.shape[1:])
        cost, a, b = problem
        permuted = Problem(cost[:, rows][:, :, cols], a[:, rows], b[:, cols]).to(device)
        x = problem.to(device).solve(eps, max_iter=6, return_plan=True)
        y = permuted.solve(eps, max_iter=6, return_plan=True)
        tol = tolerance(cost.dtype, eps, *cost.shape[1:], n_iter=6, device=device)
        close(y.f, x.f[:, rows], 2 * tol.potential)
        close(y.g, x.g[:, cols], 2 * tol.potential)
        close(y.plan, x.plan[:, rows][:, :, cols], 2 * tol.plan)

    @given(problem=problems(), eps=EPS, mass=st.sampled_from([1e-6, 0.5, 7.0, 1e6]))
    def test_mass(self, problem: Problem, eps: float, mass: float, device: str) -> None:
        """Mass W instead of 1: the plan is W times as large, and (2) then takes eps log W off f + g."""
        cost, a, b = problem.to(device)
        x = otface_cuda.sinkhorn(cost, eps, a, b, max_iter=6, return_plan=True)
        y = otface_cuda.sinkhorn(cost, eps, mass * a, mass * b, max_iter=6, return_plan=True)
        logarithm = eps * math.log(mass)
        tol = tolerance(cost.dtype, eps, *cost.shape[1:], n_iter=6, span=1.0 + abs(logarithm), device=device)
        close(y.f, x.f - logarithm / 2, 2 * tol.potential)
        close(y.g, x.g - logarithm / 2, 2 * tol.potential)
        close(y.plan / mass, x.plan, 2 * tol.plan)
        close(y.transport_cost / mass, x.transport_cost, 2 * tol.plan)
        close(y.error, x.error, 4 * tol.plan)

    @given(problem=problems(zero_weights=False), eps=EPS)
    def test_dual_value_grows(self, problem: Problem, eps: float, device: str) -> None:
        """Each iteration maximises the dual over f, then over g."""
        values = [problem.to(device).solve(eps, max_iter=t).value.item() for t in range(1, 8)]
        tol = tolerance(problem.cost.dtype, eps, *problem.cost.shape[1:], n_iter=8, device=device).potential
        assert all(y >= x - 4 * tol for x, y in itertools.pairwise(values))


MODES = ["envelope", "unrolled", "implicit"]


def solve_and_differentiate(problem: Problem, grad: str, eps: float = 0.3, **options: Any) -> list[Tensor]:
    """All outputs, and the gradients of cost, a and b for a fixed combination of the outputs that have one."""
    leaves = [x.detach().clone().requires_grad_() for x in problem]
    out = otface_cuda.sinkhorn(leaves[0], eps, *leaves[1:], grad=grad, return_plan=True, **options)
    loss = out.value.sum()
    if grad != "envelope":
        weights = torch.arange(1, out.f.shape[-1] + 1, dtype=out.f.dtype, device=out.f.device)
        loss = loss + out.transport_cost.sum() + (out.f * weights).sum() + out.plan.square().sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [x.detach() for x in out] + list(gradients)


# The second is large enough to be split by rows, whatever the number of threads.
SHAPES = [(5, 30, 20), (1, 900, 800), (3, 760, 700)]


class TestBits:
    """One tier, one order of summation: the bits of a problem are its own."""

    @pytest.mark.parametrize("grad", MODES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_two_runs(self, shape: tuple[int, int, int], dtype: torch.dtype, grad: str, device: str) -> None:
        problem = random_problem(*shape, dtype=dtype, device=device)
        same_bits(*(solve_and_differentiate(problem, grad, max_iter=20) for _ in range(2)))

    @pytest.mark.parametrize("grad", MODES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_number_of_threads(
        self, shape: tuple[int, int, int], dtype: torch.dtype, grad: str, threads: Callable[[int], None]
    ) -> None:
        problem = random_problem(*shape, dtype=dtype, zero_weights=True)
        results = []
        for number in (1, 2, 5):
            threads(number)
            assert torch.get_num_threads() == number
            results.append(solve_and_differentiate(problem, grad, max_iter=20))
        same_bits(results[0], results[1])
        same_bits(results[0], results[2])

    @pytest.mark.parametrize("grad", MODES)
    @pytest.mark.parametrize("shape", [(7, 30, 20), (3, 760, 700)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_alone_or_in_a_batch(self, shape: tuple[int, int, int], dtype: torch.dtype, grad: str, device: str) -> None:
        problem = random_problem(*shape, dtype=dtype, device=device)
        batch = solve_and_differentiate(problem, grad, max_iter=20)
        for k in range(shape[0]):
            alone = solve_and_differentiate(Problem(*(x[k : k + 1] for x in problem)), grad, max_iter=20)
            same_bits(alone, [x[k : k + 1] for x in batch])

    @given(problem=problems(batch=4), eps=EPS, seed=SEEDS)
    def test_order_of_the_batch(self, problem: Problem, eps: float, seed: int, device: str) -> None:
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        x = problem.to(device).solve(eps, tol=1e-3, check_every=3, return_plan=True)
        y = Problem(*(x[order] for x in problem)).to(device).solve(eps, tol=1e-3, check_every=3, return_plan=True)
        same_bits(y, [None if field is None else field[order] for field in x])

    @pytest.mark.parametrize("grad", MODES)
    @pytest.mark.parametrize(("rows", "cols"), [(1, 30), (0, 1), (3, 0), (13, 27), (15, 10)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_padding(self, rows: int, cols: int, dtype: torch.dtype, grad: str, device: str) -> None:
        """Padded by rows and columns, whatever these hold: the same bits, and zeros in the padding.

        On CUDA there are tiles of K up to 32 x 32, so that a wider problem has its sums in another order.
        """
        problem = random_problem(3, 17, 22, dtype=dtype, device=device)
        plain = solve_and_differentiate(problem, grad, max_iter=20)
        padded = Problem(
            pad(problem.cost, (0, cols, 0, rows), value=torch.nan),
            pad(problem.a, (0, rows), value=5.0),
            pad(problem.b, (0, cols), value=torch.nan),
        )
        lengths = {
            "row_lengths": torch.full((3,), 17, device=device),
            "col_lengths": torch.full((3,), 22, device=device),
        }
        results = solve_and_differentiate(padded, grad, max_iter=20, **lengths)
        over = dict.fromkeys(range(len(plain)), (0, 0))  # what has neither rows nor columns
        over |= {2: (0, rows), 9: (0, rows), 3: (0, cols), 10: (0, cols)}  # f, g, and the gradients of a and b
        over |= {4: (0, cols, 0, rows), 8: (0, cols, 0, rows)}  # the plan and the gradient of the cost
        expected = [pad(x, over[k]) for k, x in enumerate(plain)]
        if not has_cuda_kernels(device) or max(17 + rows, 22 + cols) <= 32:
            same_bits(results, expected)
            return
        rounding = gradient_rtol(dtype, 0.3, 17 + rows, 22 + cols, 20, device)
        for k, (x, y) in enumerate(zip(results, expected, strict=True)):
            if x.dtype != torch.bool:  # tol is 0, and an error may be so too
                close(x, y, rounding * max(1e-3, float(y.double().abs().max())))
            assert (x[pad(torch.ones_like(plain[k]), over[k]) == 0] == 0).all()

    def test_padding_of_a_large_problem(self, device: str) -> None:
        problem = random_problem(1, 740, 710, dtype=torch.float32, device=device)
        plain = problem.solve(0.1, max_iter=20)
        lengths = {"row_lengths": torch.tensor([740], device=device), "col_lengths": torch.tensor([710], device=device)}
        padded = Problem(pad(problem.cost, (0, 300, 0, 200)), pad(problem.a, (0, 200)), pad(problem.b, (0, 300))).solve(
            0.1, max_iter=20, **lengths
        )
        # On a GPU the padded size may belong to another tier, whose sums are in another order.
        tol = tolerance(torch.float32, 0.1, 740, 710, n_iter=20, device=device).potential
        close(padded.f[:, :740], plain.f, 2 * tol if has_cuda_kernels(device) else 0.0)
        close(padded.g[:, :710], plain.g, 2 * tol if has_cuda_kernels(device) else 0.0)

    @given(problem=problems(batch=2), eps=EPS)
    def test_asking_for_the_plan_or_a_gradient_changes_nothing(self, problem: Problem, eps: float, device: str) -> None:
        problem = problem.to(device)
        plain = problem.solve(eps, max_iter=8)
        same_bits(problem.solve(eps, max_iter=8, return_plan=True)._replace(plan=None), plain)
        for grad in MODES:
            cost = problem.cost.clone().requires_grad_()
            out = otface_cuda.sinkhorn(cost, eps, problem.a, problem.b, max_iter=8, grad=grad)
            same_bits([None if x is None else x.detach() for x in out], plain)

    def test_inputs_are_never_modified(self, device: str) -> None:
        problem = random_problem(3, 20, 30, zero_weights=True, device=device)
        copies = [x.clone() for x in problem]
        versions = [x._version for x in problem]
        for grad in MODES:
            leaves = [x.detach().requires_grad_() for x in problem]
            otface_cuda.sinkhorn(leaves[0], 0.3, *leaves[1:], grad=grad, max_iter=50).value.sum().backward()
        same_bits(problem, copies)
        assert [x._version for x in problem] == versions
