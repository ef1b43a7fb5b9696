"""The cost matrices of listed pairs of point sets, and what their gradient is worth to the points: in two ways.

Both give, for a stretch of the list, an object with its costs, and add up the gradients of all stretches.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .autograd import real_dtype
from .costs import UnitVectors, cost_backward, cost_of_prepared

_ops = torch.ops.otface


class PairCosts(Protocol):
    def cost(self, out: Tensor | None = None) -> Tensor:
        """(K, p, p), into `out` if given."""

    def add_gradient(self, grad_cost: Tensor, cost: Tensor) -> None:
        """To the sums of the point sets."""


class PointSets(Protocol):
    def pairs(self, first: Tensor, second: Tensor) -> PairCosts:
        """Of the sets with these indices."""

    def gradient(self) -> Tensor:
        """Of the points (N, p, d), in their dtype and layout, from all that was added."""


def point_sets(points: Tensor, metric: str, want_costs: bool = True) -> PointSets:
    """From points (N, p, d) of any float dtype. Not differentiable. Without `want_costs`, perhaps gradients only."""
    if points.device.type == "cpu" and metric == "cosine":
        return PackedSets(points, want_costs)
    return CopiedSets(points, metric)


class PackedSets:
    """Cosines by the kernels of csrc/pairs, which read the sets where they lie.

    A set is 49 x 512, say: for the matrix products of a library two of them are too small, and copies take time too.
    """

    def __init__(self, points: Tensor, want_costs: bool = True) -> None:
        self.points = points
        self.rows, self.columns, self.lengths = _ops.pack_points(points, want_costs)
        self.sums: Tensor | None = None

    def pairs(self, first: Tensor, second: Tensor) -> _PackedPairs:
        return _PackedPairs(self, first.contiguous(), second.contiguous())

    def gradient(self) -> Tensor:
        if self.sums is None:
            return torch.zeros_like(self.points)
        self.columns = self.rows.new_empty(0)  # its memory may be needed
        grad = torch.empty_like(self.points, dtype=self.rows.dtype)
        _ops.unpack_gradient(self.sums, self.rows, self.lengths, grad)
        return grad.to(self.points.dtype)


class _PackedPairs:
    def __init__(self, sets: PackedSets, first: Tensor, second: Tensor) -> None:
        self.sets, self.first, self.second = sets, first, second

    def cost(self, out: Tensor | None = None) -> Tensor:
        p = self.sets.points.shape[1]
        cost = self.sets.rows.new_empty(len(self.first), p, p) if out is None else out
        _ops.pair_costs(self.sets.rows, self.sets.columns, self.first, self.second, cost)
        return cost

    def add_gradient(self, grad_cost: Tensor, cost: Tensor) -> None:
        if self.sets.sums is None:
            self.sets.sums = torch.zeros_like(self.sets.rows)
        _ops.pair_costs_backward(self.sets.rows, grad_cost, self.first, self.second, self.sets.sums)


class CopiedSets:
    """With torch's products of copies of both point sets of each pair."""

    def __init__(self, points: Tensor, metric: str) -> None:
        self.points, self.metric = points, metric
        real = points.to(real_dtype(points)).contiguous()
        self.vectors = UnitVectors.of(real) if metric == "cosine" else None
        self.prepared = real if self.vectors is None else self.vectors.unit
        self.sums: Tensor | None = None

    def pairs(self, first: Tensor, second: Tensor) -> _CopiedPairs:
        return _CopiedPairs(self, first, second)

    def gradient(self) -> Tensor:
        if self.sums is None:
            return torch.zeros_like(self.points)
        grad = self.sums if self.vectors is None else self.vectors.backward(self.sums)
        return torch.empty_like(self.points).copy_(grad)


class _CopiedPairs:
    def __init__(self, sets: CopiedSets, first: Tensor, second: Tensor) -> None:
        self.sets, self.first, self.second = sets, first, second
        self.x, self.y = (sets.prepared.index_select(0, index) for index in (first, second))

    def cost(self, out: Tensor | None = None) -> Tensor:
        cost = cost_of_prepared(self.x, self.y, self.sets.metric)
        return cost if out is None else out.copy_(cost)

    def add_gradient(self, grad_cost: Tensor, cost: Tensor) -> None:
        if self.sets.sums is None:
            self.sets.sums = torch.zeros_like(self.sets.prepared)
        grad_x, grad_y = cost_backward(grad_cost, cost, self.x, self.y, self.sets.metric)
        _add_rows(self.sets.sums, self.first, grad_x)
        _add_rows(self.sets.sums, self.second, grad_y)


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index] += rows, the rows of one index in the order in which they stand."""
    if out.device.type == "cpu":
        out.index_add_(0, index, rows)
    else:  # sorts the indices, where index_add_ would add atomically
        out.index_put_((index,), rows, accumulate=True)


@torch.library.register_fake("otface::pack_points")
def _(points, want_columns):  # type: ignore[no-untyped-def]
    (N, p, d), real = points.shape, real_dtype(points)
    depth = torch.sym_max(1, (d + 15) // 16)  # 16: `panel` of csrc/pairs/params.h
    return (
        points.new_empty((N, depth, p, 16), dtype=real),
        points.new_empty((N, (p + 15) // 16, 16 * depth, 16) if want_columns else (0,), dtype=real),
        points.new_empty((N, p), dtype=torch.float64),
    )


@torch.library.register_fake("otface::pair_costs")
@torch.library.register_fake("otface::pair_costs_backward")
@torch.library.register_fake("otface::unpack_gradient")
def _(*args):  # type: ignore[no-untyped-def]
    """They write into what they are given."""
