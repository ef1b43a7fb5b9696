"""`SinkhornDistance`, the layer that many repositories have copied, and the same for a cost matrix.

It is Sinkhorn's iteration in the log domain between point clouds with uniform weights, differentiated through, which
stops all problems at once when its potentials change little. The original adds 1e-8 to the weights before it takes
their logarithm, so that its plan and cost are larger than here by the factor 1 + 1e-8 m, with m columns; here the
columns of the plan sum to 1 / m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..autograd import Problems, real_dtype
from ..costs import pairwise_cost
from ..functional import SinkhornOutput, check_points
from ._solver import Solver, check_not_empty, solver_of_checked

if TYPE_CHECKING:
    from .._typing import called_as

REDUCTIONS = ("none", "mean", "sum")


class SinkhornDistanceCost(nn.Module):
    r""":class:`SinkhornDistance` of a cost matrix: ``forward(C)`` -> (cost, pi, C), with C (N, n, m) or (n, m).

    Raises:
        TypeError, ValueError: as :class:`SinkhornDistance`.

    >>> cost, pi, C = SinkhornDistanceCost(eps=0.1, max_iter=50)(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> pi
    tensor([[4.9998e-01, 2.2699e-05],
            [2.2699e-05, 4.9998e-01]])
    """

    def __init__(
        self,
        eps: float,
        max_iter: int,
        reduction: str | None = "none",
        *,
        thresh: float = 0.1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.eps, self.thresh = (_checks.check_finite(where, *given) for given in (("eps", eps), ("thresh", thresh)))
        if self.eps <= 0:
            raise _checks.wrong_value(where, "eps", "positive and finite", eps)
        if self.thresh < 0:
            raise _checks.wrong_value(where, "thresh", "at least 0", thresh)
        self.max_iter = _checks.check_int(where, "max_iter", max_iter, 1)
        self.reduction = "none" if reduction is None else reduction
        _checks.check_choice(where, "reduction", self.reduction, REDUCTIONS)
        if device is not None:
            torch.device(device)  # whether there is such a device; the input says which one is used

    def extra_repr(self) -> str:
        return f"eps={self.eps}, max_iter={self.max_iter}, reduction={self.reduction!r}, thresh={self.thresh}"

    def forward(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        where = type(self).__name__
        _checks.check_floating(where, "C", C, "(N, n, m) or (n, m)", (2, 3))
        _checks.check_has_kernels(where, "C", C)
        check_not_empty(where, "C", C)
        return self._solve(C)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _solve(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        costs = C if C.dim() == 3 else C.unsqueeze(0)
        solve = uniform_solver_of(type(self).__name__, costs, self.eps)
        count = self.max_iter if self.thresh == 0 else iterations_until(solve, self.eps, self.max_iter, self.thresh)
        out = solve(count, None, grad="unrolled")
        assert out.plan is not None
        cost, plan = (out.transport_cost, out.plan) if C.dim() == 3 else (out.transport_cost[0], out.plan[0])
        if self.reduction == "mean":
            cost = cost.mean()
        elif self.reduction == "sum":
            cost = cost.sum()
        return cost, plan, C


class SinkhornDistance(SinkhornDistanceCost):
    r"""Transport cost between point clouds: ``forward(x, y)`` -> (cost, pi, C).

    x is (N, n, d) or (n, d), y (N, m, d) or (m, d), of one float dtype; the cost matrix C (N, n, m) holds
    \|x_i - y_j\|^2, pi (N, n, m) is the transport plan for uniform weights, and cost is the sum of pi * C, (N,), or a
    scalar for a reduction. All three have exact gradients through the iterations. Half types are computed, and results
    returned, in float32.

    All problems stop together, in the iteration in which the mean over them of sum_i \|u_i - u_i before\| is below
    ``thresh``, where u = f + eps log(1 / n) is the potential of the rows and begins at 0. So results depend on the
    batch, and at a small eps the iteration ends early. To find where it stops the host waits for the device in every
    iteration, as it does in the original; ``thresh=0`` does exactly ``max_iter`` iterations and waits for nothing.

    Args:
        eps: strength of the entropy, in units of the cost; a float.
        max_iter: iterations at most.
        reduction: of the cost: ``"none"`` or None, ``"mean"`` or ``"sum"``.
        thresh: see above; 0.1 in the original.
        device: taken, because some copies of the layer have it; the device is that of x and y.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.

    >>> x, y = torch.rand(4, 5, 2, requires_grad=True), torch.rand(4, 7, 2)
    >>> cost, pi, C = SinkhornDistance(eps=0.1, max_iter=100)(x, y)
    >>> cost.shape, pi.shape, C.shape
    (torch.Size([4]), torch.Size([4, 5, 7]), torch.Size([4, 5, 7]))
    >>> cost.sum().backward()
    """

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        check_points(type(self).__name__, x, y)
        if x.dim() == 2:
            return self._solve(pairwise_cost(x[None], y[None], "sqeuclidean")[0])
        return self._solve(pairwise_cost(x, y, "sqeuclidean"))

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # type: ignore[override]


def uniform_solver_of(where: str, costs: Tensor, eps: float) -> Solver:
    """Of costs (N, n, m) between uniform weights."""
    strengths = _checks.per_problem(where, "eps", eps, len(costs), "C", costs, positive=True)
    return solver_of_checked(where, Problems(costs, strengths, None, None, None, None))


def _iterations_until(solve: Solver, eps: float, max_iter: int, thresh: float) -> int:
    """The iteration in which the mean over the batch of |u - u before|_1 is below `thresh`, or `max_iter`.

    An iteration takes what the rows of the plan lack to its potentials: u - u before = eps log(1 / (n r)), with the row
    sums r of the plan before it, which is exp((u + v - C) / eps) from u = v = 0 on.
    """
    with torch.no_grad():
        cost = solve.problems.cost
        n = cost.shape[1]
        log_sums = cost.to(real_dtype(cost)).div(-eps).logsumexp(2)
        g: Tensor | None = None
        for count in range(1, max_iter):
            change = log_sums.add_(math.log(n)).abs_().sum()
            if eps * change.item() < thresh * len(cost):
                return count
            out = solve(1, g)
            g, log_sums = out.g, _log_row_sums(out, cost, eps)
    return max_iter


def _log_row_sums(out: SinkhornOutput, cost: Tensor, eps: float) -> Tensor:
    """(N, n), also where the plan of a row is too small for its dtype."""
    assert out.plan is not None
    sums = out.plan.sum(2)
    if sums.numel() > 0 and sums.min().item() > 1e-30:
        return sums.log_()
    n, m = cost.shape[1:]
    exponents = out.f.unsqueeze(2) + out.g.unsqueeze(1) - cost
    return exponents.div_(eps).logsumexp(2).sub_(math.log(n * m))


# How many there are depends on the data: a compiled graph ends before the first and goes on after the last.
iterations_until: Callable[[Solver, float, int, float], int] = torch.compiler.disable(_iterations_until)
