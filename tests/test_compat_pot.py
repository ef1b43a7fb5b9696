"""`otface_cuda.compat.pot` against POT itself: values, plans, potentials, gradients, iteration counts, errors."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from otface_cuda.compat import _pot_costs, pot
from otface_cuda.compat._solver import Solver

from .problems import random_problem

EPS = 0.1
SIZES = [(3, 9, 14), (1, 14, 9), (2, 1, 5)]
ITERATIONS = [1, 2, 10, 11, 50]
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sinkhorn did not converge")
        yield


@pytest.fixture
def ot() -> Any:
    pytest.importorskip("ot.batch")
    import ot

    return ot


def close(dtype: torch.dtype, factor: float = 1.0) -> dict[str, float]:
    """A logarithm of size M / eps = 10 is rounded to 10 units of the dtype, in POT as often as it iterates, and its
    exponential is off by as much: 100 units, relative to entries of up to 1, and ten times as much for the sums."""
    unit = torch.finfo(dtype).eps
    return {"rtol": 1000 * unit * factor, "atol": 100 * unit * factor}


def problem(
    size: tuple[int, int, int], dtype: torch.dtype, uniform: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    cost, a, b = random_problem(*size, seed=sum(size), dtype=dtype)
    return (cost, None, None) if uniform else (cost, a, b)


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors if x is not None]


def without_constant(u: Tensor, v: Tensor) -> Tensor:
    return u[:, :, None] + v[:, None, :]


@pytest.mark.parametrize(
    "name", ["solve_batch", "solve_sample_batch", "dist_batch", "loss_linear_batch", "loss_linear_samples_batch"]
)
def test_signatures_of_batch(name: str, ot: Any) -> None:
    assert_same_signature(getattr(pot, name), getattr(ot.batch, name))


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn2"])
def test_signatures_of_sinkhorn(name: str, ot: Any) -> None:
    assert_same_signature(getattr(pot, name), getattr(ot, name))


def assert_same_signature(ours: Any, theirs: Any) -> None:
    expected = [(p.name, p.default, p.kind) for p in inspect.signature(theirs).parameters.values()]
    actual = [(p.name, p.default, p.kind) for p in inspect.signature(ours).parameters.values()]
    assert [p for p in actual if p[2] != inspect.Parameter.KEYWORD_ONLY] == expected


@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
def test_batch_after_iterations(
    size: tuple[int, int, int], dtype: torch.dtype, uniform: bool, iterations: int, reg_type: str, ot: Any
) -> None:
    cost, a, b = problem(size, dtype, uniform)
    options: dict[str, Any] = {"max_iter": iterations, "tol": 0.0, "reg_type": reg_type, "grad": "detach"}
    theirs = ot.batch.solve_batch(cost, EPS, a, b, **options)
    ours = pot.solve_batch(cost, EPS, a, b, **options)
    assert_same_result(ours, theirs, close(dtype))


def assert_same_result(ours: pot.OTResult, theirs: Any, tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(ours.plan, theirs.plan, **tolerance)
    torch.testing.assert_close(ours.value, theirs.value, **tolerance)
    torch.testing.assert_close(ours.value_linear, theirs.value_linear, **tolerance)
    # Logarithms of about 10: an absolute error of 10 units more than the plan's
    torch.testing.assert_close(
        without_constant(*ours.potentials), without_constant(*theirs.potentials), rtol=10 * tolerance["rtol"], atol=0
    )
    assert ours.log == theirs.log
    assert ours.n_iter == theirs.log["n_iter"] + 1
    assert ours.status is theirs.status is None
    torch.testing.assert_close(ours.marginals, (theirs.plan.sum(2), theirs.plan.sum(1)), **tolerance)
    assert ours.potential_a is ours.potentials[0]
    assert ours.potential_b is ours.potentials[1]


@pytest.mark.parametrize("method", ["auto", "log_sinkhorn", "sinkhorn"])
def test_batch_methods(method: str, ot: Any) -> None:
    """The scalings of "sinkhorn" multiply, where POT has them in float32 for whatever cost: hence float32."""
    cost, a, b = problem((3, 9, 14), torch.float32, False)
    theirs = ot.batch.solve_batch(cost, EPS, a, b, 20, 0.0, method)
    ours = pot.solve_batch(cost, EPS, a, b, 20, 0.0, method)
    torch.testing.assert_close(ours.plan, theirs.plan, **close(torch.float32))
    u, v = ours.potentials
    if method == "sinkhorn":
        u, v = u.log(), v.log()
    torch.testing.assert_close(
        (u[:, :, None] + v[:, None, :] - cost / EPS).exp(), theirs.plan, **close(torch.float32, 10)
    )


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("tol", [1.0, 1e-2, 1e-4, 1e-6, 1e-10])
@pytest.mark.parametrize("max_iter", [1, 5, 31, 300, 3000])
def test_batch_stops_where_pot_does(tol: float, max_iter: int, uniform: bool, ot: Any) -> None:
    cost, a, b = problem((3, 9, 14), torch.float64, uniform)
    for eps in (1.0, 0.02):
        theirs = ot.batch.solve_batch(cost, eps, a, b, max_iter, tol)
        ours = pot.solve_batch(cost, eps, a, b, max_iter, tol)
        assert ours.log == theirs.log
        torch.testing.assert_close(ours.plan, theirs.plan, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.value, theirs.value, rtol=1e-9, atol=1e-12)


def test_the_tolerances_above_stop_at_different_iterations() -> None:
    """Else the test of the counts would say nothing."""
    cost, a, b = problem((3, 9, 14), torch.float64, False)
    counts = [pot.solve_batch(cost, 0.02, a, b, 3000, tol).log["n_iter"] for tol in (1.0, 1e-2, 1e-4, 1e-6, 1e-10)]
    assert counts == sorted(set(counts))


def weighted(result: Any, cost: Tensor) -> Tensor:
    """One number of plan, value and value_linear."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(cost.shape, generator=generator, dtype=torch.float64).to(cost.dtype)
    return (result.plan * weights).sum() + (result.value * weights[:, 0, 0]).sum() + 2 * result.value_linear.sum()


@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
@pytest.mark.parametrize("method", ["log_sinkhorn", "sinkhorn"])
def test_autodiff_in_the_costs(method: str, reg_type: str, uniform: bool, iterations: int, ot: Any) -> None:
    cost, a, b = problem((3, 9, 14), torch.float64, uniform)
    gradients = []
    for solve in (ot.batch.solve_batch, pot.solve_batch):
        (leaf,) = leaves(cost)
        result = solve(leaf, EPS, a, b, iterations, 0.0, method, reg_type=reg_type, grad="autodiff")
        gradients.append(torch.autograd.grad(weighted(result, cost), leaf)[0])
    # POT's ones of the method "sinkhorn" are float32, but exactly 1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
def test_autodiff_in_the_weights(reg_type: str, ot: Any) -> None:
    """In a as POT; in b too, up to what is left of the start, which is held constant: less with each iteration."""
    problems = problem((2, 9, 14), torch.float64, False)
    differences = []
    for iterations in (1, 5, 20, 150):
        gradients = []
        for solve in (ot.batch.solve_batch, pot.solve_batch):
            inputs = leaves(*problems)
            result = solve(inputs[0], EPS, *inputs[1:], iterations, 0.0, reg_type=reg_type, grad="autodiff")
            gradients.append(torch.autograd.grad(weighted(result, problems[0]), inputs))
        torch.testing.assert_close(gradients[1][:2], gradients[0][:2], rtol=1e-9, atol=1e-10)
        differences.append(float((gradients[1][2] - gradients[0][2]).norm() / gradients[0][2].norm()))
    assert differences == sorted(differences, reverse=True)
    assert differences[0] > 1e-3
    assert differences[-1] < 1e-6


@pytest.mark.parametrize("uniform", [True, False])
def test_last_step(uniform: bool, ot: Any) -> None:
    """Values as POT. The gradient as that of the last iteration, in full: POT leaves out M in exp(u + v - M / reg)."""
    cost, a, b = problem((2, 9, 14), torch.float64, uniform)
    theirs = ot.batch.solve_batch(cost, EPS, a, b, 12, 0.0, grad="last_step")
    (leaf,) = leaves(cost)
    ours = pot.solve_batch(leaf, EPS, a, b, 12, 0.0, grad="last_step")
    assert_same_result(
        pot.OTResult(*(x.detach() if isinstance(x, Tensor) else x for x in ours)), theirs, close(cost.dtype)
    )
    (actual,) = torch.autograd.grad(weighted(ours, cost), leaf)

    before = ot.batch.solve_batch(cost, EPS, a, b, 12, 0.0, grad="detach")
    log_a = torch.full(cost.shape[:2], 1 / 9, dtype=cost.dtype).log() if a is None else a.log()
    log_b = torch.full(cost[:, 0].shape, 1 / 14, dtype=cost.dtype).log() if b is None else b.log()
    K = -leaf / EPS
    u = log_a - (K + before.potentials[1][:, None, :]).logsumexp(2)
    v = log_b - (K + u[:, :, None]).logsumexp(1)
    plan = (K + u[:, :, None] + v[:, None, :]).exp()
    linear = (plan * leaf).sum((1, 2))
    value = linear + EPS * (plan * plan.log()).sum((1, 2))
    expected = weighted(pot.OTResult(value, linear, (u, v), plan, {}), cost)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaf)[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
def test_envelope(reg_type: str, ot: Any) -> None:
    """In M as POT. In a and b, which POT has not, as differentiating to convergence, but for a constant."""
    problems = problem((2, 9, 14), torch.float64, False)
    gradients = []
    for solve, grad in (
        (ot.batch.solve_batch, "envelope"),
        (pot.solve_batch, "envelope"),
        (pot.solve_batch, "autodiff"),
    ):
        inputs = leaves(*problems)
        result = solve(inputs[0], EPS, *inputs[1:], 500, 0.0, reg_type=reg_type, grad=grad)
        gradients.append(torch.autograd.grad(result.value.sum(), inputs, retain_graph=True, allow_unused=True))
        if grad == "envelope":
            assert not result.plan.requires_grad
            (linear,) = torch.autograd.grad(result.value_linear.sum(), inputs[:1])
            torch.testing.assert_close(linear, result.plan, rtol=1e-9, atol=1e-12)
    theirs, envelope, autodiff = gradients
    torch.testing.assert_close(envelope[0], theirs[0], rtol=1e-9, atol=1e-12)
    for one, other in zip(envelope[1:], autodiff[1:], strict=True):
        torch.testing.assert_close(one, other - other.mean(1, keepdim=True), rtol=1e-6, atol=1e-8)


def test_detach() -> None:
    inputs = leaves(*problem((2, 9, 14), torch.float64, False))
    for reg_type in ("kl", "entropy"):
        result = pot.solve_batch(inputs[0], EPS, *inputs[1:], 5, reg_type=reg_type, grad="detach")
        outputs = (result.value, result.value_linear, result.plan, *result.potentials)
        assert not any(x.requires_grad for x in outputs)


def test_a_forbidden_pair_is_no_nan() -> None:
    cost, a, b = problem((2, 5, 6), torch.float64, False)
    allowed = cost.clone()
    cost[0, 1, 2], allowed[0, 1, 2] = torch.inf, 1e3
    for grad in ("envelope", "autodiff", "last_step"):
        results = []
        for M in (cost, allowed):
            (leaf,) = leaves(M)
            result = pot.solve_batch(leaf, EPS, a, b, 50, reg_type="KL", grad=grad)
            (gradient,) = torch.autograd.grad(result.value.sum() + result.value_linear.sum(), leaf)
            results.append((result.plan.detach(), result.value.detach(), gradient))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
def test_zero_weights(reg_type: str, ot: Any) -> None:
    """No plan and no NaN. From the second iteration on POT's start, which weighs such columns, is all but forgotten."""
    cost, a, b = random_problem(2, 9, 14, seed=3, zero_weights=True)
    assert (a == 0).any()
    assert (b == 0).any()
    theirs = ot.batch.solve_batch(cost, 0.3, a, b, 60, 0.0, reg_type="entropy")
    inputs = leaves(cost, a, b)
    ours = pot.solve_batch(inputs[0], 0.3, *inputs[1:], 60, 0.0, reg_type=reg_type)
    torch.testing.assert_close(ours.plan, theirs.plan, rtol=1e-8, atol=1e-12)
    if reg_type == "entropy":
        torch.testing.assert_close(ours.value.detach(), theirs.value, rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(ours.value.sum(), inputs)
    assert all(x.isfinite().all() for x in (ours.value, *gradients))


@pytest.mark.parametrize("tol", [0.0, 1e-6])
@pytest.mark.parametrize("grad", ["envelope", "autodiff", "last_step", "detach"])
def test_an_empty_batch_has_empty_results(grad: str, tol: float) -> None:
    M = torch.zeros(0, 3, 4, requires_grad=True)
    res = pot.solve_batch(M, EPS, torch.zeros(0, 3), torch.full((4,), 0.25), tol=tol, grad=grad)
    shapes = [(0,), (0,), (0, 3), (0, 4), (0, 3, 4)]
    assert [x.shape for x in (res.value, res.value_linear, *res.potentials, res.plan)] == shapes
    if grad != "detach":
        res.value.sum().backward()
        assert M.grad.shape == (0, 3, 4)
    assert pot.solve_sample_batch(torch.zeros(0, 3, 2), torch.zeros(0, 4, 2), EPS, tol=tol, grad=grad).value.shape == (
        0,
    )


def test_an_unsolvable_problem_does_not_delay_the_others() -> None:
    cost, a, b = problem((3, 5, 6), torch.float64, False)
    expected = pot.solve_batch(cost[1:], EPS, a[1:], b[1:], tol=1e-4)
    cost[0, 0, 0] = torch.nan
    actual = pot.solve_batch(cost, EPS, a, b, tol=1e-4)
    assert actual.plan[0].isnan().all()
    assert actual.log == expected.log
    torch.testing.assert_close(actual.plan[1:], expected.plan)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("grad", ["envelope", "autodiff", "last_step", "detach"])
def test_lengths_and_one_reg_each(uniform: bool, grad: str) -> None:
    """A padded problem is the problem, whatever the padding holds; with its own reg."""
    cost, a, b = problem((1, 5, 6), torch.float64, uniform)
    padded = torch.full((2, 7, 8), torch.nan, dtype=cost.dtype)
    padded[:, :5, :6] = cost
    weights = [None if x is None else torch.nn.functional.pad(x, (0, 2)).expand(2, -1) for x in (a, b)]
    regs, lengths = torch.tensor([0.1, 0.3]), (torch.tensor([5, 5]), torch.tensor([6, 6]))
    inputs = leaves(padded, *weights)
    options: dict[str, Any] = {"max_iter": 21, "tol": 0.0, "grad": grad, "reg_type": "kl"}
    result = pot.solve_batch(inputs[0], regs, *inputs[1:], **options, row_lengths=lengths[0], col_lengths=lengths[1])
    for k, reg in enumerate(regs.tolist()):
        alone = leaves(cost, a, b)
        expected = pot.solve_batch(alone[0], reg, *alone[1:], **options)
        torch.testing.assert_close(result.plan[k : k + 1, :5, :6], expected.plan, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result.value[k : k + 1], expected.value, rtol=1e-9, atol=1e-12)
        if grad != "detach":
            actual = torch.autograd.grad(result.value[k], inputs, retain_graph=True)
            for ours, other in zip(actual, torch.autograd.grad(expected.value.sum(), alone), strict=True):
                cut = ours[k][tuple(slice(size) for size in other.shape[1:])]
                torch.testing.assert_close(cut, other[0], rtol=1e-8, atol=1e-10)


def test_half_precision_costs() -> None:
    cost, a, b = problem((2, 5, 6), torch.float64, False)
    half = cost.bfloat16().requires_grad_()
    result = pot.solve_batch(half, EPS, a, b)
    torch.testing.assert_close(result.plan, pot.solve_batch(half.detach().float(), EPS, a, b).plan)
    result.value.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("metric", "p"),
    [("sqeuclidean", 2), ("euclidean", 2), ("Minkowski", 3), ("minkowski", 1), ("minkowski", 2.5), ("kl", 2)],
)
def test_dist_batch(metric: str, p: float, dtype: torch.dtype, ot: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(3, 4, size, generator=generator, dtype=dtype).mT + 0.1 for size in (5, 7))
    results = []
    for module in (ot.batch, pot):
        inputs = leaves(x, y)
        cost = module.dist_batch(*inputs, metric=metric, p=p)
        results.append((cost.detach(), *torch.autograd.grad((cost * cost.detach()).sum(), inputs)))
    torch.testing.assert_close(results[1], results[0], **close(dtype))
    torch.testing.assert_close(pot.dist_batch(x, metric=metric, p=p), pot.dist_batch(x, x, metric=metric, p=p))
    plan = results[0][0]
    torch.testing.assert_close(
        pot.loss_linear_samples_batch(x, y, plan, metric),
        ot.batch.loss_linear_samples_batch(x, y, plan, metric),
        **close(dtype),
    )
    torch.testing.assert_close(pot.loss_linear_batch(plan, plan), ot.batch.loss_linear_batch(plan, plan))


def test_losses_of_expanded_batches(ot: Any) -> None:
    """As POT: sizes of 1, in either of the two; gradients are summed over what was expanded."""
    generator = torch.Generator().manual_seed(0)
    M, T = (torch.rand(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for given in ((M[:1], T), (M, T[:1]), (M[:, :1], T[:, :, :1]), (M[:1].expand(3, -1, -1), T)):
        results = []
        for module in (ot.batch, pot):
            inputs = leaves(*given)
            loss = module.loss_linear_batch(*inputs)
            results.append((loss.detach(), *torch.autograd.grad((loss * loss.detach()).sum(), inputs)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-14, atol=0)


def test_infinite_costs_in_the_loss() -> None:
    """Where there is no plan they are nothing, in the gradient too; where there is one the loss is infinite."""
    M = torch.tensor([[[1.0, torch.inf]], [[2.0, torch.inf]]])
    T = torch.tensor([[[0.5, 0.0]], [[0.5, 0.5]]], requires_grad=True)
    loss = pot.loss_linear_batch(M, T)
    assert loss.tolist() == [0.5, torch.inf]
    (gradient,) = torch.autograd.grad(loss[0], T)
    assert gradient[0].tolist() == [[1.0, 0.0]]
    assert pot.loss_linear_batch(torch.tensor([[[torch.nan]]]), torch.zeros(1, 1, 1)).isnan()


def test_integers(ot: Any) -> None:
    """Costs, plans and samples: as of torch's default dtype, where POT computes distances in integers."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randint(10, (2, 4, 5), generator=generator)
    theirs, ours = (module.solve_batch(M, 2.0, tol=0.0, max_iter=20) for module in (ot.batch, pot))
    assert_same_result(ours, theirs, close(torch.float32))
    assert ours.plan.dtype == theirs.plan.dtype == torch.float32
    assert torch.equal(ours.plan, pot.solve_batch(M.float(), 2.0, tol=0.0, max_iter=20).plan)
    a, b = torch.full((4,), 1 / 4), torch.full((5,), 1 / 5)
    for name in ("sinkhorn", "sinkhorn2"):
        theirs, ours = (getattr(module, name)(a, b, M[0].int(), 2.0, stopThr=1e-4) for module in (ot, pot))
        torch.testing.assert_close(ours, theirs, **close(torch.float32))
    for metric in ("sqeuclidean", "minkowski"):
        theirs, ours = (module.dist_batch(M, M + 1, metric).float() for module in (ot.batch, pot))
        torch.testing.assert_close(ours, theirs, **close(torch.float32))
    torch.testing.assert_close(pot.loss_linear_batch(M, M), ot.batch.loss_linear_batch(M, M).float())


def test_what_a_result_has(ot: Any) -> None:
    """Every public attribute of POT's, but those that are not implemented there."""
    M = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    theirs, ours = (module.solve_batch(M, 1.0) for module in (ot.batch, pot))
    names = [name for name in dir(theirs) if not name.startswith("_") and name not in ("a_to_b", "b_to_a")]
    assert {"sparse_plan", "lazy_plan", "value_quad", "citation", "status"} < set(names)
    assert [name for name in names if not hasattr(ours, name)] == []
    assert ours.lazy_plan is theirs.lazy_plan is None
    assert ours.value_quad is theirs.value_quad is None
    assert ours.sparse_plan is ours.plan
    torch.testing.assert_close(ours.sparse_plan, theirs.sparse_plan, **close(torch.float32))
    assert "22(78)" in ours.citation
    assert "22(78)" in theirs.citation


@pytest.mark.parametrize("grad", ["envelope", "autodiff", "last_step", "detach"])
def test_no_problems(grad: str) -> None:
    """An empty batch in, an empty batch out; POT fails."""
    M = torch.empty(0, 4, 5, requires_grad=True)
    result = pot.solve_batch(M, 1.0, torch.full((4,), 0.25), None, 50, grad=grad)
    assert [x.shape for x in (result.value, result.plan, *result.potentials)] == [(0,), (0, 4, 5), (0, 4), (0, 5)]
    assert pot.loss_linear_batch(M, M).shape == (0,)
    assert pot.dist_batch(M).shape == (0, 4, 4)


@pytest.mark.parametrize(("metric", "p"), [("euclidean", 2), ("minkowski", 2), ("minkowski", 3), ("minkowski", 1.5)])
@pytest.mark.parametrize("samples", [1, 40])
def test_no_gradient_where_samples_coincide(metric: str, p: float, samples: int) -> None:
    """Of one sample, and of so many that the powers of p are computed in another way."""
    y = torch.ones(1, samples, 3)
    x = y.clone().requires_grad_()
    distances = pot.dist_batch(x, y, metric=metric, p=p)
    assert (distances == 0).all()
    (gradient,) = torch.autograd.grad(distances.sum(), x)
    assert (gradient == 0).all()


@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3, 4.5])
@pytest.mark.parametrize("few", [0, _pot_costs.MANY])
def test_minkowski_in_both_ways(p: float, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all powers at once and with torch.cdist, some samples equal and some coordinates."""
    monkeypatch.setattr(_pot_costs, "FEW", few)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, size, 3, generator=generator, dtype=torch.float64) for size in (5, 7))
    y[:, 0], y[:, 1, 1] = x[:, 0], x[:, 1, 1]
    inputs = leaves(x, y)
    distances = pot.dist_batch(*inputs, metric="minkowski", p=p)
    expected = torch.stack([torch.cdist(*pair, p=p) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(distances.detach(), expected, rtol=1e-13, atol=0)
    factors = torch.rand(distances.shape, generator=generator, dtype=torch.float64)
    actual = torch.autograd.grad((distances * factors).sum(), inputs)
    # d |v|_p / dv = sign(v) (|v| / |v|_p)^(p - 1), and 0 for v = 0 and, where p < 1, for a coordinate of 0
    v = x[:, :, None] - y[:, None]
    slope = v.sign() * torch.where(v == 0, 1, v.abs() / expected.masked_fill(expected == 0, 1)[..., None]) ** (p - 1)
    slope = slope * factors[..., None]
    for gradient, wanted in zip(actual, (slope.sum(2), -slope.sum(1)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)


def test_solve_sample_batch(ot: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(3, size, 2, generator=generator, dtype=torch.float64) for size in (5, 7))
    results = []
    for module in (ot.batch, pot):
        inputs = leaves(x, y)
        result = module.solve_sample_batch(*inputs, EPS, metric="euclidean")
        results.append((result.value.detach(), result.plan, *torch.autograd.grad(result.value.sum(), inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
    padded = torch.cat([x, x.new_full((3, 2, 2), torch.nan)], 1).requires_grad_()
    actual = pot.solve_sample_batch(padded, y, EPS, metric="euclidean", row_lengths=torch.tensor([5, 5, 5]))
    torch.testing.assert_close(actual.value, results[1][0], rtol=1e-9, atol=1e-11)
    actual.value.sum().backward()
    torch.testing.assert_close(padded.grad[:, :5], results[1][2], rtol=1e-8, atol=1e-10)


def single(dtype: torch.dtype = torch.float64, hists: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    cost, a, b = random_problem(max(hists, 1), 9, 14, seed=2, dtype=dtype)
    return a[0], b.mT if hists else b[0], cost[0]


@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hists", [0, 3])
@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn2"])
def test_sinkhorn(name: str, hists: int, dtype: torch.dtype, method: str, iterations: int, ot: Any) -> None:
    """Values and gradients; that of a up to what is left of the start."""
    inputs = single(dtype, hists)
    results = []
    for module in (ot, pot):
        args = leaves(*inputs)
        result = getattr(module, name)(*args, EPS, method, iterations, 0.0)
        weights = torch.linspace(1, 2, result.numel(), dtype=dtype).reshape(result.shape)
        results.append((result.detach(), *torch.autograd.grad((result * weights).sum(), args)))
    (theirs, their_a, *their_gradients), (ours, our_a, *gradients) = results
    torch.testing.assert_close(ours, theirs, **close(dtype))
    # Gradients are of size M / eps = 10, and sums of as many rounded terms as there are iterations
    torch.testing.assert_close(gradients, their_gradients, **close(dtype, 10))
    if iterations == 50:
        torch.testing.assert_close(our_a, their_a, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("threshold", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("iterations", [1, 15, 21, 1000])
def test_sinkhorn_log(method: str, threshold: float, iterations: int, ot: Any) -> None:
    a, b, cost = single()
    theirs, their_log = ot.sinkhorn(a, b, cost, 0.03, method, iterations, threshold, log=True)
    ours, log = pot.sinkhorn(a, b, cost, 0.03, method, iterations, threshold, log=True)
    assert log["niter"] == their_log["niter"]
    assert set(log) >= set(their_log)
    torch.testing.assert_close(log["err"], their_log["err"], rtol=1e-4, atol=1e-14)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        torch.outer(log["u"], log["v"]), torch.outer(their_log["u"], their_log["v"]), rtol=1e-8, atol=0
    )
    # The jump, which there is without a log, ends at the same iteration
    torch.testing.assert_close(
        pot.sinkhorn(a, b, cost, 0.03, method, iterations, threshold), theirs, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("threshold", [1e-2, 1e-4, 1e-8])
def test_several_right_hand_sides_stop_together(threshold: float, ot: Any) -> None:
    a, b, cost = single(hists=3)
    theirs, their_log = ot.sinkhorn(a, b, cost, 0.03, stopThr=threshold, log=True)
    ours, log = pot.sinkhorn(a, b, cost, 0.03, stopThr=threshold, log=True)
    assert log["niter"] == their_log["niter"] >= 20
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(log["err"], their_log["err"], rtol=1e-4, atol=1e-14)
    assert log["u"].shape == their_log["u"].shape
    torch.testing.assert_close(log["u"] * log["v"][:1], their_log["u"] * their_log["v"][:1], rtol=1e-8, atol=0)
    torch.testing.assert_close(pot.sinkhorn2(a, b, cost, 0.03, stopThr=threshold), theirs, rtol=1e-9, atol=1e-12)
    each = ot.sinkhorn2(a, b, cost, 0.03, "sinkhorn_log", stopThr=threshold)
    torch.testing.assert_close(
        pot.sinkhorn2(a, b, cost, 0.03, "sinkhorn_log", stopThr=threshold), each, rtol=1e-9, atol=1e-12
    )
    one, one_log = pot.sinkhorn(a, b[:, :1], cost, 0.03, "sinkhorn_log", log=True)  # a TypeError in POT
    torch.testing.assert_close(one, pot.sinkhorn2(a, b[:, 0], cost, 0.03)[None], rtol=1e-9, atol=1e-12)
    assert one_log["v"].shape == (14, 1)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("hists", [0, 2])
def test_warmstart(method: str, hists: int, ot: Any) -> None:
    a, b, cost = single(hists=hists)
    generator = torch.Generator().manual_seed(3)
    start: Any = tuple(torch.randn(size, *b.shape[1:], generator=generator, dtype=torch.float64) for size in (9, 14))
    if hists and method == "sinkhorn_log":
        start = list(zip(start[0].mT, start[1].mT, strict=True))
    theirs = ot.sinkhorn(a, b, cost, EPS, method, 2, 0.0, warmstart=start)
    ours = pot.sinkhorn(a, b, cost, EPS, method, 2, 0.0, warmstart=start)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert (ours - pot.sinkhorn(a, b, cost, EPS, method, 2, 0.0)).abs().max() > 1e-6


def test_empty_weights_are_uniform(ot: Any) -> None:
    _, _, cost = single()
    empty = cost.new_empty(0)
    torch.testing.assert_close(pot.sinkhorn([], [], cost, EPS), ot.sinkhorn([], [], cost, EPS), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pot.sinkhorn(empty, empty, cost, EPS), pot.sinkhorn([], [], cost, EPS))


def test_small_reg_does_not_underflow(ot: Any) -> None:
    """POT gives up with a warning and the solution before; the log domain goes on."""
    a, b, cost = single()
    with pytest.warns(UserWarning, match="numerical errors"):
        ot.sinkhorn(a, b, cost, 1e-4)
    ours = pot.sinkhorn(a, b, cost, 1e-4, numItermax=100)
    theirs = ot.sinkhorn(a, b, cost, 1e-4, "sinkhorn_log", numItermax=100)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_warning_and_printing(capsys: pytest.CaptureFixture[str]) -> None:
    args = (*single(), 0.01)
    with pytest.warns(UserWarning, match="Sinkhorn did not converge"):
        pot.sinkhorn(*args, numItermax=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pot.sinkhorn2(*args, numItermax=3)
        pot.sinkhorn(*args, numItermax=3, warn=False)
        pot.sinkhorn(*args[:3], 1.0)
        assert capsys.readouterr().out == ""
        pot.sinkhorn2(*args, numItermax=15, verbose=True)
    assert [line.split("|")[0].strip() for line in capsys.readouterr().out.splitlines()] == ["It.", "0", "10"]


def test_a_tolerance_below_rounding_takes_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default stopThr with float32: all iterations, as in POT, but not in a hundred calls."""
    calls = []

    def count(solver: Solver, max_iter: int, *args: Any, **options: Any) -> Any:
        calls.append(max_iter)
        return solve(solver, max_iter, *args, **options)

    solve = Solver.__call__
    monkeypatch.setattr(Solver, "__call__", count)
    inputs = single(torch.float32)
    plan = pot.sinkhorn(*inputs, 0.1)
    assert sum(calls) >= 1000
    assert len(calls) < 30
    torch.testing.assert_close(plan, pot.sinkhorn(*inputs, 0.1, numItermax=1000, stopThr=0.0))


A, B, M = torch.full((2,), 0.5), torch.full((3,), 1 / 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pot.solve_batch(M[None].numpy(), 1.0), TypeError, r"solve_batch: `M` .*torch.from_numpy.* a ndarray"),
        (lambda: pot.solve_batch(M, 1.0), ValueError, r"solve_batch: `M` must be of shape \(B, ns, nt\)"),
        (lambda: pot.solve_batch(M[None]), ValueError, r"proximal.*ot.batch.solve_batch"),
        (lambda: pot.solve_batch(M[None], 0), ValueError, r"proximal.*ot.batch.solve_batch"),
        (lambda: pot.solve_batch(M[None], 1.0, method="proximal"), ValueError, r"proximal.*ot.batch.solve_batch"),
        (lambda: pot.solve_batch(M[None], None, method="sinkhorn"), ValueError, r"`reg` must be positive, got None"),
        (lambda: pot.solve_batch(M[None], -1.0), ValueError, r"`reg` must be positive"),
        (lambda: pot.solve_batch(M[None], 1.0, method="x"), ValueError, r"`method` must be 'auto'.*got 'x'"),
        (lambda: pot.solve_batch(M[None], 1.0, reg_type="x"), ValueError, r"`reg_type` must be 'kl' or 'entropy'"),
        (lambda: pot.solve_batch(M[None], 1.0, grad="x"), ValueError, r"`grad` must be 'detach'"),
        (lambda: pot.solve_batch(M[None], 1.0, max_iter=0), ValueError, r"`max_iter` must be at least 1"),
        (lambda: pot.solve_batch(M[None], 1.0, tol=-1.0), ValueError, r"`tol` must be at least 0"),
        (lambda: pot.solve_batch(M[None], 1.0, B), ValueError, r"solve_batch: `a` must be of shape \(1, 2\)"),
        (lambda: pot.solve_batch(M[None], 1.0, A.numpy()), TypeError, r"`a` .*torch.from_numpy"),
        (lambda: pot.solve_batch(M[None], 1.0, A, 2 * B), ValueError, r"solve_batch: `a` and `b` must have equal sums"),
        (lambda: pot.solve_batch(M[None], 1.0, row_lengths=torch.tensor([3])), ValueError, r"`row_lengths` must be"),
        (lambda: pot.dist_batch(M, metric="x"), ValueError, r"dist_batch: `X1` must be of shape"),
        (lambda: pot.dist_batch(M[None], metric="x"), ValueError, r"`metric` must be 'sqeuclidean'"),
        (lambda: pot.dist_batch(M[None], nx=1), TypeError, r"`nx` must be None"),
        (lambda: pot.dist_batch(M[None], M[None, :, :2]), ValueError, r"`X2` must be of shape \(1, n, 3\)"),
        (lambda: pot.dist_batch(M[None], M[None].double()), TypeError, r"`X2` must be of the dtype of `X1`"),
        (lambda: pot.dist_batch(M[None], metric="minkowski", p=0), ValueError, r"`p` must be positive"),
        (
            lambda: pot.loss_linear_batch(M[None], M[None, :, :2]),
            ValueError,
            r"`T` must be of a shape that goes with that of `M`, \(1, 2, 3\), got .* \(1, 2, 2\)",
        ),
        (lambda: pot.loss_linear_batch(M[None], M), ValueError, r"`T` must be of shape \(B, ns, nt\)"),
        (lambda: pot.solve_batch(M[None, :0], 1.0), ValueError, r"solve_batch: `M` must be at least 1 x 1"),
        (lambda: pot.sinkhorn(A, -B, M, 1.0), ValueError, r"sinkhorn: `b` must be finite and not negative"),
        (lambda: pot.sinkhorn(-A, B, M, 1.0), ValueError, r"sinkhorn: `a` must be finite and not negative"),
        (lambda: pot.sinkhorn(A, B, M.bool(), 1.0), TypeError, r"sinkhorn: `M` must be float64, float32"),
        (lambda: pot.solve_sample_batch(M[None], M[None].double(), 1.0), TypeError, r"solve_sample_batch: `X_b`"),
        (
            lambda: pot.solve_sample_batch(M[None], M[None, :0], 1.0),
            ValueError,
            r"solve_sample_batch: `X_b` must be at",
        ),
        (lambda: pot.solve_sample_batch(M[None], M[None], -1.0), ValueError, r"solve_sample_batch: `reg` must be pos"),
        (lambda: pot.solve_sample_batch(M[None], M[None], 1.0, B), ValueError, r"solve_sample_batch: `a` must be of"),
        (
            lambda: pot.loss_linear_samples_batch(M[None], M[None], M[None]),
            ValueError,
            r"loss_linear_samples_batch: `T` must be of a shape that goes with the costs', \(1, 2, 2\)",
        ),
        (
            lambda: pot.loss_linear_samples_batch(M[None], M[None], M[None], "x"),
            ValueError,
            r"loss_linear_samples_batch: `metric` must be",
        ),
        (lambda: pot.sinkhorn(A, B, M.numpy(), 1.0), TypeError, r"sinkhorn: `M` .*torch.from_numpy"),
        (lambda: pot.sinkhorn2(A.numpy(), B, M, 1.0), TypeError, r"sinkhorn2: `a` .*torch.from_numpy"),
        (lambda: pot.sinkhorn(A, A, M, 1.0), ValueError, r"`b` must be of shape \(3,\) or \(3, k\)"),
        (lambda: pot.sinkhorn(A, 2 * B, M, 1.0), ValueError, r"must have equal sums"),
        (lambda: pot.sinkhorn(A, B, M, 0.0), ValueError, r"`reg` must be positive"),
        (
            lambda: pot.sinkhorn(A, B, M, 1.0, "greenkhorn"),
            ValueError,
            r"`method` must be 'sinkhorn' or 'sinkhorn_log'",
        ),
        (lambda: pot.sinkhorn(A, B, M, 1.0, numItermax=0), ValueError, r"`numItermax` must be at least 1"),
        (lambda: pot.sinkhorn(A, B, M, 1.0, stopThr=-1), ValueError, r"`stopThr` must be at least 0"),
        (lambda: pot.sinkhorn(A, B, M, 1.0, tau=1), TypeError, r"unexpected keyword argument `tau`"),
        (lambda: pot.sinkhorn(A, B, M, 1.0, warmstart=(B, A)), ValueError, r"`warmstart` must be a pair of tensors"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
