"""Every CUDA kernel, run on the CPU by the host executor, computes what `reference.py` says: in every tier, at and
around the tier's edges, for every special value; and no bit of a result depends on what it must not depend on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from otface_cuda import SinkhornOutput
from otface_cuda.reference import sinkhorn_reference

from .problems import Problem, assert_same_solution, gradient_rtol, one_thread, output_dtype, random_problem, tolerance
from .simt.cases import EDGES, LARGE, STEPS, WAYS
from .simt.kernels import choice, make_case, run, tier_of

OPS = torch.ops.otface
OUTPUTS = ("value", "transport_cost", "f", "g", "plan")
FIELDS = SinkhornOutput._fields

EVERYTHING = " ".join(STEPS)


def sizes(shapes: dict[str, list[tuple[int, int]]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(way, *shape, marks=marks) for way, all_shapes in shapes.items() for shape in all_shapes]


def sides(name: str) -> str:
    """Which sizes a result has beside that of the batch: "n", "m", "nm" or none."""
    sides_of = {"f": "n", "grad_a": "n", "g": "m", "grad_b": "m", "plan": "nm", "grad_cost": "nm"}
    return sides_of.get(name.split("_", 1)[1] if "_grad_" in name else name, "")


EVERY_SIZE = pytest.mark.parametrize(("way", "n", "m"), sizes(EDGES) + sizes(LARGE, pytest.mark.simt_full))
EVERY_WAY = pytest.mark.parametrize("way", WAYS)
EVERY_REAL = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Given(NamedTuple):
    """What a solve takes, as `otface_cuda.sinkhorn` does; weights may be None."""

    cost: Tensor
    eps: Tensor  # (B,) or (1,)
    a: Tensor | None = None
    b: Tensor | None = None
    row_lengths: Tensor | None = None
    col_lengths: Tensor | None = None
    init_g: Tensor | None = None
    tol: float | Tensor = 0.0
    max_iter: int = 6
    check_every: int = 10
    mass_tolerance: float = math.inf

    def only(self, k: int) -> Given:
        """Problem k alone."""
        batch = len(self.cost)

        def part(x: Any) -> Any:
            return x[k : k + 1] if isinstance(x, Tensor) and len(x) == batch else x

        return Given(*map(part, self))

    @property
    def real(self) -> torch.dtype:
        return output_dtype(self.cost.dtype)


def given(problem: Problem, eps: float | list[float] | Tensor, **options: Any) -> Given:
    return Given(problem.cost, torch.as_tensor(eps, dtype=torch.float64).reshape(-1), problem.a, problem.b, **options)


Results = dict[str, Tensor]


def solve(
    given: Given, way: str, steps: str = "forward", grads: dict[str, Tensor] | None = None, **settings: Any
) -> Results:
    """All results of a run on the host executor.

    `steps`: "forward", "envelope", "unrolled", "implicit"; the last three leave their gradients as "unrolled_grad_cost"
    and so on. `settings` are those of make_case, and arrays from a forward.
    """
    settings = WAYS[way] | {"want_plan": 1, "want_history": 1, "implicit_tol": implicit_tol(given)} | settings
    brought = {name: x.numpy() for name, x in settings.items() if isinstance(x, Tensor)}
    cost = given.cost
    if cost.dtype == torch.bfloat16:
        settings["cost_bfloat"] = 1
    case = make_case(
        cost.view(torch.int16).numpy().view(np.uint16) if cost.dtype == torch.bfloat16 else cost.numpy(),
        given.eps.numpy(),
        *(None if w is None else w.numpy() for w in (given.a, given.b)),
        steps=(),
        tol=given.tol if isinstance(given.tol, float) else given.tol.numpy(),
        **{name: None if (x := getattr(given, name)) is None else x.numpy() for name in ARRAYS},
        grads={name: x.numpy() for name, x in (grads or {}).items()},
        max_iter=given.max_iter,
        check_every=given.check_every,
        mass_tolerance=given.mass_tolerance,
        **{name: x for name, x in settings.items() if name not in brought},
    )
    results: dict[str, np.ndarray] = {}
    for step in steps.split():
        try:
            made = run(case | brought | {step: np.asarray(1)})
        except RuntimeError as error:
            fits = "too large for the shared memory" not in str(error)
            if way != "shared" or fits or "shared_bytes_per_block" in settings:
                raise
            pytest.skip("does not fit a block's shared memory: it takes the stream tier")
        if step == "forward":
            brought |= {name: made[name] for name in FOR_GRADIENTS if name in made}
        results |= {f"{step}_{name}" if name.startswith("grad_") else name: x for name, x in made.items()}
    return {name: torch.from_numpy(x) for name, x in results.items()}


FOR_GRADIENTS = ("potentials", "n_iter", "history", "rebuilt")
ARRAYS = ("row_lengths", "col_lengths", "init_g")


def implicit_tol(given: Given) -> float:
    return 1e-11 if given.real == torch.float64 else 1e-7


def output(results: Results) -> SinkhornOutput:
    fields = {name: results[name] for name in FIELDS} | {"converged": results["converged"].bool()}
    return SinkhornOutput(**fields)


def reference(given: Given, **leaves: Tensor) -> Any:
    arguments = given._replace(**leaves) if leaves else given
    zeros = torch.zeros(len(given.cost), given.cost.shape[1])
    init = None if given.init_g is None else (zeros, given.init_g)
    with one_thread():
        return sinkhorn_reference(
            arguments.cost,
            arguments.eps,
            arguments.a,
            arguments.b,
            max_iter=given.max_iter,
            tol=given.tol,
            check_every=given.check_every,
            row_lengths=given.row_lengths,
            col_lengths=given.col_lengths,
            init=init,
            return_plan=True,
        )


def check_forward(given: Given, way: str, *, span: float = 1.0, **settings: Any) -> Results:
    """Solve and compare each problem with the reference, by the tolerance that its eps and iterations give."""
    results = solve(given, way, **settings)
    out, ref = output(results), reference(given)
    n, m = given.cost.shape[1:]
    for k in range(len(given.cost)):
        eps = float(given.eps[k % len(given.eps)])
        tol = tolerance(given.cost.dtype, eps, n, m, max(1, int(ref.n_iter[k])), span)
        one, expected = (type(x)(*(y[k : k + 1] for y in x)) for x in (out, ref))
        assert_same_solution(one, expected, tol, span=span)
    assert out.n_iter.tolist() == ref.n_iter.tolist()
    return results


# --- Results against the reference


@EVERY_SIZE
@EVERY_REAL
def test_forward(way: str, n: int, m: int, dtype: torch.dtype) -> None:
    """Three problems, where two share a warp: one that never starts anew, one that often does."""
    problem = random_problem(3, n, m, seed=n + m, dtype=dtype)
    results = check_forward(given(problem, [0.5, 0.002, 0.05], max_iter=5), way)
    if way != "registers" or max(n, m) <= (64 if dtype == torch.float32 else 48):
        assert tier_of(results) == WAYS[way]["tier"]


def cotangents(batch: int, n: int, m: int, dtype: torch.dtype, seed: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch,), (batch,), (batch, n), (batch, m), (batch, n, m))
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in zip(OUTPUTS, shapes, strict=True)
    }


def assert_close_gradients(actual: Results, step: str, k: int, expected: list[Tensor], rtol: float) -> None:
    """Of problem k, relative to the largest entry, because the terms of a gradient cancel.

    Of a and b together, for they share terms.
    """
    scales = [x.nan_to_num().abs().max().item() for x in expected]
    scales = [scales[0], max(scales[1:]), max(scales[1:])]
    for name, y, scale in zip(("grad_cost", "grad_a", "grad_b"), expected, scales, strict=True):
        x = actual[f"{step}_{name}"][k].double()
        assert torch.equal(x.isnan(), y.isnan()), name
        difference = (x - y).nan_to_num().abs().max().item()
        assert difference <= rtol * scale, f"{name}: {difference / max(scale, 1e-300):.2e} > {rtol:.2e}"


def check_unrolled(given: Given, way: str, names: tuple[str, ...] = OUTPUTS, **settings: Any) -> Results:
    """The gradients of some outputs against autograd through the reference."""
    batch, n, m = given.cost.shape
    all_grads = cotangents(batch, n, m, given.real)
    grads = {name: all_grads[name] for name in names}
    results = solve(given, way, "forward unrolled", grads, **settings)
    for k in range(batch):
        one = given.only(k)
        leaves = {name: getattr(one, name).double().requires_grad_() for name in ("cost", "a", "b")}
        ref = reference(one, **leaves)
        expected = torch.autograd.grad(
            [getattr(ref, name) for name in names],
            list(leaves.values()),
            [grads[name][k : k + 1].double() for name in names],
        )
        rtol = gradient_rtol(given.real, float(one.eps), n, m, int(ref.n_iter))
        assert_close_gradients(results, "unrolled", k, [x[0] for x in expected], rtol)
    return results


@EVERY_SIZE
@EVERY_REAL
def test_unrolled(way: str, n: int, m: int, dtype: torch.dtype) -> None:
    """The eps in the middle rebuilds K in between."""
    problem = random_problem(3, n, m, seed=n * m, dtype=dtype)
    check_unrolled(given(problem, [0.5, 0.01, 0.05], max_iter=5), way)


@EVERY_WAY
@pytest.mark.parametrize("names", [*zip(OUTPUTS), ("value", "f")], ids="-".join)
@EVERY_REAL
def test_unrolled_from_some_outputs(way: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
    problem = random_problem(2, 13, 19, seed=2, dtype=dtype)
    check_unrolled(given(problem, [0.1, 0.004], max_iter=4), way, names)


def check_implicit(given: Given, way: str, grads: dict[str, Tensor] | None = None, **settings: Any) -> Results:
    """From the same potentials, the CPU kernel and this one solve the same system to the same residual."""
    batch, n, m = given.cost.shape
    grads = cotangents(batch, n, m, given.real) if grads is None else grads
    potentials = cpu_forward(given)["potentials"]
    max_iter = 100 + 10 * min(n, m)
    results = solve(given, way, "implicit", grads, potentials=potentials, implicit_max_iter=max_iter, **settings)
    expected = OPS.sinkhorn_implicit_backward(
        *arguments(given), potentials, *(grads.get(name) for name in OUTPUTS), implicit_tol(given), True, True, True
    )
    for k in range(batch):
        eps = float(given.eps[k % len(given.eps)])
        if results["implicit_converged"][k].bool() != expected[3][k]:
            assert eps < 0.01  # the smallest residual that rounding lets one reach is near the tolerance
            continue
        # Both are rounded, and off by the residual, which the condition number of the system multiplies.
        rtol = 2 * (gradient_rtol(given.real, eps, n, m, 100) + implicit_tol(given) * 100 / eps)
        assert_close_gradients(results, "implicit", k, [x[k].double() for x in expected[:3]], rtol)
    return results


def arguments(given: Given) -> tuple[Any, ...]:
    eps = given.eps.expand(len(given.cost)).contiguous()
    return given.cost, eps, given.a, given.b, given.row_lengths, given.col_lengths


def cpu_forward(given: Given) -> Results:
    tol = torch.as_tensor(given.tol, dtype=torch.float64).expand(len(given.cost)).contiguous()
    names = (*FIELDS, "potentials", "history", "rebuilt")
    cost, eps, a, b, rows, cols = arguments(given)
    out = OPS.sinkhorn_forward(
        cost, eps, a, b, tol, rows, cols, given.init_g, given.max_iter, given.check_every, True, True,
        given.mass_tolerance,
    )  # fmt: skip
    return dict(zip(names, out, strict=True))


@EVERY_SIZE
@EVERY_REAL
def test_implicit(way: str, n: int, m: int, dtype: torch.dtype) -> None:
    if way == "registers":
        pytest.skip("no such tier: the adjoint system is solved in double in memory")
    problem = random_problem(2, n, m, seed=n * m, dtype=dtype)
    results = check_implicit(given(problem, [0.5, 0.1], max_iter=100), way)
    assert results["implicit_converged"].all()


@EVERY_WAY
@EVERY_REAL
def test_envelope(way: str, dtype: torch.dtype) -> None:
    """The plan and the centred potentials, times the cotangent; the sizes are those of two blocks of eight rows."""
    problem = random_problem(3, 13, 33, seed=1, dtype=dtype)
    value = torch.tensor([2.0, -3.0, 0.5], dtype=dtype)
    lengths = {"row_lengths": torch.tensor([13, 5, 9]), "col_lengths": torch.tensor([33, 33, 2])}
    ragged = Given(problem.cost, torch.tensor([0.1], dtype=torch.float64), **lengths)
    results = solve(ragged, way, "forward envelope", {"value": value})
    # One rounding of the plan by that of the potentials, and a few roundings of numbers of size 1 in the arithmetic.
    u = torch.finfo(dtype).eps
    plan = value[:, None, None] * results["plan"]
    torch.testing.assert_close(results["envelope_grad_cost"], plan, rtol=4 * u, atol=0)
    for name, grad, count in (
        ("f", "envelope_grad_a", lengths["row_lengths"]),
        ("g", "envelope_grad_b", lengths["col_lengths"]),
    ):
        x = results[name].double()
        valid = torch.arange(x.shape[1]) < count[:, None]
        centred = valid * (x - x.sum(1, keepdim=True) / count[:, None])
        torch.testing.assert_close(results[grad].double(), value[:, None] * centred, rtol=0, atol=16 * u)


# --- Special values


@EVERY_WAY
@EVERY_REAL
def test_many_iterations(way: str, dtype: torch.dtype) -> None:
    """At a small eps, where the potentials are absorbed again and again, and at one where they never are."""
    problem = random_problem(2, 20, 27, seed=3, dtype=dtype)
    small = 1e-3 if dtype == torch.float32 else 1e-4
    results = check_forward(given(problem, [small, 0.1], max_iter=100), way)
    rebuilt = (results["rebuilt"] > 0).sum(1)
    # Potentials move by about eps in an iteration: in double, whose band is 200 eps, all of them stay within it.
    assert rebuilt[0] > (2 if dtype == torch.float32 else 0)
    assert rebuilt[1] == 1


@EVERY_WAY
@EVERY_REAL
def test_weights_of_many_orders_of_magnitude(way: str, dtype: torch.dtype) -> None:
    """One iteration after another starts anew with rows and columns, later ones with rows only."""
    eps, orders = (1e-3, 12) if dtype == torch.float32 else (1e-4, 120)
    cost = random_problem(2, 13, 10, seed=2, dtype=dtype).cost
    generator = torch.Generator().manual_seed(11)
    a, b = (10 ** (orders * torch.rand(2, size, generator=generator, dtype=torch.float64)) for size in (13, 10))
    problem = Problem(cost, (a / a.sum(1, keepdim=True)).to(dtype), (b / b.sum(1, keepdim=True)).to(dtype))
    one = given(problem, eps, max_iter=12)
    assert check_forward(one, way)["rebuilt"][0].tolist() == [2, 2, 2, 0, 1, 1, 1, 1, 1, 1, 0, 1]
    check_unrolled(one, way)


@pytest.mark.simt_full
def test_more_rows_than_stripes_of_the_least_height() -> None:
    problem = random_problem(1, 8193, 2, seed=1, dtype=torch.float32)
    check_unrolled(given(problem, 0.1, max_iter=2), "gang")


@EVERY_WAY
@EVERY_REAL
@pytest.mark.parametrize("mass", [2**-10, 256.0])
def test_zero_weights_and_masses(way: str, dtype: torch.dtype, mass: float) -> None:
    problem = random_problem(3, 13, 21, seed=2, dtype=dtype, mass=mass, zero_weights=True)
    one = given(problem, 0.05, max_iter=10)
    results = solve(one, way)
    out, ref = output(results), reference(one)
    assert_same_solution(out, ref, tolerance(dtype, 0.05, 13, 21, 10), mass=mass)
    assert (out.plan[problem.a == 0] == 0).all()
    assert (out.plan.mT[problem.b == 0] == 0).all()
    check_unrolled(one._replace(max_iter=3), way)
    check_implicit(one._replace(max_iter=100), way)


@EVERY_WAY
@EVERY_REAL
def test_forbidden_pairs(way: str, dtype: torch.dtype) -> None:
    problem = random_problem(3, 11, 18, seed=4, dtype=dtype)
    forbidden = torch.rand(problem.cost.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    one = given(problem._replace(cost=problem.cost.masked_fill(forbidden, math.inf)), 0.1, max_iter=8)
    out = output(check_forward(one, way))
    assert (out.plan[forbidden] == 0).all()
    assert (check_unrolled(one, way)["unrolled_grad_cost"][forbidden] == 0).all()
    assert (check_implicit(one._replace(max_iter=100), way)["implicit_grad_cost"][forbidden] == 0).all()


@EVERY_WAY
@EVERY_REAL
def test_zero_weight_without_a_partner(way: str, dtype: torch.dtype) -> None:
    """Its potential is 0, and of a column that is much cheaper the exponential would overflow any sum."""
    cost, a, b = random_problem(1, 5, 6, seed=1, dtype=dtype)
    a[0, 2] = b[0, 4] = b[0, 0] = 0
    cost[0, 2, :] = cost[0, :, 4] = math.inf
    cost[0, :2, 0] -= 50
    problem = Problem(cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True))
    one = given(problem, 0.05, max_iter=8)
    out = output(check_forward(one, way, span=50.0))
    assert out.f[0, 2] == 0
    assert out.g[0, 4] == 0
    assert all(x.isfinite().all() for x in out)


@EVERY_WAY
def test_entry_between_two_zero_weights(way: str) -> None:
    """Nothing bounds it, and what it would overflow is no part of a sum; but 0 times infinity would be."""
    cost, a, b = random_problem(1, 5, 6, seed=1, dtype=torch.float32)
    a[0, 2] = b[0, 4] = 0
    cost[0, 2, 4] = -50
    one = given(Problem(cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)), 0.05, max_iter=8)
    grads = {name: 1e6 * x for name, x in cotangents(1, 5, 6, torch.float32).items()}
    results = solve(one, way, EVERYTHING, grads)
    assert results["unrolled_grad_cost"].isfinite().all()
    assert results["implicit_grad_cost"].isfinite().all()
    for name, weights in (("grad_a", a), ("grad_b", b)):
        assert results[f"unrolled_{name}"][weights > 0].isfinite().all()


def ragged(dtype: torch.dtype, eps: float | list[float] = 0.1, **options: Any) -> Given:
    """Five problems of their own sizes, NaN and nonsense in the padding."""
    n, m = 19, 37
    lengths = {"row_lengths": torch.tensor([1, 19, 7, 12, 3]), "col_lengths": torch.tensor([37, 1, 8, 33, 3])}
    cost, a, b = random_problem(5, n, m, seed=6, dtype=dtype)
    valid_rows, valid_cols = (
        torch.arange(size) < lengths[name][:, None] for size, name in ((n, "row_lengths"), (m, "col_lengths"))
    )
    cost = cost.masked_fill(~(valid_rows[:, :, None] & valid_cols[:, None, :]), math.nan)
    a, b = (
        (w / (w * valid).sum(1, keepdim=True)).masked_fill(~valid, 7.0)
        for w, valid in ((a, valid_rows), (b, valid_cols))
    )
    return given(Problem(cost, a, b), eps, **lengths, **options)


@EVERY_WAY
@EVERY_REAL
@pytest.mark.parametrize("uniform", [False, True])
def test_lengths(way: str, dtype: torch.dtype, uniform: bool) -> None:
    one = ragged(dtype, max_iter=10)
    if uniform:
        one = one._replace(a=None, b=None)
    check_forward(one, way)
    results = solve(one, way, EVERYTHING, cotangents(5, 19, 37, dtype))
    for k, (rows, cols) in enumerate(zip(one.row_lengths, one.col_lengths, strict=True)):
        for name, x in results.items():
            if sides(name) == "n":
                assert (x[k, rows:] == 0).all(), name
            if sides(name) == "m":
                assert (x[k, cols:] == 0).all(), name
            if sides(name) == "nm":
                assert (x[k, rows:] == 0).all(), name
                assert (x[k, :, cols:] == 0).all(), name


SPOILT = {
    "NaN in the cost": lambda x: x.cost[1, 3, 2].fill_(math.nan),
    "-inf in the cost": lambda x: x.cost[1, 3, 2].fill_(-math.inf),
    "a row without an allowed pair": lambda x: x.cost[1, x.a[1].argmax()].fill_(math.inf),
    "a column without an allowed pair": lambda x: x.cost[1, :, x.b[1].argmax()].fill_(math.inf),
    "a negative weight": lambda x: x.a[1, 0].fill_(-0.1),
    "a NaN weight": lambda x: x.b[1, 0].fill_(math.nan),
    "no mass": lambda x: x.b[1].zero_(),
    "infinite mass": lambda x: x.a[1, 0].fill_(math.inf),
    "a mass of a that is 1 % above that of b": lambda x: x.a[1].mul_(1.01),
    "a mass of a that is 1 % below that of b": lambda x: x.a[1].mul_(0.99),
    "eps 0": lambda x: x.eps[1].zero_(),
    "eps < 0": lambda x: x.eps[1].neg_(),
    "eps NaN": lambda x: x.eps[1].fill_(math.nan),
    "eps infinite": lambda x: x.eps[1].fill_(math.inf),
    "no rows": lambda x: x.row_lengths[1].zero_(),
    "too many rows": lambda x: x.row_lengths[1].fill_(2**40),
    "a negative number of columns": lambda x: x.col_lengths[1].fill_(-(2**62)),
    "a start that is NaN": lambda x: x.init_g[1, 1].fill_(math.nan),
    "a start that is infinite": lambda x: x.init_g[1, 1].fill_(math.inf),
}


def complete(dtype: torch.dtype, batch: int, n: int, m: int, seed: int = 0, **options: Any) -> Given:
    """Problems in which every argument is given, at an eps of their own."""
    problem = random_problem(batch, n, m, seed=seed, dtype=dtype, zero_weights=True)
    generator = torch.Generator().manual_seed(seed)
    return given(
        problem,
        ([0.5, 0.004, 0.05] * batch)[:batch],
        row_lengths=torch.full((batch,), n),
        col_lengths=torch.full((batch,), m),
        init_g=0.1 * torch.rand(batch, m, generator=generator, dtype=torch.float64).to(output_dtype(dtype)),
        mass_tolerance=5e-3,
        **options,
    )


@EVERY_WAY
@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_problem(way: str, what: str) -> None:
    """Everything of it is NaN, its neighbours do not change a bit."""
    one = complete(torch.float32, 3, 13, 9)
    grads = cotangents(3, 13, 9, torch.float32)
    good = solve(one, way, EVERYTHING, grads)
    SPOILT[what](one)
    results = solve(one, way, EVERYTHING, grads)
    for k in (0, 2):
        assert_same_bits(results, k, good, k)
    for name, x in results.items():
        if sides(name) or name in ("value", "transport_cost", "error"):
            assert x[1].isnan().all(), name
    assert (results["n_iter"][1], results["converged"][1], results["implicit_converged"][1]) == (0, 0, 1)


@EVERY_WAY
@EVERY_REAL
@pytest.mark.parametrize("check_every", [1, 3])
def test_each_stops_at_its_own_tolerance(way: str, dtype: torch.dtype, check_every: int) -> None:
    problem = random_problem(4, 12, 12, seed=10, dtype=dtype)
    problem = problem._replace(cost=problem.cost * torch.tensor([0.2, 0.5, 1.0, 2.0], dtype=dtype)[:, None, None])
    tol = torch.tensor([1e-2, 1e-4, 0.0, 1e-3], dtype=torch.float64)
    one = given(problem, 0.1, tol=tol, max_iter=40, check_every=check_every)
    results = check_forward(one, way)
    assert len(set(results["n_iter"].tolist())) == 4
    assert results["n_iter"][2] == 40
    check_unrolled(one, way)


@EVERY_WAY
@pytest.mark.parametrize("n", [5, 12, 30])
@pytest.mark.parametrize("tol", [1e-8, 1e-7, 1e-6])
def test_what_ends_a_solve_is_what_is_reported(way: str, n: int, tol: float) -> None:
    """Around the rounding of the error in float32. Where two share a warp, one goes on when the other is done."""
    problem = random_problem(7, n, n, seed=n, dtype=torch.float32)
    one = given(problem, [0.5, 0.1, 0.3, 0.05, 0.1, 1.0, 0.2], tol=tol, max_iter=60, check_every=2)
    results = solve(one, way)
    converged, done = results["converged"].bool(), results["n_iter"]
    assert torch.equal(converged, results["error"] <= tol)
    assert converged[done < 60].all()
    assert tol < 1e-6 or len(set(done.tolist())) > 1
    for k in range(7):
        assert_same_bits(results, k, solve(one.only(k), way), 0)


@EVERY_WAY
def test_problems_that_share_a_warp_end_at_different_times(way: str) -> None:
    """One that asks for its error again and again takes more turns than its neighbour, which is done, far from its
    solution.
    """
    tol = torch.tensor([0.0, 1e-20], dtype=torch.float64)  # the second: r stays the same, its error is 7e-18
    problem = random_problem(2, 15, 15, seed=3, dtype=torch.float32)
    one = given(problem, [0.01, 1.0], tol=tol, max_iter=25, check_every=1)
    results = solve(one, way)
    assert results["n_iter"][0] == 25
    assert results["error"][0] > 1e-3
    for k in range(2):
        assert_same_bits(results, k, solve(one.only(k), way), 0)


@EVERY_WAY
@EVERY_REAL
def test_warm_start(way: str, dtype: torch.dtype) -> None:
    """5 iterations after 7 are 12; and a start far from the solution."""
    problem = random_problem(3, 10, 12, seed=9, dtype=dtype)
    one = given(problem, 0.05, max_iter=7)
    second = one._replace(init_g=solve(one, way)["g"], max_iter=5)
    ref = reference(one._replace(max_iter=12))
    out = output(solve(second, way))
    assert_same_solution(out, ref._replace(n_iter=out.n_iter), tolerance(dtype, 0.05, 10, 12, 12))
    far = 20 * torch.rand(3, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, ref = (x(second._replace(init_g=far, max_iter=3)) for x in (lambda x: output(solve(x, way)), reference))
    assert_same_solution(out, ref, tolerance(dtype, 0.05, 10, 12, 3, span=20.0))
    check_unrolled(second, way)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every other column": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "one after another entry": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4), value=math.nan)[:, 1:-4, 3:-2],
    "every other problem": lambda x: x.repeat_interleave(2, 0)[::2],
}


@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_strides(way: str, dtype: torch.dtype) -> None:
    """How a cost lies in memory does not change a bit, nor does a half type against its copy in float."""
    one = given(random_problem(3, 21, 18, seed=12, dtype=dtype), [0.1, 0.01, 0.5])
    one.cost[0, 0, :4] = torch.tensor([math.inf, 0.0, 1e-6, 2.0]).to(dtype)
    grads = cotangents(3, 21, 18, one.real)
    plain = solve(one, way, EVERYTHING, grads)
    for name, layout in LAYOUTS.items():
        cost = layout(one.cost)
        assert cost.stride() != one.cost.stride() or name == "one after another entry"
        assert_all_same_bits(solve(one._replace(cost=cost), way, EVERYTHING, grads), plain)
    assert_all_same_bits(solve(one, way, EVERYTHING, grads, cost_offset=1), plain)
    if dtype in (torch.float16, torch.bfloat16):
        assert_all_same_bits(solve(one._replace(cost=one.cost.float()), way, EVERYTHING, grads), plain)


@EVERY_WAY
@EVERY_REAL
def test_shared_and_strided_arguments(way: str, dtype: torch.dtype) -> None:
    """A cost, a row, a column and weights that the batch shares, by strides of zero; weights of every other entry."""
    problem = random_problem(3, 9, 14, seed=13, dtype=dtype)
    cost, a, b = problem
    grads = cotangents(3, 9, 14, dtype)
    for shared in (
        Problem(cost[:1].expand(3, 9, 14), a, b),
        Problem(cost[:, :1].expand(3, 9, 14), a, b),
        Problem(cost[:, :, :1].expand(3, 9, 14), a, b),
        Problem(cost, a[:1].expand(3, 9), b[:1].expand(3, 14)),
        Problem(cost, a.mT.contiguous().mT, b.repeat_interleave(2, 1)[:, ::2]),
    ):
        copied = Problem(*(x.contiguous() for x in shared))
        assert_all_same_bits(
            solve(given(shared, 0.1), way, EVERYTHING, grads), solve(given(copied, 0.1), way, EVERYTHING, grads)
        )


# --- Bits


def assert_same_bits(one: Results, k: int, other: Results, j: int) -> None:
    """Problem k of one run against problem j of another, whatever the sizes of the batches; all NaNs are the same."""
    assert one.keys() == other.keys()
    n_iter = int(other["n_iter"][j])
    for name, x in one.items():
        if name.endswith("_choice"):
            continue
        actual, expected = x[k], other[name][j]
        if name in ("history", "rebuilt"):  # the rest is not written
            actual, expected = actual[:n_iter], expected[:n_iter]
        assert torch.equal(actual.isnan(), expected.isnan()), name
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num()), name


def assert_all_same_bits(one: Results, other: Results) -> None:
    for k in range(len(one["value"])):
        assert_same_bits(one, k, other, k)


# A size for each tile, and for each way through a tier.
BIT_SIZES = {
    "registers": [(13, 16), (30, 21), (49, 49), (40, 63)],
    "shared": [(37, 20), (9, 300)],
    "one block": [(35, 20)],
    "gang": [(70, 35), (35, 300)],
}
EVERY_BIT_SIZE = pytest.mark.parametrize(("way", "n", "m"), sizes(BIT_SIZES))


@EVERY_BIT_SIZE
@EVERY_REAL
def test_order_of_threads_changes_no_bit(way: str, n: int, m: int, dtype: torch.dtype) -> None:
    """Nor does what was in memory before."""
    one = complete(dtype, 3, n, m, max_iter=4)
    grads = cotangents(3, n, m, dtype)
    first = solve(one, way, EVERYTHING, grads, seed=1)
    for seed in (2, 3):
        assert_all_same_bits(solve(one, way, EVERYTHING, grads, seed=seed), first)
    other = solve(one, way, EVERYTHING, grads, poison_float=1)
    del first["history"], other["history"]  # part of each slot is not written; the gradients have read the rest
    assert_all_same_bits(other, first)


@EVERY_BIT_SIZE
@EVERY_REAL
def test_neighbours_change_no_bit(way: str, n: int, m: int, dtype: torch.dtype) -> None:
    """Each problem alone, and with neighbours that start anew often, stop early or are spoilt."""
    one = complete(dtype, 5, n, m, seed=1, max_iter=7, check_every=2)
    one = one._replace(tol=torch.tensor([0.0, 0.0, 0.3, 0.0, 0.05], dtype=torch.float64))
    one.cost[3, n // 2, m // 2] = math.nan
    grads = cotangents(5, n, m, dtype)
    together = solve(one, way, EVERYTHING, grads)
    order = [4, 0, 3, 1, 2]
    moved = Given(*(x[order] if isinstance(x, Tensor) and len(x) == 5 else x for x in one))
    mixed = solve(moved, way, EVERYTHING, {name: x[order] for name, x in grads.items()})
    for k in range(5):
        alone = solve(one.only(k), way, EVERYTHING, {name: x[k : k + 1] for name, x in grads.items()})
        assert_same_bits(together, k, alone, 0)
        assert_same_bits(mixed, order.index(k), alone, 0)


@EVERY_REAL
@pytest.mark.parametrize(("n", "m"), [(100, 35), (70, 300)])
def test_size_of_the_gang_changes_no_bit(dtype: torch.dtype, n: int, m: int) -> None:
    one = complete(dtype, 2, n, m, max_iter=4)
    grads = cotangents(2, n, m, dtype)
    expected = solve(one, "one block", EVERYTHING, grads)
    blocks = set()
    for multiprocessors, per_multiprocessor in ((2, 2), (6, 1), (4, 2), (7, 4)):
        limits = {"multiprocessors": multiprocessors, "blocks_per_multiprocessor": per_multiprocessor}
        results = solve(one, "gang", EVERYTHING, grads, **limits)
        blocks.add(choice(results)["blocks_per_problem"])
        assert_all_same_bits(results, expected)
    most = math.ceil(n / 16)
    assert blocks == {2, 3, 4, most}
    # Without room for two, one gang takes them one after the other.
    results = solve(one, "gang", EVERYTHING, grads, workspace_bytes=1, multiprocessors=8)
    assert choice(results)["blocks_per_problem"] == most
    assert choice(results)["workspace_bytes"] == choice(expected)["workspace_bytes"]
    assert_all_same_bits(results, expected)


PADDED = {  # the size, and the sizes around it that take the same kernel
    "registers": [((3, 13), [(4, 16), (16, 13), (16, 16)]), ((33, 20), [(48, 33), (40, 40)]), ((17, 32), [(32, 32)])],
    "shared": [((7, 13), [(8, 13), (7, 16), (60, 300)]), ((33, 257), [(40, 270)])],
    "one block": [((7, 13), [(40, 300)]), ((33, 20), [(100, 20)])],
    "gang": [((40, 13), [(100, 30)])],
}


@pytest.mark.parametrize(
    ("way", "size", "around"), [(way, *sizes) for way, all_sizes in PADDED.items() for sizes in all_sizes]
)
@EVERY_REAL
def test_padding_changes_no_bit(
    way: str, size: tuple[int, int], around: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    n, m = size
    one = complete(dtype, 2, n, m, max_iter=5)
    grads = cotangents(2, n, m, dtype)
    plain = solve(one, way, EVERYTHING, grads)
    for wide_n, wide_m in around:
        fill = math.nan

        def pad(x: Tensor, *extra: int, value: float = fill) -> Tensor:
            return torch.nn.functional.pad(x, extra, value=value)

        rows, cols = wide_n - n, wide_m - m
        wide = one._replace(
            cost=pad(one.cost, 0, cols, 0, rows),
            a=pad(one.a, 0, rows),
            b=pad(one.b, 0, cols),
            init_g=pad(one.init_g, 0, cols),
        )
        paddings = {"": (), "n": (0, rows), "m": (0, cols), "nm": (0, cols, 0, rows)}
        results = solve(wide, way, EVERYTHING, {name: pad(x, *paddings[sides(name)]) for name, x in grads.items()})
        for step in ("forward", "unrolled"):
            names = ("tier", "tile_rows", "tile_cols")
            assert [choice(results, step)[k] for k in names] == [choice(plain, step)[k] for k in names]
        cut = {"": (), "n": (slice(n),), "m": (slice(m),), "nm": (slice(n), slice(m))}
        results = {name: x[(slice(None), *cut[sides(name)])] if sides(name) else x for name, x in results.items()}
        for name in ("history", "potentials"):  # laid out by n and m; what is in them has been compared
            del results[name]
        assert_all_same_bits(results, {name: plain[name] for name in results})


# --- What is asked for


@EVERY_WAY
def test_what_is_not_wanted_changes_no_bit(way: str) -> None:
    one = complete(torch.float32, 3, 20, 17, max_iter=11)
    grads = cotangents(3, 20, 17, torch.float32)
    everything = solve(one, way, EVERYTHING, grads)
    for name in ("plan", "history"):
        less = solve(one, way, "forward", **{f"want_{name}": 0})
        assert name not in less
        assert_all_same_bits(less, {name: everything[name] for name in less})
    for names in (("cost",), ("a",), ("b",), ("cost", "b")):
        less = solve(one, way, EVERYTHING, grads, **{f"want_grad_{name}": 0 for name in names})
        assert not any(f"{step}_grad_{name}" in less for step in ("envelope", "unrolled", "implicit") for name in names)
        assert_all_same_bits(less, {name: everything[name] for name in less})


def test_too_large_for_shared_memory() -> None:
    one = given(random_problem(1, 100, 100, dtype=torch.float64), 0.1)
    with pytest.raises(RuntimeError, match="too large for the shared memory"):
        solve(one, "shared", shared_bytes_per_block=48 << 10)
    small = {"shared_bytes_per_block": 48 << 10, "tier": "any"}
    results = solve(one, "gang", "forward unrolled", cotangents(1, 100, 100, torch.float64), **small)
    assert [tier_of(results, step) for step in ("forward", "unrolled")] == ["stream", "stream"]


@EVERY_WAY
def test_empty_batch(way: str) -> None:
    one = given(random_problem(0, 4, 5), torch.empty(0))
    results = solve(one, way, EVERYTHING, cotangents(0, 4, 5, torch.float64))
    assert results["plan"].shape == (0, 4, 5)


# --- Random problems against the CPU kernels


def random_given(seed: int) -> tuple[str, Given, int]:
    """Any tier, size, type and combination of arguments; and how many iterations keep what is special about it."""
    random = np.random.default_rng(seed)
    way = random.choice(list(WAYS))
    dtype = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16][random.integers(5)]
    most = 64 if way == "registers" else 90
    batch, n, m = (int(random.integers(1, high)) for high in (6, most + 1, most + 1))
    generator = torch.Generator().manual_seed(seed)
    problem = random_problem(
        batch, n, m, seed=seed, dtype=dtype, zero_weights=bool(random.random() < 0.4), mass=[1.0, 0.25, 8.0][seed % 3]
    )
    options: dict[str, Any] = {}
    if random.random() < 0.4:
        options["row_lengths"] = torch.randint(1, n + 1, (batch,), generator=generator)
        options["col_lengths"] = torch.randint(1, m + 1, (batch,), generator=generator)
    if random.random() < 0.3:
        options["init_g"] = 0.3 * torch.randn(batch, m, generator=generator).to(problem.b)
    if random.random() < 0.3:
        problem.cost[torch.rand(problem.cost.shape, generator=generator) < 0.1] = math.inf
    if random.random() < 0.2:
        problem.cost[-1, n // 2, m // 2] = math.nan
    eps = torch.exp(torch.empty(batch, dtype=torch.float64).uniform_(-5.5, 1.0, generator=generator))
    one = given(
        problem,
        eps,
        tol=float(random.choice([0.0, 1e-2])),
        max_iter=int(random.choice([1, 2, 7, 20])),
        check_every=int(random.choice([1, 3, 10])),
        **options,
    )
    if random.random() < 0.3:
        one = one._replace(a=None, b=None)
    return way, one


def check_against_cpu(seed: int) -> None:
    way, one = random_given(seed)
    batch, n, m = one.cost.shape
    cpu = cpu_forward(one)
    results = solve(one, way, seed=seed)
    # Where the error is at its tolerance but for rounding, one may go on and the other stop.
    same = [k for k in range(batch) if results["n_iter"][k] == cpu["n_iter"][k]]
    assert len(same) >= batch - 1
    for k in same:
        mass = 1.0 if one.a is None else max(1e-3, float(one.a[k].sum()))
        tol = tolerance(one.cost.dtype, float(one.eps[k]), n, m, max(1, int(cpu["n_iter"][k])), span=2.0)
        doubled = type(tol)(*(2 * x for x in tol))  # each is off by one
        ours, theirs = (output({name: x[name][k : k + 1] for name in FIELDS}) for x in (results, cpu))
        if theirs.value.isnan():
            torch.testing.assert_close(list(ours), list(theirs), equal_nan=True)
        else:
            assert_same_solution(ours, theirs, doubled, mass=mass)
    grads = cotangents(batch, n, m, one.real)
    grads = {name: x for number, (name, x) in enumerate(grads.items()) if seed >> number & 1 or name == "value"}
    check_implicit(one, way, grads)
    if len(same) < batch:
        return
    results = solve(one, way, "forward unrolled", grads, seed=seed)
    expected = OPS.sinkhorn_unrolled_backward(
        *arguments(one),
        *(cpu[name] for name in FOR_GRADIENTS),
        *(grads.get(name) for name in OUTPUTS),
        True,
        True,
        True,
    )
    # The gradient of a weight of zero itself grows beyond all bounds at a small eps.
    for name, weights, theirs in (("unrolled_grad_a", one.a, expected[1]), ("unrolled_grad_b", one.b, expected[2])):
        if weights is not None:
            results[name][weights == 0] = theirs[weights == 0] = 0
    for k in range(batch):
        rtol = 2 * gradient_rtol(one.real, float(one.eps[k]), n, m, max(1, int(cpu["n_iter"][k])))
        assert_close_gradients(results, "unrolled", k, [x[k].double() for x in expected], rtol)


# In 98, an entry of K between two zero weights overflows when it is scaled.
SEEDS = [*range(12), 98]


@pytest.mark.parametrize(
    "seed", [pytest.param(k, marks=() if k in SEEDS else pytest.mark.simt_full) for k in range(300)]
)
def test_random_problems_against_the_cpu(seed: int) -> None:
    check_against_cpu(seed)
