"""The three gradient modes against finite differences, against autograd through the reference, and in their limits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda.reference import ReferenceOutput, sinkhorn_reference

from .problems import Problem, gradient_rtol, one_thread, random_problem

MODES = ["envelope", "unrolled", "implicit"]
OUTPUTS = ["value", "transport_cost", "f", "g", "plan"]
EPS = 0.5
CONVERGED = 60  # costs in [0, 1] at eps 0.5: a step shrinks the error by tanh(1/2)^2 < 0.22 at least (Birkhoff)


def shape_of(case: str) -> dict[str, Any]:
    """Problems with and without what is special: (options of the solver, rows, columns)."""
    lengths = {"row_lengths": torch.tensor([4, 2]), "col_lengths": torch.tensor([3, 5])}
    return lengths if case == "lengths" else {}


def gradcheck_problem(case: str) -> Problem:
    """Two problems 4 x 5 in float64; the one of `case` is special."""
    problem = random_problem(2, 4, 5, seed=1)
    cost, a, b = problem
    if case == "zero weights":
        a[0, 1] = a[1, 0] = b[0, 0] = b[1, 4] = 0
    if case == "forbidden pairs":
        cost[0, 1, 2] = cost[0, 3, 4] = cost[1, 0, 0] = math.inf
    if case == "lengths":
        a *= torch.arange(4) < torch.tensor([[4], [2]])
        b *= torch.arange(5) < torch.tensor([[3], [5]])
    return Problem(cost, a / a.sum(1, keepdim=True), 1.0 * b / b.sum(1, keepdim=True))


CASES = ["plain", "zero weights", "forbidden pairs", "lengths", "mass 3"]


def weights_from(logits: Tensor, like: Tensor, mass: float) -> Tensor:
    """Weights of a fixed mass, zero where `like` is: the directions along which a and b may move."""
    return mass * logits.masked_fill(like == 0, -math.inf).softmax(-1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("grad", "output", "max_iter"),
    [("envelope", "value", CONVERGED)]
    + [("implicit", output, CONVERGED) for output in OUTPUTS]
    + [("unrolled", output, max_iter) for output in OUTPUTS for max_iter in (1, 2, 7)],
)
@pytest.mark.parametrize("argument", ["cost", "a", "b"])
def test_gradcheck(case: str, grad: str, output: str, max_iter: int, argument: str, device: str) -> None:
    """In float64, against finite differences; at convergence for the modes that are exact there."""
    problem = gradcheck_problem(case).to(device)
    mass = 3.0 if case == "mass 3" else 1.0
    options = {name: x.to(device) for name, x in shape_of(case).items()}
    leaf = {"cost": problem.cost, "a": problem.a.clamp(min=0.1).log(), "b": problem.b.clamp(min=0.1).log()}[argument]

    def solve(x: Tensor) -> Tensor:
        cost = x if argument == "cost" else problem.cost
        a = weights_from(x, problem.a, mass) if argument == "a" else mass * problem.a
        b = weights_from(x, problem.b, mass) if argument == "b" else mass * problem.b
        out = otface_cuda.sinkhorn(
            cost, EPS, a, b, max_iter=max_iter, grad=grad, return_plan=output == "plan", **options
        )
        return getattr(out, output)

    # A difference of forward values has 1e-16 / 1e-6 of noise, the step an error of 1e-12; the rest is room for the
    # conjugate gradients' residual of 1e-11 and its condition number.
    torch.autograd.gradcheck(solve, (leaf.clone().requires_grad_(),), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("grad", ["unrolled", "implicit"])
def test_gradcheck_of_everything_at_once(grad: str, device: str) -> None:
    """All inputs and all outputs together: cotangents of several outputs add up."""
    problem = gradcheck_problem("plain").to(device)
    max_iter = 3 if grad == "unrolled" else CONVERGED

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        out = otface_cuda.sinkhorn(
            cost, EPS, a.softmax(1), b.softmax(1), max_iter=max_iter, grad=grad, return_plan=True
        )
        return out[:5]

    leaves = [x.clone().requires_grad_() for x in (problem.cost, problem.a.log(), problem.b.log())]
    torch.autograd.gradcheck(solve, leaves, eps=1e-6, atol=1e-8, rtol=1e-6)


def cotangents(out: ReferenceOutput | otface_cuda.SinkhornOutput, names: list[str], seed: int = 7) -> list[Tensor]:
    """Random cotangents of the named outputs; the same numbers for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(getattr(out, name).shape, generator=generator, dtype=torch.float64) for name in names]
    return [x.to(getattr(out, name)) for x, name in zip(drawn, names, strict=True)]


def gradients(
    solver: Callable[..., Any], problem: Problem, eps: float | Tensor, names: list[str], **options: Any
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in problem]
    out = solver(leaves[0], eps, leaves[1], leaves[2], return_plan=True, **options)
    chosen = [getattr(out, name) for name in names]
    return list(torch.autograd.grad(chosen, leaves, cotangents(out, names)))


def reference_gradients(problem: Problem, eps: float | Tensor, names: list[str], **options: Any) -> list[Tensor]:
    cost, a, b = problem.to("cpu")
    with one_thread():
        return gradients(sinkhorn_reference, Problem(cost.double(), a.double(), b.double()), eps, names, **options)


def assert_close_gradients(actual: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Relative to the largest entry, because the terms of a gradient cancel; a and b together, for they share terms."""
    scales = [x.double().abs().max().item() for x in expected]
    scales = [scales[0], max(scales[1:]), max(scales[1:])]
    for name, x, y, scale in zip(("cost", "a", "b"), actual, expected, scales, strict=True):
        assert x.shape == y.shape
        difference = (x.double().cpu() - y.double().cpu()).abs().max().item()
        assert difference <= rtol * scale, f"{name}: {difference / scale:.2e} > {rtol:.2e}"


SHAPES = [(1, 1), (1, 6), (9, 1), (5, 8), (49, 49), (33, 70)]


@pytest.mark.instruction_set
@pytest.mark.parametrize("eps", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("max_iter", [1, 2, 3, 10, 60])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_unrolled_is_autograd_through_the_reference(
    shape: tuple[int, int], max_iter: int, eps: float, dtype: torch.dtype, device: str
) -> None:
    """Every output's cotangent at once, potentials absorbed in between at the smaller eps."""
    problem = random_problem(2, *shape, seed=3, dtype=dtype)
    ours = gradients(otface_cuda.sinkhorn, problem.to(device), eps, OUTPUTS, max_iter=max_iter, grad="unrolled")
    theirs = reference_gradients(problem, eps, OUTPUTS, max_iter=max_iter)
    assert [x.dtype for x in ours] == [x.dtype for x in problem]
    assert_close_gradients(ours, theirs, gradient_rtol(dtype, eps, *shape, max_iter, device))


@pytest.mark.instruction_set
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("case", CASES)
def test_unrolled_special_values(case: str, output: str, device: str) -> None:
    """Gradients in the entries themselves, not along directions of equal mass; also those of zero weight."""
    problem = gradcheck_problem(case)
    options = shape_of(case)
    on_device = {name: x.to(device) for name, x in options.items()}
    ours = gradients(otface_cuda.sinkhorn, problem.to(device), EPS, [output], max_iter=6, grad="unrolled", **on_device)
    theirs = reference_gradients(problem, EPS, [output], max_iter=6, **options)
    assert_close_gradients(ours, theirs, gradient_rtol(torch.float64, EPS, 4, 5, 6, device))


@pytest.mark.instruction_set
@pytest.mark.parametrize("grad", MODES)
def test_entry_between_two_zero_weights(grad: str, device: str) -> None:
    """Nothing bounds its exponential, which overflows: that may not spoil what it has no part in."""
    cost, a, b = random_problem(1, 5, 6, seed=1, dtype=torch.float32)
    a[0, 2] = b[0, 4] = 0
    cost[0, 2, 4] = -50
    problem = Problem(cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)).to(device)
    leaves = [x.clone().requires_grad_() for x in problem]
    out = otface_cuda.sinkhorn(leaves[0], 0.05, leaves[1], leaves[2], grad=grad, max_iter=8, return_plan=True)
    names = ["value"] if grad == "envelope" else OUTPUTS
    loss = sum(1e6 * (getattr(out, name) * x).sum() for name, x in zip(names, cotangents(out, names), strict=True))
    of_cost, of_a, of_b = torch.autograd.grad(loss, leaves)
    assert of_cost.isfinite().all()
    assert (of_cost[:, 2, 4] == 0).all()
    if (
        grad != "implicit"
    ):  # which centres them, so that those of the two zero weights, beyond all bounds, reach every one
        assert of_a[problem.a > 0].isfinite().all()
        assert of_b[problem.b > 0].isfinite().all()


def test_unrolled_with_early_stopping(device: str) -> None:
    """Problems that stop at different iterations are each differentiated through their own."""
    problem = random_problem(4, 12, 12, seed=10)
    problem = problem._replace(cost=problem.cost * torch.tensor([0.2, 0.5, 1.0, 2.0])[:, None, None])
    options = {"tol": 1e-4, "check_every": 3, "max_iter": 500}
    assert len(set(problem.reference(0.1, **options).n_iter.tolist())) > 2
    ours = gradients(otface_cuda.sinkhorn, problem.to(device), 0.1, OUTPUTS, grad="unrolled", **options)
    theirs = reference_gradients(problem, 0.1, OUTPUTS, **options)
    assert_close_gradients(ours, theirs, gradient_rtol(torch.float64, 0.1, 12, 12, 500, device))


def test_unrolled_from_a_warm_start(device: str) -> None:
    problem = random_problem(2, 8, 7, seed=4)
    init = (torch.zeros(2, 8, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64))
    ours = gradients(
        otface_cuda.sinkhorn,
        problem.to(device),
        0.2,
        OUTPUTS,
        max_iter=4,
        init=(init[0].to(device), init[1].to(device)),
        grad="unrolled",
    )
    theirs = reference_gradients(problem, 0.2, OUTPUTS, max_iter=4, init=init)
    assert_close_gradients(ours, theirs, gradient_rtol(torch.float64, 0.2, 8, 7, 4, device))


@pytest.mark.instruction_set
def test_unrolled_of_a_large_problem_that_threads_share(device: str) -> None:
    problem = random_problem(1, 760, 701, seed=5, dtype=torch.float32)
    ours = gradients(otface_cuda.sinkhorn, problem.to(device), 0.1, OUTPUTS, max_iter=5, grad="unrolled")
    theirs = reference_gradients(problem, 0.1, OUTPUTS, max_iter=5)
    assert_close_gradients(ours, theirs, gradient_rtol(torch.float32, 0.1, 760, 701, 5, device))


def centred(gradient: Tensor, valid: Tensor | None = None) -> Tensor:
    valid = torch.ones_like(gradient) if valid is None else valid
    return valid * (gradient - (valid * gradient).sum(1, keepdim=True) / valid.sum(1, keepdim=True))


@pytest.mark.instruction_set
@pytest.mark.parametrize("eps", [0.05, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (9, 1), (5, 8), (49, 49), (33, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_implicit_is_the_limit_of_unrolled(shape: tuple[int, int], eps: float, dtype: torch.dtype, device: str) -> None:
    problem = random_problem(2, *shape, seed=6, dtype=dtype)
    n_iter = 1500 if eps < 0.1 else 30
    ours = gradients(otface_cuda.sinkhorn, problem.to(device), eps, OUTPUTS, max_iter=n_iter, grad="implicit")
    exact = Problem(*(x.double() for x in problem))
    assert exact.solve(eps, max_iter=n_iter).error.max() < 1e-12
    limit = gradients(otface_cuda.sinkhorn, exact, eps, OUTPUTS, max_iter=n_iter, grad="unrolled")
    # Beyond rounding: the residual of the adjoint system, which its condition number multiplies.
    residual = 1e-11 if dtype == torch.float64 else 1e-7
    rtol = gradient_rtol(dtype, eps, *shape, 100, device) + residual * 100 / eps
    assert_close_gradients(ours, [limit[0], centred(limit[1]), centred(limit[2])], rtol)


@pytest.mark.instruction_set
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_envelope_is_the_plan_and_the_potentials(case: str, dtype: torch.dtype, device: str) -> None:
    """Not only at convergence: that is what the mode returns, in the dtype of the input."""
    problem = gradcheck_problem(case)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    problem = Problem(problem.cost.to(dtype), problem.a.to(real), problem.b.to(real)).to(device)
    options = {name: x.to(device) for name, x in shape_of(case).items()}
    leaves = [x.clone().requires_grad_() for x in problem]
    out = otface_cuda.sinkhorn(leaves[0], EPS, *leaves[1:], max_iter=3, return_plan=True, **options)
    factor = torch.tensor([2.0, -3.0], dtype=real, device=device)[:, None]
    grad_cost, grad_a, grad_b = torch.autograd.grad(out.value, leaves, factor[:, 0])
    assert grad_cost.dtype == dtype
    assert grad_a.dtype == grad_b.dtype == real
    valid_a, valid_b = (
        (torch.arange(w.shape[1], device=device) < options.get(name, torch.full((2,), 5, device=device))[:, None]).to(w)
        for w, name in ((problem.a, "row_lengths"), (problem.b, "col_lengths"))
    )
    plan, f, g = (x.detach() for x in (out.plan, out.f, out.g))
    # One rounding to the dtype, and a few roundings of numbers of size 1 to 10 in the arithmetic.
    u = torch.finfo(real).eps
    torch.testing.assert_close(grad_cost, (factor[:, :, None] * plan).to(dtype), rtol=torch.finfo(dtype).eps, atol=u)
    torch.testing.assert_close(grad_a, factor * centred(f, valid_a), rtol=0, atol=16 * u)
    torch.testing.assert_close(grad_b, factor * centred(g, valid_b), rtol=0, atol=16 * u)


@pytest.mark.parametrize("grad", MODES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_costs_get_the_float32_gradient_rounded(half: torch.dtype, grad: str, device: str) -> None:
    problem = random_problem(2, 16, 12, seed=7, dtype=half, device=device)
    names = ["value"] if grad == "envelope" else OUTPUTS
    ours = gradients(otface_cuda.sinkhorn, problem, 0.2, names, max_iter=30, grad=grad)
    exact = gradients(
        otface_cuda.sinkhorn, problem._replace(cost=problem.cost.float()), 0.2, names, max_iter=30, grad=grad
    )
    assert ours[0].dtype == half
    assert torch.equal(ours[0], exact[0].to(half))
    assert torch.equal(ours[1], exact[1])
    assert torch.equal(ours[2], exact[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_another_dtype_get_gradients_of_their_own(dtype: torch.dtype, device: str) -> None:
    problem = random_problem(2, 4, 4, dtype=torch.float32, device=device)
    quarters = torch.full((2, 4), 0.25, dtype=dtype, device=device, requires_grad=True)
    out = otface_cuda.sinkhorn(problem.cost, 0.2, quarters, problem.b)
    out.value.sum().backward()
    assert quarters.grad.dtype == dtype
    torch.testing.assert_close(quarters.grad, centred(out.f.detach()).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("grad", MODES)
def test_only_what_is_asked_for(grad: str, device: str) -> None:
    """The gradient of one input does not depend on which others are asked for."""
    problem = random_problem(2, 6, 5, device=device)
    names = ["value"] if grad == "envelope" else OUTPUTS
    everything = gradients(otface_cuda.sinkhorn, problem, EPS, names, grad=grad)
    for k in range(3):
        leaves = [x.clone() for x in problem]
        leaves[k].requires_grad_()
        out = otface_cuda.sinkhorn(leaves[0], EPS, *leaves[1:], grad=grad, return_plan=True)
        (alone,) = torch.autograd.grad([getattr(out, name) for name in names], leaves[k], cotangents(out, names))
        assert torch.equal(alone, everything[k])


@pytest.mark.parametrize("grad", MODES)
def test_cost_shared_by_the_batch_gets_the_sum(grad: str, device: str) -> None:
    problem = random_problem(3, 6, 5, device=device)
    shared = problem.cost[0].clone().requires_grad_()
    otface_cuda.sinkhorn(shared.expand(3, 6, 5), EPS, problem.a, problem.b, grad=grad).value.sum().backward()
    each = problem.cost[:1].repeat(3, 1, 1).requires_grad_()
    otface_cuda.sinkhorn(each, EPS, problem.a, problem.b, grad=grad).value.sum().backward()
    torch.testing.assert_close(shared.grad, each.grad.sum(0), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("grad", MODES)
def test_weights_shared_by_the_batch_get_the_sum(grad: str, device: str) -> None:
    problem = random_problem(3, 6, 5, device=device)
    a = problem.a[0].clone().requires_grad_()
    b = problem.b[0].clone()
    otface_cuda.sinkhorn(problem.cost, EPS, a, b, grad=grad).value.sum().backward()
    each = problem.a[:1].repeat(3, 1).requires_grad_()
    otface_cuda.sinkhorn(problem.cost, EPS, each, b, grad=grad).value.sum().backward()
    torch.testing.assert_close(a.grad, each.grad.sum(0), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("grad", MODES)
def test_strided_cost_and_cotangents(grad: str, device: str) -> None:
    problem = random_problem(2, 6, 5, device=device)
    names = ["value"] if grad == "envelope" else OUTPUTS
    plain = gradients(otface_cuda.sinkhorn, problem, EPS, names, grad=grad)
    cost = problem.cost.mT.contiguous().requires_grad_()
    out = otface_cuda.sinkhorn(cost.mT, EPS, problem.a, problem.b, grad=grad, return_plan=True)
    # Cotangents that are slices of a wider tensor.
    incoming = [torch.stack([x, x], -1)[..., 0] for x in cotangents(out, names)]
    (strided,) = torch.autograd.grad([getattr(out, name) for name in names], cost, incoming)
    assert torch.equal(strided.mT, plain[0])


def test_unbatched(device: str) -> None:
    problem = random_problem(1, 6, 5, device=device)
    batch = gradients(otface_cuda.sinkhorn, problem, EPS, ["value"])
    leaves = [x[0].clone().requires_grad_() for x in problem]
    out = otface_cuda.sinkhorn(leaves[0], EPS, *leaves[1:])
    alone = torch.autograd.grad(out.value, leaves, cotangents(out._replace(value=out.value[None]), ["value"])[0][0])
    for x, y in zip(alone, batch, strict=True):
        assert torch.equal(x, y[0])


@pytest.mark.parametrize("grad", MODES)
def test_zero_gradients_where_nothing_moves(grad: str, device: str) -> None:
    """Padding, forbidden pairs and rows or columns of zero weight get exactly 0 in the cost."""
    problem = random_problem(2, 6, 7, device=device)
    cost, a, b = problem
    cost[:, 2, 3] = math.inf
    a[:, 1] = 0
    b[:, 0] = 0
    problem = Problem(cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True))
    names = ["value"] if grad == "envelope" else ["value", "transport_cost", "plan"]
    grad_cost, grad_a, grad_b = gradients(otface_cuda.sinkhorn, problem, EPS, names, grad=grad)
    assert all(x.isfinite().all() for x in (grad_cost, grad_a, grad_b))
    assert (grad_cost[:, 2, 3] == 0).all()
    assert (grad_cost[:, 1, :] == 0).all()
    assert (grad_cost[:, :, 0] == 0).all()
    assert (grad_cost != 0).sum() == 2 * (5 * 6 - 1)


@pytest.mark.parametrize("grad", MODES)
def test_poisoned_problem_leaves_the_gradients_of_the_others(grad: str, device: str) -> None:
    problem = random_problem(3, 6, 5, device=device)
    names = ["value"] if grad == "envelope" else OUTPUTS
    clean = gradients(otface_cuda.sinkhorn, problem, EPS, names, grad=grad)
    problem.cost[1, 2, 3] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an adjoint system of NaN has no solution, and the mode says so
        poisoned = gradients(otface_cuda.sinkhorn, problem, EPS, names, grad=grad)
    for x, y in zip(poisoned, clean, strict=True):
        assert torch.equal(x[0], y[0])
        assert torch.equal(x[2], y[2])
        assert x[1].isnan().all()


class TestWhatIsNotThere:
    @pytest.mark.parametrize("output", OUTPUTS[1:])
    def test_envelope_differentiates_the_value_only(self, output: str, device: str) -> None:
        cost = random_problem(2, 4, 5, device=device).cost.requires_grad_()
        out = otface_cuda.sinkhorn(cost, EPS, return_plan=True)
        with pytest.raises(RuntimeError, match=rf"`{output}`.*envelope.*unrolled.*implicit"):
            getattr(out, output).sum().backward()

    @pytest.mark.parametrize("grad", MODES)
    @pytest.mark.parametrize("output", ["error", "n_iter", "converged"])
    def test_some_outputs_have_no_gradient_at_all(self, output: str, grad: str, device: str) -> None:
        cost = random_problem(2, 4, 5, device=device).cost.requires_grad_()
        assert not getattr(otface_cuda.sinkhorn(cost, EPS, grad=grad), output).requires_grad

    @pytest.mark.parametrize("grad", MODES)
    def test_second_derivative(self, grad: str, device: str) -> None:
        """An error, also where another path to the cost would hide that this one counts as constant."""
        cost = random_problem(2, 4, 5, device=device).cost.requires_grad_()
        value = otface_cuda.sinkhorn(cost, EPS, grad=grad).value.sum()
        (first,) = torch.autograd.grad(value, cost, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad((first * cost).sum(), cost)

    @pytest.mark.parametrize("grad", MODES)
    def test_no_graph_unless_a_gradient_is_needed(self, grad: str, device: str) -> None:
        problem = random_problem(2, 4, 5, device=device)
        assert problem.solve(EPS, grad=grad).value.grad_fn is None
        problem.cost.requires_grad_()
        with torch.no_grad():
            assert problem.solve(EPS, grad=grad).value.grad_fn is None
        assert problem.solve(EPS, grad=grad).value.grad_fn is not None

    def test_warm_start_passes_no_gradient(self, device: str) -> None:
        problem = random_problem(2, 4, 5, device=device)
        g = torch.zeros(2, 5, dtype=torch.float64, device=device, requires_grad=True)
        out = problem.solve(EPS, init=(torch.zeros(2, 4, dtype=torch.float64, device=device), g), grad="unrolled")
        assert not out.value.requires_grad

    def test_uniform_weights_take_the_mass_without_its_gradient(self, device: str) -> None:
        """With b = None its mass is that of a, but not part of the derivative."""
        problem = random_problem(2, 4, 5, device=device)
        uniform = torch.full((2, 5), 0.2, dtype=torch.float64, device=device)
        results = []
        for b in (None, uniform):
            a = problem.a.clone().requires_grad_()
            otface_cuda.sinkhorn(problem.cost, EPS, a, b, grad="unrolled", max_iter=5).value.sum().backward()
            results.append(a.grad)
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-14)


class TestImplicitSolver:
    def split_blocks(self, batch: int, device: str) -> Tensor:
        """Two blocks that exchange no mass: the potentials of one may shift alone: the adjoint system is singular."""
        cost = random_problem(batch, 4, 4, seed=1, device=device).cost
        cost[:, :2, 2:] = cost[:, 2:, :2] = math.inf
        return cost.requires_grad_()

    def test_no_convergence_gives_nan_and_a_warning(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A single f has no derivative then. Many problems, because rounding may make one look solvable by chance."""
        monkeypatch.setenv("OTFACE_CHECK", "1")  # on CUDA the warning waits for the device, so only then
        cost = self.split_blocks(300, device)
        joined = random_problem(1, 4, 4, device=device).cost.requires_grad_()
        out = otface_cuda.sinkhorn(torch.cat([cost, joined]), 0.5, grad="implicit", max_iter=50)
        with pytest.warns(RuntimeWarning, match=r"implicit.* 300 of 301 problems"):
            grad, grad_joined = torch.autograd.grad(out.f[:, 0].sum(), [cost, joined])
        assert grad.isnan().all()
        assert grad_joined.isfinite().all()

    def test_singular_system_that_has_a_solution(self, device: str) -> None:
        """What does not depend on the shift of a block has its derivative nevertheless."""
        cost = self.split_blocks(300, device)
        out = otface_cuda.sinkhorn(cost, 0.5, grad="implicit", max_iter=50, return_plan=True)
        limit = otface_cuda.sinkhorn(cost, 0.5, grad="unrolled", max_iter=50, return_plan=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for output in ("value", "transport_cost", "plan"):
                (actual,) = torch.autograd.grad(getattr(out, output).square().sum(), cost, retain_graph=True)
                (expected,) = torch.autograd.grad(getattr(limit, output).square().sum(), cost, retain_graph=True)
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)

    def test_memory_of_the_graph_does_not_grow_with_the_iterations(self, device: str) -> None:
        """What is kept for backward: as much after 1,000 iterations as after 10, while unrolled keeps its history."""
        problem = random_problem(4, 20, 30, device=device)

        def kept(grad: str, max_iter: int) -> int:
            sizes: list[int] = []

            def pack(x: Tensor) -> Tensor:
                sizes.append(x.numel() * x.element_size())
                return x

            leaves = [x.clone().requires_grad_() for x in problem]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                otface_cuda.sinkhorn(leaves[0], EPS, *leaves[1:], grad=grad, max_iter=max_iter)
            return sum(sizes)

        assert kept("implicit", 1000) == kept("implicit", 10)
        assert kept("envelope", 1000) == kept("envelope", 10)
        # (m + max(n, m)) numbers and a flag per problem and iteration, where a tape would keep n m of them.
        assert kept("unrolled", 1000) - kept("unrolled", 10) == 4 * 990 * ((30 + 30) * 8 + 1)
