"""The matrix products of the OTFace term alone, as torch computes them, in three ways.

Costs of all different pairs, and both gradients of those that are in the loss. Nothing is gathered or added up:
operands lie ready, results go to the same place each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from otface_problems import Exact, Problem, unit_cells
from torch import Tensor

BATCH = 256  # pairs of one bmm
IMAGES = 8  # of a block


def own_products(problem: Problem, exact: Exact) -> dict[str, Callable[[], None]]:
    cells = unit_cells(problem.maps).contiguous()
    return {
        "bmm": of_pairs(cells, len(exact.pairs), len(exact.active)),
        "mm of blocks": of_blocks(cells),
        "mm per image": of_images(cells, exact.pairs, exact.active),
    }


def of_pairs(cells: Tensor, pairs: int, active: int) -> Callable[[], None]:
    """torch.bmm, some hundred pairs at a time."""
    _, p, d = cells.shape
    x, y, out = (cells.new_empty(BATCH, p, d).normal_() for _ in range(3))
    costs = cells.new_empty(BATCH, p, p).normal_()

    def sizes(count: int) -> list[int]:
        return [BATCH] * (count // BATCH) + [count % BATCH] * (count % BATCH > 0)

    def call() -> None:
        for k in sizes(pairs):
            torch.bmm(x[:k], y[:k].mT, out=costs[:k])
        for k in sizes(active):
            torch.bmm(costs[:k], y[:k], out=out[:k])
            torch.bmm(costs[:k].mT, x[:k], out=out[:k])

    return call


def of_blocks(cells: Tensor) -> Callable[[], None]:
    """torch.mm of a few images with all that come after them, whether these pairs are listed or not."""
    N, p, _ = cells.shape
    rows = cells.flatten(0, 1)
    table, out = cells.new_empty(IMAGES * p, N * p), torch.empty_like(rows)

    def call() -> None:
        for begin in range(0, N * p, IMAGES * p):
            x, y = rows[begin : begin + IMAGES * p], rows[begin:]
            products = table[: len(x), : len(y)]
            torch.mm(x, y.T, out=products)
            torch.mm(products, y, out=out[: len(x)])
            torch.mm(products.T, x, out=out[: len(y)])

    return call


def of_images(cells: Tensor, pairs: Tensor, active: Tensor) -> Callable[[], None]:
    """torch.mm of each image with all its partners, as if these were next to one another."""
    N, p, d = cells.shape
    rows = cells.flatten(0, 1)
    table, out = cells.new_empty(N * p * p), cells.new_empty(p, d)
    forward, first, second = (
        [k * p for k in indices.bincount(minlength=N).tolist() if k]
        for indices in (pairs[:, 0], active[:, 0], active[:, 1])
    )

    def call() -> None:
        for k in forward:
            torch.mm(rows[:p], rows[:k].T, out=table[: p * k].view(p, k))
        for k in first + second:
            torch.mm(table[: p * k].view(p, k), rows[:k], out=out)

    return call
