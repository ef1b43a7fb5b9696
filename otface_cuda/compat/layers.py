"""`SinkhornDistance`, the layer that many repositories have copied, and the same for a cost matrix.

It is Sinkhorn's iteration in the log domain between point clouds with uniform weights, differentiated through, which
stops all problems at once when its potentials change little. The original adds 1e-8 to the weights before it takes
their logarithm, so that its plan and cost are larger than here by the factor 1 + 1e-8 m, with m columns; here the
columns of the plan sum to 1 / m.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks, autograd
from ..costs import pairwise_cost
from ..functional import check_points, sinkhorn

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

    def __init__(self, eps: float, max_iter: int, reduction: str = "none", *, thresh: float = 0.1) -> None:
        super().__init__()
        where = type(self).__name__
        self.eps, self.thresh = (_checks.check_finite(where, *given) for given in (("eps", eps), ("thresh", thresh)))
        if self.eps <= 0:
            raise _checks.wrong_value(where, "eps", "positive and finite", eps)
        if self.thresh < 0:
            raise _checks.wrong_value(where, "thresh", "at least 0", thresh)
        self.max_iter = _checks.check_int(where, "max_iter", max_iter, 1)
        _checks.check_choice(where, "reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"eps={self.eps}, max_iter={self.max_iter}, reduction={self.reduction!r}, thresh={self.thresh}"

    def forward(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        where = type(self).__name__
        _checks.check_floating(where, "C", C, "(N, n, m) or (n, m)", (2, 3))
        if C.shape[-2] == 0 or C.shape[-1] == 0:
            raise _checks.wrong_value(where, "C", "at least 1 x 1", C)
        return self._solve(C)

    if TYPE_CHECKING:

        @called_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _solve(self, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = self.max_iter
        if self.thresh > 0:
            with torch.no_grad():
                count = iterations_until(C if C.dim() == 3 else C[None], self.eps, self.max_iter, self.thresh)
        out = sinkhorn(C, self.eps, max_iter=count, grad="unrolled", return_plan=True)
        assert out.plan is not None
        cost = out.transport_cost
        if self.reduction != "none":
            cost = cost.mean() if self.reduction == "mean" else cost.sum()
        return cost, out.plan, C


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
        reduction: of the cost: ``"none"``, ``"mean"`` or ``"sum"``.
        thresh: see above; 0.1 in the original.

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


def iterations_until(cost: Tensor, eps: float, max_iter: int, thresh: float) -> int:
    """The iteration in which the mean over the batch of |u - u before|_1 is below `thresh`, or `max_iter`.

    One iteration at a time from the last g. A solution is shifted so that <a, f> = <b, g>; one of its rows, done once
    more in torch, tells by how much.
    """
    batch, n, m = cost.shape
    # u = v = 0, in terms of f = u - eps log(1 / n) and g = v - eps log(1 / m), shifted so that g is 0
    real = autograd.real_dtype(cost)
    f = cost.new_full((batch, n), eps * math.log(n * m), dtype=real)
    g = cost.new_zeros((batch, m), dtype=real)
    for count in range(1, max_iter):
        out = sinkhorn(cost, eps, max_iter=1, init=(None, g))
        first_f = eps * (math.log(m) - torch.logsumexp((g - cost[:, 0]) / eps, dim=1))
        change = out.f - f + (first_f - out.f[:, 0])[:, None]
        if change.abs().sum(1).mean().item() < thresh:
            return count
        f, g = out.f, out.g
    return max_iter
