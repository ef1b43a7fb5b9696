"""Cost matrices between two sets of points, and their derivative. The matrix products are torch's own.

A cost is computed in float32 at least, also under autocast: at small eps an error of the cost is multiplied by 1 / eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("cosine", "sqeuclidean", "euclidean")


def prepare_points(points: Tensor, metric: str) -> Tensor:
    """The points (..., d) that `cost_of_prepared` takes: in float32 or float64, and of unit length for the cosine."""
    points = points if points.dtype == torch.float64 else points.float()
    if metric != "cosine":
        return points
    # A zero vector has cosine 0 with everything, and no gradient.
    square = points.square().sum(-1, keepdim=True)
    nonzero = square > 0
    # Squares of very small or very large coordinates leave the range of the dtype: scale by the largest coordinate.
    safe = nonzero & square.isfinite() & (square > torch.finfo(points.dtype).tiny * 1e6)
    largest = points.detach().abs().amax(-1, keepdim=True) if points.shape[-1] > 0 else square
    scale = torch.where(safe | (largest == 0) | ~largest.isfinite(), 1.0, largest)
    scaled = points / scale
    square = scaled.square().sum(-1, keepdim=True)
    return scaled * torch.where(square > 0, square, 1.0).rsqrt() * (square > 0)


def cost_of_prepared(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """(B, n, d), (B, m, d) -> (B, n, m): 1 - cos, |x - y|^2 or |x - y|; not differentiated by autograd."""
    with torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            return torch.matmul(x, y.mT).neg_().add_(1)
        if metric == "sqeuclidean":
            return _square_distance(x, y)
        return _square_distance(x, y).sqrt_()


def cost_backward(grad: Tensor, cost: Tensor, x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The gradients of x and y from that of the cost."""
    with torch.autocast(x.device.type, enabled=False):
        if metric == "cosine":
            return -torch.matmul(grad, y), -torch.matmul(grad.mT, x)
        if metric == "euclidean":  # d|x - y| = d|x - y|^2 / (2 |x - y|), and 0 where the points coincide
            grad = torch.where(cost > 0, grad / (2 * torch.where(cost > 0, cost, 1.0)), 0.0)
        grad_x = 2 * (grad.sum(2, keepdim=True) * x - torch.matmul(grad, y))
        grad_y = 2 * (grad.sum(1)[:, :, None] * y - torch.matmul(grad.mT, x))
        return grad_x, grad_y


def _square_distance(x: Tensor, y: Tensor) -> Tensor:
    # |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>, about a common centre: what cancels is then no larger than the distances.
    centre = x.mean(1, keepdim=True)
    x, y = x - centre, y - centre
    cost = torch.baddbmm(x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :], x, y.mT, alpha=-2)
    return cost.clamp_(min=0)


class PairwiseCost(torch.autograd.Function):
    """Prepared points to a cost matrix, with the matrix products of `cost_backward` as its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, metric: str) -> Tensor:  # type: ignore[no-untyped-def]
        cost = cost_of_prepared(x, y, metric)
        ctx.metric = metric
        ctx.save_for_backward(x, y, cost)
        return cost

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, y, cost = ctx.saved_tensors
        return *cost_backward(grad, cost, x, y, ctx.metric), None


def pairwise_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Points (B, n, d) and (B, m, d) to their cost matrices (B, n, m), differentiable once."""
    cost: Tensor = PairwiseCost.apply(prepare_points(x, metric), prepare_points(y, metric), metric)
    return cost
