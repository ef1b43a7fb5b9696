"""The kernels compute what `reference.py` says, after any number of iterations and for every special value."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda.reference import sinkhorn_iterates, sinkhorn_reference

from .problems import DTYPES, Problem, assert_same_solution, output_dtype, random_problem, tolerance

# Around the vector lengths, the unrolling by 4 rows, and the tiers of the design; thin, square, and awkward.
SHAPES = [(1, 1), (1, 9), (7, 1), (3, 4), (8, 8), (15, 17), (33, 31), (49, 49), (64, 65), (129, 151), (2, 300)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def check(problem: Problem, eps: float | Tensor, *, span: float = 1.0, **options) -> otface_cuda.SinkhornOutput:
    """Solve by kernel and by reference, compare, and return the kernel's output."""
    out = problem.solve(eps, return_plan=True, **options)
    ref = problem.reference(eps, return_plan=True, **options)
    n, m = problem.cost.shape[-2:]
    smallest = float(torch.as_tensor(eps).min())
    mass = problem.a.sum(-1).max().item()
    tol = tolerance(problem.cost.dtype, smallest, n, m, options.get("max_iter", 100), span, problem.cost.device)
    assert_same_solution(out, ref, tol, mass=mass, span=span)
    assert out.n_iter.tolist() == ref.n_iter.tolist()
    return out


@pytest.mark.instruction_set
@pytest.mark.parametrize("eps", [1e-3, 0.05, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iteration_by_iteration(shape: tuple[int, int], eps: float, dtype: torch.dtype, device: str) -> None:
    problem = random_problem(1, *shape, seed=sum(shape), dtype=dtype)
    cost, a, b = (x[0].double() for x in problem)
    on_device = problem.to(device)
    for t, (f, g) in enumerate(itertools.islice(sinkhorn_iterates(cost, eps, a, b), 12), start=1):
        out = on_device.solve(eps, max_iter=t)
        tol = tolerance(dtype, eps, *shape, n_iter=t, device=device)
        shift = ((b * g).sum() - (a * f).sum()) / (a.sum() + b.sum())
        torch.testing.assert_close(out.f[0].double().cpu(), f + shift, rtol=0, atol=tol.potential)
        torch.testing.assert_close(out.g[0].double().cpu(), g - shift, rtol=0, atol=tol.potential)
        assert out.n_iter.tolist() == [t]


@pytest.mark.instruction_set
@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("shape", [(5, 8), (49, 49), (70, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_many_iterations(shape: tuple[int, int], eps: float, dtype: torch.dtype, device: str) -> None:
    """Hundreds of iterations at a small eps, where the potentials are absorbed many times."""
    out = check(random_problem(2, *shape, seed=3, dtype=dtype, device=device), eps, max_iter=300)
    assert all(x.isfinite().all() for x in out)


@pytest.mark.instruction_set
def test_large_problem_that_threads_share(device: str) -> None:
    check(random_problem(1, 801, 1023, seed=5, dtype=torch.float32, device=device), 0.02, max_iter=15)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_any_scale_of_the_cost(scale: float, device: str) -> None:
    problem = random_problem(2, 20, 30, seed=1, dtype=torch.float32, device=device)
    check(problem._replace(cost=scale * problem.cost), scale * 0.03, span=scale, max_iter=50)


@pytest.mark.parametrize("offset", [-100.0, 100.0])
def test_cost_far_from_zero(offset: float, device: str) -> None:
    """A constant in the cost is taken up by the first potential and costs only its own rounding."""
    problem = random_problem(2, 20, 30, seed=1, dtype=torch.float32, device=device)
    check(problem._replace(cost=problem.cost + offset), 0.1, span=abs(offset), max_iter=50)


@pytest.mark.instruction_set
@pytest.mark.parametrize("mass", [2**-10, 1.0, 256.0])
def test_zero_weights_and_masses(mass: float, dtype: torch.dtype, device: str) -> None:
    problem = random_problem(3, 13, 21, seed=2, dtype=dtype, mass=mass, zero_weights=True, device=device)
    assert (problem.a == 0).any()
    assert (problem.b == 0).any()
    out = check(problem, 0.05, max_iter=40)
    assert (out.plan[problem.a == 0] == 0).all()
    assert (out.plan.mT[problem.b == 0] == 0).all()


def test_column_of_zero_weight_that_is_much_cheaper(device: str) -> None:
    """Its exponential would overflow every sum it has no part in."""
    problem = random_problem(1, 6, 5, seed=2, dtype=torch.float32, zero_weights=True, device=device)
    free = problem.b[0] == 0
    assert free.any()
    problem.cost[:, :, free] -= 50
    out = check(problem, 0.05, span=50.0, max_iter=20)
    assert all(x.isfinite().all() for x in out)


@pytest.mark.instruction_set
def test_forbidden_pairs(dtype: torch.dtype, device: str) -> None:
    problem = random_problem(3, 11, 18, seed=4, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    forbidden = torch.rand(problem.cost.shape, generator=generator) < 0.4
    forbidden = forbidden.to(device)
    out = check(problem._replace(cost=problem.cost.masked_fill(forbidden, math.inf)), 0.1, max_iter=60)
    assert (out.plan[forbidden] == 0).all()
    assert all(x.isfinite().all() for x in out)


def test_zero_weight_without_a_partner_has_potential_zero(device: str) -> None:
    problem = random_problem(1, 5, 6, seed=1, device=device)
    problem.a[0, 2] = 0
    problem.b[0, 4] = 0
    problem = Problem(problem.cost, problem.a / problem.a.sum(), problem.b / problem.b.sum())
    problem.cost[0, 2, :] = math.inf
    problem.cost[0, :, 4] = math.inf
    out = check(problem, 0.1, max_iter=30)
    assert out.f[0, 2] == 0
    assert out.g[0, 4] == 0


@pytest.mark.instruction_set
def test_lengths(dtype: torch.dtype, device: str) -> None:
    n, m = 19, 37
    rows, cols = torch.tensor([1, 19, 7, 12, 3]), torch.tensor([37, 1, 8, 33, 3])
    problem = random_problem(5, n, m, seed=6, dtype=dtype)
    valid_rows = torch.arange(n) < rows[:, None]
    valid_cols = torch.arange(m) < cols[:, None]
    a = problem.a * valid_rows
    b = problem.b * valid_cols
    # The padding of a cost and of a weight is not read: it may hold anything.
    cost = problem.cost.masked_fill(~(valid_rows[:, :, None] & valid_cols[:, None, :]), math.nan)
    a = (a / a.sum(1, keepdim=True)).masked_fill(~valid_rows, 7.0)
    b = (b / b.sum(1, keepdim=True)).masked_fill(~valid_cols, 7.0)
    lengths = {"row_lengths": rows.to(device), "col_lengths": cols.to(device)}
    on_device = Problem(cost, a, b).to(device)
    out = on_device.solve(0.1, max_iter=25, return_plan=True, **lengths)
    ref = sinkhorn_reference(cost, 0.1, a, b, max_iter=25, return_plan=True, row_lengths=rows, col_lengths=cols)
    assert_same_solution(out, ref, tolerance(dtype, 0.1, n, m, 25, device=device))
    assert (out.f.cpu()[~valid_rows] == 0).all()
    assert (out.g.cpu()[~valid_cols] == 0).all()
    assert (out.plan.cpu()[~(valid_rows[:, :, None] & valid_cols[:, None, :])] == 0).all()


@pytest.mark.parametrize("given", ["a", "b", "neither"])
def test_uniform_weights_are_over_the_valid_entries(given: str, device: str) -> None:
    problem = random_problem(2, 6, 8, seed=1, mass=3.0)
    options = {"row_lengths": torch.tensor([4, 6]), "col_lengths": torch.tensor([8, 5]), "max_iter": 10}
    a, b = None, None
    if given == "a":
        a = problem.a * (torch.arange(6) < options["row_lengths"][:, None])
    if given == "b":
        b = problem.b * (torch.arange(8) < options["col_lengths"][:, None])
    ref = sinkhorn_reference(problem.cost, 0.2, a, b, return_plan=True, **options)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    a, b = (None if w is None else w.to(device) for w in (a, b))
    out = otface_cuda.sinkhorn(problem.cost.to(device), 0.2, a, b, return_plan=True, **moved)
    assert_same_solution(out, ref, tolerance(torch.float64, 0.2, 6, 8, 10, device=device), mass=3.0)


def test_weights_shared_by_the_batch(device: str) -> None:
    problem = random_problem(3, 6, 8, device=device)
    shared = otface_cuda.sinkhorn(problem.cost, 0.1, problem.a[0], problem.b[0])
    each = otface_cuda.sinkhorn(problem.cost, 0.1, problem.a[:1].repeat(3, 1), problem.b[:1].repeat(3, 1))
    assert torch.equal(shared.f, each.f)
    assert torch.equal(shared.g, each.g)


def test_each_problem_has_its_own_eps(device: str) -> None:
    problem = random_problem(4, 9, 9, seed=8, dtype=torch.float32, device=device)
    eps = torch.tensor([0.03, 0.3, 3.0, 0.1])
    out = problem.solve(eps.to(device), max_iter=20, return_plan=True)
    ref = problem.reference(eps, max_iter=20, return_plan=True)
    assert_same_solution(out, ref, tolerance(torch.float32, 0.03, 9, 9, 20, device=device))


@pytest.mark.parametrize("as_output", [False, True])
def test_warm_start_continues(as_output: bool, dtype: torch.dtype, device: str) -> None:
    """5 iterations after 7 are 12: only g matters, and a constant in it does not."""
    problem = random_problem(3, 10, 12, seed=9, dtype=dtype, device=device)
    first = problem.solve(0.05, max_iter=7)
    init = first if as_output else (torch.full_like(first.f, 123.0), first.g)
    second = problem.solve(0.05, max_iter=5, init=init, return_plan=True)
    ref = problem.reference(0.05, max_iter=12, return_plan=True)
    assert_same_solution(second, ref, tolerance(dtype, 0.05, 10, 12, 12, device=device))


def test_warm_start_far_from_the_solution(device: str) -> None:
    problem = random_problem(2, 10, 12, seed=9, dtype=torch.float32)
    g = 20 * torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    init = (torch.zeros(2, 10), g)
    ref = problem.reference(0.05, max_iter=3, init=init, return_plan=True)
    init = (init[0].to(device), init[1].to(device))
    out = problem.to(device).solve(0.05, max_iter=3, init=init, return_plan=True)
    assert_same_solution(out, ref, tolerance(torch.float32, 0.05, 10, 12, 3, span=20.0, device=device), span=1.0)


class TestStopping:
    """Each problem stops alone, at the first tested iteration whose error is at most its own tol."""

    EPS = 0.05

    def problem(self, device: str) -> Problem:
        # The same weights but costs of different contrast, so that the problems converge at different speeds.
        problem = random_problem(4, 12, 12, seed=10, device=device)
        return problem._replace(cost=problem.cost * torch.tensor([0.2, 0.5, 1.0, 2.0], device=device)[:, None, None])

    @pytest.mark.parametrize("check_every", [1, 3, 10])
    def test_n_iter(self, check_every: int, device: str) -> None:
        out = check(self.problem(device), self.EPS, max_iter=500, tol=1e-6, check_every=check_every)
        assert len(set(out.n_iter.tolist())) > 1
        assert all(t % check_every == 0 for t in out.n_iter.tolist())
        assert out.converged.all()
        assert (out.error <= 1e-6).all()

    def test_not_earlier_than_the_first_tested_iteration(self, device: str) -> None:
        problem = self.problem(device)
        out = problem.solve(self.EPS, tol=1e-6, check_every=1, max_iter=500)
        for k, t in enumerate(out.n_iter.tolist()):
            before = otface_cuda.sinkhorn(problem.cost[k], self.EPS, problem.a[k], problem.b[k], max_iter=t - 1)
            assert before.error > 1e-6

    def test_own_tol(self, device: str) -> None:
        tol = torch.tensor([1e-2, 1e-4, 0.0, 1e-8])
        problem = self.problem("cpu")
        out = problem.to(device).solve(self.EPS, tol=tol.to(device), max_iter=70)
        ref = problem.reference(self.EPS, tol=tol, max_iter=70)
        assert out.n_iter.tolist() == ref.n_iter.tolist()
        assert out.n_iter[2] == 70
        assert out.converged.tolist() == ref.converged.tolist()

    def test_tol_zero_runs_every_iteration(self, device: str) -> None:
        """Even when the error is exactly zero: a single row is solved by one iteration."""
        cost = torch.tensor([[0.5, 0.25]], device=device)
        out = otface_cuda.sinkhorn(cost, 1.0, max_iter=37, check_every=1)
        assert out.n_iter == 37
        assert out.converged

    def test_no_problem_converges(self, device: str) -> None:
        out = check(self.problem(device), self.EPS, max_iter=13, tol=1e-12, check_every=5)
        assert out.n_iter.tolist() == [13] * 4
        assert not out.converged.any()

    @pytest.mark.instruction_set
    @pytest.mark.parametrize("tol", [1e-8, 5e-8, 1e-7, 3e-7, 1e-6])
    @pytest.mark.parametrize("shape", [(3, 4), (16, 16), (49, 49), (70, 33)], ids=str)
    def test_what_ends_a_solve_is_what_is_reported(self, shape: tuple[int, int], tol: float, device: str) -> None:
        """Around the rounding of the error in float32, where its two formulas give different numbers."""
        batch, max_iter = 24, 200
        problem = random_problem(batch, *shape, seed=14, dtype=torch.float32, device=device)
        cold = problem.solve(0.1, tol=tol, check_every=1, max_iter=max_iter, return_plan=True)
        warm = problem.solve(0.1, tol=tol, check_every=3, max_iter=max_iter, init=cold, return_plan=True)
        for out in (cold, warm):
            assert torch.equal(out.converged, out.error <= tol)
            assert out.converged[out.n_iter < max_iter].all()
            # The rows of the plan as they are: each entry and each sum that scaled it was rounded, and an entry is a
            # product of three.
            rows = (out.plan.double().sum(2) - problem.a.double()).abs().sum(1) / problem.a.double().sum(1)
            rounding = (4 + math.sqrt(max(shape))) * torch.finfo(torch.float32).eps
            torch.testing.assert_close(out.error.double(), rows, rtol=0, atol=rounding)
        if tol > 2e-7:  # more than that rounding: all of these get there
            assert cold.converged.all()

    def test_last_iteration_counts_though_it_is_not_tested(self, device: str) -> None:
        """`error` and `converged` belong to the returned iterate, whatever check_every is."""
        out = check(self.problem(device), self.EPS, max_iter=499, tol=1e-6, check_every=1000)
        assert out.n_iter.tolist() == [499] * 4
        assert out.converged.all()


def rounding_level(dtype: torch.dtype, n: int, m: int) -> float:
    """What `converged` compares the error with where tol is 0."""
    return 4 * torch.finfo(output_dtype(dtype)).eps * math.sqrt(n + m)


class TestConvergedWithoutTol:
    @pytest.mark.instruction_set
    @pytest.mark.parametrize("shape", [(1, 1), (1, 300), (2, 2), (49, 49), (300, 7), (65, 200)], ids=str)
    def test_at_the_fixed_point(self, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
        """Costs in [0, 1] at eps 1: a step shrinks the error by tanh(1/2)^2 < 0.22 at least, below 1e-19 in 30."""
        problem = random_problem(20, *shape, seed=12, dtype=dtype, device=device)
        for a, b in ((problem.a, problem.b), (None, None)):
            out = otface_cuda.sinkhorn(problem.cost, 1.0, a, b, max_iter=30)
            assert out.converged.all(), out.error.max() / rounding_level(dtype, *shape)

    @pytest.mark.instruction_set
    def test_is_the_level_that_is_documented(self, dtype: torch.dtype, device: str) -> None:
        """On the way to the fixed point, with errors of all sizes."""
        problem = random_problem(20, 9, 12, seed=13, dtype=dtype, device=device)
        seen = set()
        for max_iter in range(1, 100, 3):
            out = problem.solve(0.1, max_iter=max_iter)
            assert torch.equal(out.converged, out.error <= rounding_level(dtype, 9, 12))
            seen |= set(out.converged.tolist())
        assert seen == {False, True}

    def test_sizes_are_those_of_the_problem(self, device: str) -> None:
        """Padding does not raise the level; here the errors come to lie between that of 5 x 4 and that of 60 x 50."""
        problem = random_problem(20, 60, 50, seed=14, device=device)
        lengths = {"row_lengths": torch.full((20,), 5), "col_lengths": torch.full((20,), 4)}
        lengths = {name: x.to(device) for name, x in lengths.items()}
        own, padded = rounding_level(torch.float64, 5, 4), rounding_level(torch.float64, 60, 50)
        between = 0
        for max_iter in range(20, 80):
            out = otface_cuda.sinkhorn(problem.cost, 0.2, max_iter=max_iter, **lengths)
            assert torch.equal(out.converged, out.error <= own)
            between += int(((own < out.error) & (out.error <= padded)).sum())
        assert between > 0

    def test_with_and_without_tol_in_one_batch(self, device: str) -> None:
        problem = random_problem(3, 6, 6, seed=15, device=device)
        tol = torch.tensor([0.0, 1e-9, 0.5], dtype=torch.float64, device=device)
        assert problem.solve(1.0, tol=tol, max_iter=30).converged.all()
        assert problem.solve(0.1, tol=tol, max_iter=1).converged.tolist() == [False, False, True]

    def test_without_a_solution(self, device: str) -> None:
        cost = random_problem(2, 6, 6, device=device).cost
        cost[1, 2, 3] = math.nan
        assert otface_cuda.sinkhorn(cost, 1.0).converged.tolist() == [True, False]


def test_potentials_balance(dtype: torch.dtype, device: str) -> None:
    """The returned shift is the one with <a, f> = <b, g> = value / 2."""
    problem = random_problem(3, 14, 11, seed=11, dtype=dtype, mass=2.0, device=device)
    out = problem.solve(0.1, max_iter=9)
    atol = 2.0 * tolerance(dtype, 0.1, 14, 11, 9, device=device).potential
    torch.testing.assert_close((problem.a * out.f).sum(1), out.value / 2, rtol=0, atol=atol)
    torch.testing.assert_close((problem.b * out.g).sum(1), out.value / 2, rtol=0, atol=atol)


def test_output_types_and_shapes(dtype: torch.dtype, device: str) -> None:
    problem = random_problem(3, 4, 5, dtype=dtype, device=device)
    out = problem.solve(0.1, return_plan=True)
    assert isinstance(out, otface_cuda.SinkhornOutput)
    assert out._fields == ("value", "transport_cost", "f", "g", "plan", "error", "n_iter", "converged")
    shapes = [(3,), (3,), (3, 4), (3, 5), (3, 4, 5), (3,), (3,), (3,)]
    types = [output_dtype(dtype)] * 6 + [torch.int64, torch.bool]
    for x, shape, expected in zip(out, shapes, types, strict=True):
        assert x.shape == shape
        assert x.dtype == expected
        assert x.device == problem.cost.device
        assert not x.requires_grad


def test_unbatched_in_unbatched_out(device: str) -> None:
    problem = random_problem(1, 4, 5, device=device)
    one = otface_cuda.sinkhorn(problem.cost[0], 0.1, problem.a[0], problem.b[0], return_plan=True)
    batch = problem.solve(0.1, return_plan=True)
    for x, y in zip(one, batch, strict=True):
        assert x.shape == y.shape[1:]
        assert torch.equal(x, y[0])


def test_no_plan_unless_asked_for(device: str) -> None:
    problem = random_problem(2, 4, 5, device=device)
    assert otface_cuda.sinkhorn(problem.cost, 0.1).plan is None


def test_empty_batch(dtype: torch.dtype, device: str) -> None:
    out = otface_cuda.sinkhorn(torch.empty(0, 4, 5, dtype=dtype, device=device), 0.1, return_plan=True)
    shapes = [(0,), (0,), (0, 4), (0, 5), (0, 4, 5), (0,), (0,), (0,)]
    assert [x.shape for x in out] == shapes
    assert out.value.dtype == output_dtype(dtype)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every other column": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every third row": lambda x: x.repeat_interleave(3, 1)[:, 1::3, :],
    "inside a larger matrix": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4), value=math.nan)[:, 1:-4, 3:-2],
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "every other problem": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.instruction_set
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, dtype: torch.dtype, device: str) -> None:
    """How a cost lies in memory does not change a bit of the result."""
    problem = random_problem(3, 21, 18, seed=12, dtype=dtype, device=device)
    strided = LAYOUTS[layout](problem.cost)
    assert torch.equal(strided, problem.cost)
    assert strided.stride() != problem.cost.stride() or strided.storage_offset() != 0
    plain = problem.solve(0.1, max_iter=10, return_plan=True)
    out = otface_cuda.sinkhorn(strided, 0.1, problem.a, problem.b, max_iter=10, return_plan=True)
    for x, y in zip(out, plain, strict=True):
        assert torch.equal(x, y)


def test_one_cost_shared_by_the_batch(dtype: torch.dtype, device: str) -> None:
    problem = random_problem(4, 10, 9, seed=13, dtype=dtype, device=device)
    shared = problem.cost[:1].expand(4, 10, 9)
    out = otface_cuda.sinkhorn(shared, 0.1, problem.a, problem.b, max_iter=10, return_plan=True)
    copied = otface_cuda.sinkhorn(shared.contiguous(), 0.1, problem.a, problem.b, max_iter=10, return_plan=True)
    for x, y in zip(out, copied, strict=True):
        assert torch.equal(x, y)


def test_rows_and_columns_repeated_by_stride_zero(device: str) -> None:
    row = torch.rand(1, 1, 9, generator=torch.Generator().manual_seed(0)).to(device)
    for repeated in (row.expand(2, 5, 9), row.mT.expand(2, 9, 5)):
        out = otface_cuda.sinkhorn(repeated, 0.1, max_iter=10)
        copied = otface_cuda.sinkhorn(repeated.contiguous(), 0.1, max_iter=10)
        assert torch.equal(out.f, copied.f)
        assert torch.equal(out.g, copied.g)


def test_strided_weights(device: str) -> None:
    problem = random_problem(3, 10, 9, seed=14, dtype=torch.float32, device=device)
    plain = problem.solve(0.1, max_iter=10)
    out = otface_cuda.sinkhorn(
        problem.cost, 0.1, problem.a.mT.contiguous().mT, problem.b.repeat_interleave(2, 1)[:, ::2], max_iter=10
    )
    assert torch.equal(out.f, plain.f)
    assert torch.equal(out.g, plain.g)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_costs_are_read_exactly(half: torch.dtype, device: str) -> None:
    """They are converted to float32 as they are read: a float32 copy gives the same bits, subnormals too."""
    cost = random_problem(2, 16, 24, seed=15, device=device).cost.to(half)
    cost[0, 0, :4] = torch.tensor([math.inf, 0.0, torch.finfo(half).smallest_normal / 4, 2.0], dtype=half)
    out = otface_cuda.sinkhorn(cost, 0.1, max_iter=10, return_plan=True)
    exact = otface_cuda.sinkhorn(cost.float(), 0.1, max_iter=10, return_plan=True)
    for x, y in zip(out, exact, strict=True):
        assert torch.equal(x, y)
