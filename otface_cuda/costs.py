"""Cost matrices between two sets of points, and their derivative. The matrix products are torch's own; what they cannot
tell of points that are near to one another comes from kernels of ours.

A cost is computed in float32 at least, also under autocast: at small eps an error of the cost is multiplied by 1 / eps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import needs_graph, once_differentiable

METRICS = ("cosine", "sqeuclidean", "euclidean")  # in the order of `Metric` of csrc/pairs/near.h

_ops = torch.ops.otface

# |x|^2 and |y|^2 of points (B, n), (B, m) about a centre, by which one sees what is near; None for the cosine.
Squares = tuple[Tensor, Tensor] | tuple[None, None]


def prepare_points(points: Tensor, metric: str) -> Tensor:
    """The points (..., d) that `cost_of_prepared` takes: in float32 or float64, and of unit length for the cosine."""
    points = points if points.dtype == torch.float64 else points.float()
    if metric != "cosine":
        return points
    unit: Tensor = _UnitLength.apply(points)
    return unit


class UnitVectors(NamedTuple):
    """A zero vector stays one: cosine 0 with everything, and no gradient. NaN stays in its own vector."""

    unit: Tensor
    length: Tensor  # of the vectors over their largest coordinate; inf for a zero vector
    largest: Tensor

    @classmethod
    def of(cls, points: Tensor) -> UnitVectors:
        if points.shape[-1] == 0:
            none = points.new_ones((*points.shape[:-1], 1))
            return cls(points.clone(), none, none)
        # First by the largest coordinate, so that no square leaves the range of the dtype.
        largest = points.abs().amax(-1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)
        scaled = points / largest
        length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        length = torch.where(length == 0, math.inf, length)
        return cls(scaled.div_(length), length, largest)

    def backward(self, grad: Tensor) -> Tensor:
        # What would only change the length is worth nothing.
        along = (grad * self.unit).sum(-1, keepdim=True)
        across = torch.addcmul(grad, self.unit, along, value=-1)
        return across.div_(self.length).div_(self.largest)


def for_compile(x: Tensor) -> Tensor:
    """What the forward of a Function returns, if it was written in place: by the torch.compile of torch 2.11, which
    takes such a tensor for one with a gradient of its own, the Function's backward is left out, but not of an alias.
    """
    return x.view_as(x) if torch.compiler.is_compiling() else x


class _UnitLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        vectors = UnitVectors.of(points)
        ctx.save_for_backward(*vectors)
        return for_compile(vectors.unit)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return UnitVectors(*ctx.saved_tensors).backward(grad)


def cost_and_squares(x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Squares]:
    """(B, n, d), (B, m, d) -> (B, n, m): 1 - cos, |x - y|^2 or |x - y|; not differentiated by autograd.

    From a matrix product, and for points that are near to one another from their differences: csrc/pairs/near.h.
    """
    if not torch.is_autocast_enabled(x.device.type):  # to enter the context takes as long as a small product
        return _cost_and_squares(x, y, metric)
    with torch.autocast(x.device.type, enabled=False):
        return _cost_and_squares(x, y, metric)


def _cost_and_squares(x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Squares]:
    squares: Squares = (None, None)
    if metric == "cosine":
        cost = torch.baddbmm(x.new_ones(()), x, y.mT, alpha=-1)
    else:
        a, b = _centred(x, y)
        squares = of_a, of_b = _squares(a, b)
        # |a - b|^2 = |a|^2 + |b|^2 - 2 <a, b>
        cost = torch.baddbmm(of_a.unsqueeze(2) + of_b.unsqueeze(1), a, b.mT, alpha=-2)
        if metric == "euclidean":
            cost.sqrt_()
    _ops.near_costs.default(cost, x.contiguous(), y.contiguous(), *squares, METRICS.index(metric))
    return cost, squares


def cost_of_prepared(x: Tensor, y: Tensor, metric: str) -> Tensor:
    return cost_and_squares(x, y, metric)[0]


def cost_backward(
    grad: Tensor, cost: Tensor, x: Tensor, y: Tensor, metric: str, squares: Squares | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and y from that of the cost."""
    with torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            nothing = x.new_zeros(())
            return (
                torch.baddbmm(nothing, grad, y, beta=0, alpha=-1),
                torch.baddbmm(nothing, grad.mT, x, beta=0, alpha=-1),
            )
        a, b = _centred(x, y)
        squares = _squares(a, b) if squares is None else squares
        entries = (cost, grad.contiguous(), x.contiguous(), y.contiguous(), *squares, METRICS.index(metric))
        weights = _ops.far_weights(*entries)
        # What is not finite is far from nothing, and has weight 0; but 0 times inf would be NaN.
        a, b = a.nan_to_num_(0.0, 0.0, 0.0), b.nan_to_num_(0.0, 0.0, 0.0)
        far_x = 2 * (weights.sum(2, keepdim=True) * a - torch.bmm(weights, b))
        far_y = 2 * (weights.sum(1)[:, :, None] * b - torch.bmm(weights.mT, a))
        grad_x, grad_y = _ops.near_gradient(*entries, far_x.contiguous(), far_y.contiguous())
        return grad_x, grad_y


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both about one centre: distances stay, and what cancels in their formula is then no larger than they are."""
    centre = x.mean(1, keepdim=True)
    return x - centre, y - centre


def _squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.square().sum(2), y.square().sum(2)


class PairwiseCost(torch.autograd.Function):
    """Prepared points to a cost matrix, with the matrix products of `cost_backward` as its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, metric: str) -> Tensor:  # type: ignore[no-untyped-def]
        cost, squares = cost_and_squares(x, y, metric)
        ctx.metric = metric
        ctx.save_for_backward(x, y, cost, *squares)
        return for_compile(cost)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, y, cost, *squares = ctx.saved_tensors
        with torch.no_grad():
            grads = cost_backward(grad, cost, x, y, ctx.metric, tuple(squares))
        return *once_differentiable("sinkhorn_points", grads, (x, y, grad)), None


def pairwise_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Points (B, n, d) and (B, m, d) to their cost matrices (B, n, m), differentiable once."""
    x, y = prepare_points(x, metric), prepare_points(y, metric)
    if not needs_graph(x, y):
        return cost_of_prepared(x, y, metric)
    cost: Tensor = PairwiseCost.apply(x, y, metric)
    return cost


@torch.library.register_fake("otface::near_costs")
def _(*args):  # type: ignore[no-untyped-def]
    """It writes into what it is given."""


@torch.library.register_fake("otface::far_weights")
def _(cost, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(cost)


@torch.library.register_fake("otface::near_gradient")
def _(cost, grad, x, y, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(y)
