"""Cost matrices between two sets of points, and their derivative. The matrix products are torch's own.

A cost is computed in float32 at least, also under autocast: at small eps an error of the cost is multiplied by 1 / eps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import once_differentiable

METRICS = ("cosine", "sqeuclidean", "euclidean")


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


def cost_of_prepared(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """(B, n, d), (B, m, d) -> (B, n, m): 1 - cos, |x - y|^2 or |x - y|; not differentiated by autograd."""
    with torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            return torch.baddbmm(x.new_ones(()), x, y.mT, alpha=-1)
        x, y = _centred(x, y)
        # |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>
        squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :]
        cost = torch.baddbmm(squares, x, y.mT, alpha=-2).clamp_(min=0)
        return cost if metric == "sqeuclidean" else cost.sqrt_()


def cost_backward(grad: Tensor, cost: Tensor, x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The gradients of x and y from that of the cost."""
    with torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            nothing = x.new_zeros(())
            return (
                torch.baddbmm(nothing, grad, y, beta=0, alpha=-1),
                torch.baddbmm(nothing, grad.mT, x, beta=0, alpha=-1),
            )
        if metric == "euclidean":  # d|x - y| = d|x - y|^2 / (2 |x - y|), and 0 where the points coincide
            grad = torch.where(cost > 0, grad / (2 * torch.where(cost > 0, cost, 1.0)), 0.0)
        x, y = _centred(x, y)
        grad_x = 2 * (grad.sum(2, keepdim=True) * x - torch.matmul(grad, y))
        grad_y = 2 * (grad.sum(1)[:, :, None] * y - torch.matmul(grad.mT, x))
        return grad_x, grad_y


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both about one centre: distances stay, and what cancels in their formula is then no larger than they are."""
    centre = x.mean(1, keepdim=True)
    return x - centre, y - centre


class PairwiseCost(torch.autograd.Function):
    """Prepared points to a cost matrix, with the matrix products of `cost_backward` as its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, metric: str) -> Tensor:  # type: ignore[no-untyped-def]
        cost = cost_of_prepared(x, y, metric)
        ctx.metric = metric
        ctx.save_for_backward(x, y, cost)
        return for_compile(cost)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, y, cost = ctx.saved_tensors
        with torch.no_grad():
            grads = cost_backward(grad, cost, x, y, ctx.metric)
        return *once_differentiable("sinkhorn_points", grads, (x, y, grad)), None


def pairwise_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Points (B, n, d) and (B, m, d) to their cost matrices (B, n, m), differentiable once."""
    cost: Tensor = PairwiseCost.apply(prepare_points(x, metric), prepare_points(y, metric), metric)
    return cost
