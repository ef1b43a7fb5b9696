"""The cost matrices of a stretch of listed pairs, and what their gradient is worth to the features: in two ways."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .costs import cost_backward, cost_of_prepared


class GatheredCosts:
    """From copies of both point sets of each pair: nothing is computed in vain."""

    def __init__(self, features: Tensor, first: Tensor, second: Tensor, metric: str) -> None:
        self.first, self.second, self.metric = first, second, metric
        self.x, self.y = features.index_select(0, first), features.index_select(0, second)

    def cost(self) -> Tensor:
        return cost_of_prepared(self.x, self.y, self.metric)

    def add_gradient(self, grad_features: Tensor, grad_cost: Tensor, cost: Tensor) -> None:
        grad_x, grad_y = cost_backward(grad_cost, cost, self.x, self.y, self.metric)
        _add_rows(grad_features, self.first, grad_x)
        _add_rows(grad_features, self.second, grad_y)


class Block(NamedTuple):
    """Pairs (i, j) with row_begin <= i < row_end and col_begin <= j < col_end."""

    row_begin: int
    row_end: int
    col_begin: int
    col_end: int

    @property
    def pairs(self) -> int:
        return (self.row_end - self.row_begin) * (self.col_end - self.col_begin)


class BlockCosts:
    """Cosine costs from one matrix product for all pairs of a block, listed or not.

    A point set is 49 x 512, say: too small for a product of two of them to be fast, and copying the sets takes longer
    than multiplying them. The product of a block reads every set where it is.
    """

    def __init__(self, features: Tensor, first: Tensor, second: Tensor, block: Block) -> None:
        self.features, self.block = features, block
        self.pairs = first - block.row_begin, second - block.col_begin

    def cost(self) -> Tensor:
        with torch.autocast(self.features.device.type, enabled=False):
            products = self._rows(self.features) @ self._cols(self.features).T
        return self._by_pair(products)[self.pairs].neg_().add_(1)

    def add_gradient(self, grad_features: Tensor, grad_cost: Tensor, cost: Tensor) -> None:
        points, b = self.features.shape[1], self.block
        grad_products = grad_cost.new_zeros((b.row_end - b.row_begin) * points, (b.col_end - b.col_begin) * points)
        self._by_pair(grad_products)[self.pairs] = grad_cost
        with torch.autocast(self.features.device.type, enabled=False):
            self._rows(grad_features).addmm_(grad_products, self._cols(self.features), alpha=-1)
            self._cols(grad_features).addmm_(grad_products.T, self._rows(self.features), alpha=-1)

    def _rows(self, features: Tensor) -> Tensor:
        return features[self.block.row_begin : self.block.row_end].flatten(0, 1)

    def _cols(self, features: Tensor) -> Tensor:
        return features[self.block.col_begin : self.block.col_end].flatten(0, 1)

    def _by_pair(self, products: Tensor) -> Tensor:
        """From (rows * points, cols * points) to (rows, cols, points, points)."""
        points, b = self.features.shape[1], self.block
        return products.view(b.row_end - b.row_begin, points, -1, points).transpose(1, 2)


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index] += rows, the rows of one index in the order in which they stand."""
    if out.device.type == "cpu":
        out.index_add_(0, index, rows)
    else:  # sorts the indices, where index_add_ would add atomically
        out.index_put_((index,), rows, accumulate=True)
