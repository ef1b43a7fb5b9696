"""Gradients in the weights of the drop-in replacements, zeros among these, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda.compat import pot

REG = 0.3
# Costs below 1 at this reg: an iteration takes the error down by a factor of tanh(1 / (2 reg))^2 = 0.87 at least, so
# that what is left after these is below 1e-17.
ITERATIONS = 300
STEP = 1e-5
# Differences of second order: the third derivative, of about 1 / reg^2, times STEP^2; and numbers of size 1 are rounded
# to 2^-52, which is divided by STEP and multiplied by the 8 of the one-sided formula.
TOLERANCE = STEP**2 / REG**2 * 10 + 8 * 2**-52 / STEP * 10


class Problem(NamedTuple):
    M: Tensor  # (B, n, m)
    a: Tensor  # (B, n)
    b: Tensor  # (B, m)
    factors: Tensor  # (B, n, m), to make a number of a plan


def problem() -> Problem:
    generator = torch.Generator().manual_seed(7)
    M, factors = (torch.rand(2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = (0.1 + torch.rand(2, size, generator=generator, dtype=torch.float64) for size in (4, 5))
    a[:, 1] = b[:, 2] = b[0, 4] = 0
    return Problem(M, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True), factors)


Number = Callable[[Tensor, Tensor], Tensor]


def solve_batch(output: str, reg_type: str, grad: str) -> Number:
    M, _, _, factors = problem()

    def number(a: Tensor, b: Tensor) -> Tensor:
        result = pot.solve_batch(M, REG, a, b, ITERATIONS, 0.0, reg_type=reg_type, grad=grad)
        x = getattr(result, output)
        return (x * factors).sum() if output == "plan" else x.sum()

    return number


def solve_sample_batch(output: str, reg_type: str, grad: str) -> Number:
    generator = torch.Generator().manual_seed(8)
    x, y = (torch.rand(2, size, 1, generator=generator, dtype=torch.float64) for size in (4, 5))

    def number(a: Tensor, b: Tensor) -> Tensor:
        result = pot.solve_sample_batch(x, y, REG, a, b, max_iter=ITERATIONS, tol=0.0, reg_type=reg_type, grad=grad)
        total: Tensor = getattr(result, output).sum()
        return total

    return number


def sinkhorn(function: str, method: str, several: bool) -> Number:
    """Of one problem, or of the second one's a with both b."""
    M, _, _, factors = problem()

    def number(a: Tensor, b: Tensor) -> Tensor:
        solve = getattr(pot, function)
        out = solve(a[1], b.mT if several else b[1], M[1], REG, method, ITERATIONS, 0.0, warn=False)
        return (out * (factors[1] if out.dim() == 2 else factors[0, 0, : out.numel()])).sum()

    return number


CASES: dict[str, Number] = {
    **{
        f"solve_batch, {output}, {reg_type}, {grad}": solve_batch(output, reg_type, grad)
        for output, grad in [("value", "envelope"), *((x, "autodiff") for x in ("value", "value_linear", "plan"))]
        for reg_type in ("kl", "entropy")
    },
    "solve_sample_batch, value, kl, envelope": solve_sample_batch("value", "kl", "envelope"),
    "solve_sample_batch, value_linear, kl, autodiff": solve_sample_batch("value_linear", "kl", "autodiff"),
    **{
        f"{function}, {method}, {'two' if several else 'one'}": sinkhorn(function, method, several)
        for function in ("sinkhorn", "sinkhorn2")
        for method in ("sinkhorn", "sinkhorn_log")
        for several in (False, True)
    },
}


def difference_quotient(number: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> float:
    """Of second order; from one side where an entry that goes up is 0, since none may be negative."""
    at = [float(number(x + step * STEP * direction)) for step in (0, 1, 2)]
    if bool((x[direction > 0] == 0).any()):
        return (-3 * at[0] + 4 * at[1] - at[2]) / (2 * STEP)
    return (at[1] - float(number(x - STEP * direction))) / (2 * STEP)


def directions(x: Tensor) -> list[Tensor]:
    """From the largest entry of a problem to each other one: the sums stay equal."""
    found = []
    for k in range(len(x)):
        largest = int(x[k].argmax())
        for j in range(x.shape[1]):
            if j != largest:
                direction = torch.zeros_like(x)
                direction[k, j], direction[k, largest] = 1, -1
                found.append(direction)
    return found


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("case", CASES)
def test_every_weight(case: str, side: str) -> None:
    number, given = CASES[case], problem()
    # The entropy of a plan has the slope log 0 where a weight is 0: see the next test.
    with_slope_at_zero = not ("entropy" in case and ", value," in case)

    def of_side(x: Tensor) -> Tensor:
        return number(x, given.b) if side == "a" else number(given.a, x)

    x = getattr(given, side)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of_side(leaf), leaf)
    assert gradient.isfinite().all()
    compared = 0
    for direction in directions(x):
        if with_slope_at_zero or bool((x[direction > 0] > 0).all()):
            expected = difference_quotient(of_side, x, direction)
            # Relative too, because a slope of 10 has derivatives that are as much larger.
            assert float((gradient * direction).sum()) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
            compared += 1
    assert compared >= 4
    if with_slope_at_zero:
        assert compared == (6 if side == "a" else 8)


@pytest.mark.parametrize("side", ["a", "b"])
def test_the_entropy_has_no_derivative_at_zero(side: str) -> None:
    """The difference quotient falls without end, like the logarithm of the step: the gradient there is 0."""
    number, given = solve_batch("value", "entropy", "envelope"), problem()
    x = getattr(given, side)
    leaf = x.clone().requires_grad_()
    inputs = (leaf, given.b) if side == "a" else (given.a, leaf)
    (gradient,) = torch.autograd.grad(number(*inputs), leaf)
    assert (gradient[x == 0] == 0).all()
    place = (x == 0).nonzero()[0]
    quotients = []
    for step in (1e-4, 1e-6, 1e-8):
        moved = x.clone()
        moved[tuple(place)] += step
        moved[place[0], int(x[place[0]].argmax())] -= step
        changed = number(moved, given.b) if side == "a" else number(given.a, moved)
        quotients.append(float(changed - number(given.a, given.b)) / step)
    # By reg log(100) each time
    assert quotients[0] - quotients[1] == pytest.approx(REG * 4.605, rel=0.01)
    assert quotients[1] - quotients[2] == pytest.approx(REG * 4.605, rel=0.01)


@pytest.mark.parametrize("output", ["value", "value_linear", "plan"])
def test_last_step(output: str) -> None:
    """One iteration from a g that is held, written out: it is smooth in the weights, also where they are 0."""
    M, a, b, factors = problem()
    g = otface_cuda.sinkhorn(M, REG, a, b, max_iter=ITERATIONS).g

    def number(a: Tensor, b: Tensor) -> Tensor:
        f = -REG * (b[:, None, :] * ((g[:, None, :] - M) / REG).exp()).sum(2).log()
        last = -REG * (a[:, :, None] * ((f[:, :, None] - M) / REG).exp()).sum(1).log()
        exponent = (f[:, :, None] + last[:, None, :] - M) / REG
        plan = a[:, :, None] * b[:, None, :] * exponent.exp()
        terms = {"value": plan * (M + REG * exponent), "value_linear": plan * M, "plan": plan * factors}
        return terms[output].sum()

    leaves = [x.clone().requires_grad_() for x in (a, b)]
    result = pot.solve_batch(M, REG, *leaves, ITERATIONS, 0.0, reg_type="kl", grad="last_step")
    x = getattr(result, output)
    total = (x * factors).sum() if output == "plan" else x.sum()
    torch.testing.assert_close(total.detach(), number(a, b), rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(total, leaves)
    for side, (gradient, x) in enumerate(zip(gradients, (a, b), strict=True)):
        for direction in directions(x):
            moved = [[a, b], [a, b]]
            moved[0][side], moved[1][side] = x + STEP * direction, x - STEP * direction
            expected = float(number(*moved[0]) - number(*moved[1])) / (2 * STEP)
            assert float((gradient * direction).sum()) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_padding_is_no_weight() -> None:
    """What is past a length has the gradient 0, whatever it holds; a zero before it has its own."""
    M, a, b, _ = problem()
    gradients = []
    for padding in (0, 2):
        padded = torch.nn.functional.pad(M, (0, padding, 0, padding), value=torch.nan)
        leaves = [torch.nn.functional.pad(x, (0, padding), value=torch.nan).requires_grad_() for x in (a, b)]
        lengths = {f"{side}_lengths": torch.full((2,), size) for side, size in (("row", 4), ("col", 5))}
        result = pot.solve_batch(padded, REG, *leaves, ITERATIONS, 0.0, reg_type="kl", **lengths)
        gradients.append(torch.autograd.grad(result.value.sum(), leaves))
    for alone, within in zip(*gradients, strict=True):
        torch.testing.assert_close(within[:, : alone.shape[1]], alone, rtol=1e-12, atol=1e-14)
        assert (within[:, alone.shape[1] :] == 0).all()
        assert (alone != 0).all()


def test_two_sided_zero() -> None:
    """The cost of a pair without any weight does not matter, also if it is infinite."""
    M, a, b, _ = problem()
    gradients = []
    for cost in (0.5, torch.inf):
        M[:, 1, 2] = cost
        for grad in ("envelope", "autodiff"):
            leaves: list[Any] = [x.clone().requires_grad_() for x in (a, b)]
            result = pot.solve_batch(M, REG, *leaves, ITERATIONS, 0.0, reg_type="kl", grad=grad)
            found = torch.autograd.grad(result.value.sum(), leaves)
            gradients.append([x - x.mean(1, keepdim=True) for x in found])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-12)
