"""When POT stops: after iteration 1, 11, 21, ... it compares a norm of the marginal error with the tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import SinkhornOutput
from ._solver import Solver

PERIOD = 10


class Run(NamedTuple):
    """The iterations that POT would do."""

    n_iter: int
    out: SinkhornOutput | None
    """The state after them, with its plan; None where a tolerance of 0 made it unnecessary to look for n_iter."""
    converged: bool


def run_as_pot(
    solve: Solver,
    start: Tensor | None,
    a: Tensor,
    *,
    max_iter: int,
    tol: float,
    norm: Callable[[Tensor], Tensor],
    on_check: Callable[[int, Tensor], None] | None = None,
) -> Run:
    """Iterate until ``norm(P 1 - a) < tol`` at one of POT's checks. Waits for the device once per look.

    `norm` takes the (B, n) differences of all problems, which stop together, and is at least the largest L2 norm of
    one. So it cannot be below `tol` while the L1 norm of one is above ``sqrt(n) * tol``, and up to that point the
    kernel finds the way by itself, in one call. After that come POT's looks, one by one, unless the error no longer
    falls: then `tol` is below what the dtype can resolve, where POT mostly goes on to `max_iter`, and each stretch is
    twice the last. With `on_check`, which gets each iteration looked at and its error, all looks are POT's.
    """
    if (tol == 0 and on_check is None) or len(a) == 0:
        return Run(max_iter, None, False)
    return _look_uncompiled(solve, start, a, max_iter, tol, norm, on_check)


@torch.no_grad()
def _look(
    solve: Solver,
    start: Tensor | None,
    a: Tensor,
    max_iter: int,
    tol: float,
    norm: Callable[[Tensor], Tensor],
    on_check: Callable[[int, Tensor], None] | None,
) -> Run:
    """The iterations from the first look to the last."""
    out, done = solve(1, start), 1
    jump, stretch, last = on_check is None, PERIOD, math.inf
    while True:
        assert out.plan is not None
        marginal_error = norm(out.plan.sum(2).sub_(a))
        if on_check is not None:
            on_check(done, marginal_error)
        error = marginal_error.item()
        if error < tol or done == max_iter:
            return Run(done, out, error < tol)
        if on_check is None and error >= last:
            stretch *= 2
        before, steps, last = out.g, min(stretch, max_iter - done), error
        if jump:
            bound = a.shape[1] ** 0.5 * tol / a.double().sum(1)  # in the unit of SinkhornOutput.error
            out = solve(max_iter - done, before, tol=bound, check_every=PERIOD)
            fewest, steps = (int(x) for x in out.n_iter.aminmax())
            steps = steps or max_iter - done  # 0: no problem has a solution
        if not jump or fewest != steps:  # all do as many as the slowest
            out = solve(steps, before)
        jump = False
        done += steps
        if steps % PERIOD:  # the end, between two checks
            return Run(done, out, False)


# What is done next depends on the data: a compiled graph ends before the first look and goes on after the last.
_look_uncompiled: Callable[..., Run] = torch.compiler.disable(_look)
