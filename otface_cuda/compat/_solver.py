"""Sinkhorn problems that are checked once and solved again and again, as far as another library would have got."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..autograd import Problems, Settings, real_dtype
from ..functional import SinkhornOutput, _solve, _weights


class Solver(NamedTuple):
    """Called with what differs from one time to the next."""

    where: str  # the user's function, for messages
    problems: Problems
    exactly: Tensor
    """(B,) float64: the tolerance 0, which no problem reaches before the last iteration."""
    mass_tolerance: float  # of the weights, as `Settings` has it

    def __call__(
        self,
        max_iter: int,
        start: Tensor | None,
        *,
        tol: Tensor | None = None,
        check_every: int = 1,
        grad: str = "envelope",
        return_plan: bool = True,
    ) -> SinkhornOutput:
        """From g = `start` (B, m), in the dtype of the arithmetic and contiguous, or from 0."""
        settings = Settings(self.where, max_iter, check_every, grad, return_plan, self.mass_tolerance)
        return _solve(self.problems, self.exactly if tol is None else tol, start, settings)

    def only(self, k: int) -> Solver:
        """The problem k by itself."""
        one = Problems(*(None if x is None else x[k : k + 1] for x in self.problems))  # type: ignore[arg-type]
        return Solver(self.where, one, self.exactly[:1], self.mass_tolerance)


def solver_of(
    where: str,
    name: str,
    cost: Tensor,
    eps: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    row_lengths: Tensor | None = None,
    col_lengths: Tensor | None = None,
) -> Solver:
    """Of costs (B, n, m), which the user calls `name`, and eps (B,) float64, both checked. Checks the others."""
    batch, n, m = cost.shape
    check_not_empty(where, name, cost)
    rows = _checks.lengths(where, "row_lengths", row_lengths, batch, n, name, cost)
    cols = _checks.lengths(where, "col_lengths", col_lengths, batch, m, name, cost)
    a, b, mass_tolerance = _weights(where, name, a, b, cost, rows, cols)
    return solver_of_checked(where, Problems(cost, eps, a, b, rows, cols), mass_tolerance)


def transposed_solver_of(where: str, M: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Solver:
    """Of one cost (n, m) and the columns of b (m, k), with one a (n,); our rows are those of b. Checks the weights."""
    check_not_empty(where, "M", M)
    size, real = b.shape[1], real_dtype(M)
    rows, columns = b.mT, a.expand(size, -1)
    mass_tolerance = _checks.mass_tolerance(columns, rows)
    _checks.check_weights_data(where, {"a": (columns, None), "b": (rows, None)}, mass_tolerance)
    cost = M.mT.expand(size, -1, -1)
    problems = Problems(cost, eps.expand(size), rows.to(real), columns.to(real), None, None)
    return solver_of_checked(where, problems, mass_tolerance)


def solver_of_checked(where: str, problems: Problems, mass_tolerance: float = math.inf) -> Solver:
    """`mass_tolerance` as of the weights; without any it has no meaning."""
    exactly = torch.zeros((), dtype=torch.float64, device=problems.cost.device)
    return Solver(where, problems, exactly.expand(len(problems.cost)), mass_tolerance)


def check_not_empty(where: str, name: str, cost: Tensor) -> None:
    if cost.shape[-2] == 0 or cost.shape[-1] == 0:
        raise _checks.wrong_value(where, name, "at least 1 x 1", cost)
