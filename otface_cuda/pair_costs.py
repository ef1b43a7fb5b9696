"""The cost matrices of a stretch of listed pairs, and what their gradient is worth to the features: in two ways."""

from __future__ import annotations

from collections.abc import Iterator

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


class RowCosts:
    """Cosine costs of pairs in the order of their first sets, with one product for each of these and all its partners.

    A point set is 49 x 512, say: too small for a product of two of them to be fast, and copying sets takes time too. So
    only the partners are copied, next to one another, and what they give to the gradient of their set is added up
    within the product.
    """

    def __init__(self, features: Tensor, first: Tensor, second: Tensor) -> None:
        self.features, self.first, self.second = features, first, second

    def cost(self) -> Tensor:
        points = self.features.shape[1]
        cost = self.features.new_empty(len(self.first), points, points)
        one = self.features.new_ones(())
        with torch.autocast(self.features.device.type, enabled=False):
            for i, rows in _runs(self.first):
                one_less_products = torch.addmm(
                    one, self.features[i], self._side_by_side(self.second[rows]).T, alpha=-1
                )
                cost[rows] = one_less_products.view(points, -1, points).transpose(0, 1)
        return cost

    def add_gradient(self, grad_features: Tensor, grad_cost: Tensor, cost: Tensor) -> None:
        order = self.second.argsort(stable=True)
        with torch.autocast(self.features.device.type, enabled=False):
            for i, rows in _runs(self.first):
                grad = grad_cost[rows].transpose(0, 1).flatten(1)
                grad_features[i].addmm_(grad, self._side_by_side(self.second[rows]), alpha=-1)
            for j, run in _runs(self.second[order]):
                rows_of_j = order[run]
                grad = grad_cost[rows_of_j].flatten(0, 1).T
                grad_features[j].addmm_(grad, self._side_by_side(self.first[rows_of_j]), alpha=-1)

    def _side_by_side(self, partners: Tensor) -> Tensor:
        return self.features.index_select(0, partners).flatten(0, 1)


def _runs(sorted_indices: Tensor) -> Iterator[tuple[int, slice]]:
    """Each different index, and where it stands."""
    indices, counts = sorted_indices.unique_consecutive(return_counts=True)
    begin = 0
    for index, count in zip(indices.tolist(), counts.tolist(), strict=True):
        yield index, slice(begin, begin + count)
        begin += count


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index] += rows, the rows of one index in the order in which they stand."""
    if out.device.type == "cpu":
        out.index_add_(0, index, rows)
    else:  # sorts the indices, where index_add_ would add atomically
        out.index_put_((index,), rows, accumulate=True)
