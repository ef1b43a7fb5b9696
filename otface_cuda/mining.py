"""Hard triplets of a mini-batch: those whose negative is nearer to the anchor than the positive."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._operators import operator
from .costs import prepare_points

CHUNK_BYTES = 64 << 20  # of the comparisons that are held at a time


def mine_hard_triplets(
    embeddings: Tensor, labels: Tensor, alpha: float = 0.0, max_triplets: int | None = None
) -> Tensor:
    r"""All (anchor, positive, negative) of the batch with cos(anchor, negative) - cos(anchor, positive) > -alpha.

    A positive is another row with the anchor's label, a negative one with another label: Qian, Zhu, Zhao, Yang, Wong
    2022, arXiv 2203.14461, section 3.2.

    Args:
        embeddings: (N, d), any float dtype and any length; a zero row has cosine 0 with everything.
        labels: (N,), an integer dtype.
        alpha: a float; above 0, triplets that are almost hard count too.
        max_triplets: return exactly so many rows, the hardest first (equally hard ones in the order of their indices
            on the CPU, in any order on CUDA), filled up with -1. The size then does not depend on the data: nothing
            waits for a GPU, and ``torch.compile`` can trace it.

    Returns:
        (T, 3) int64, rows of indices in ascending order unless ``max_triplets`` orders them. No gradient. Memory grows
        with the number of results and N^2, never N^3.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.

    >>> embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]])
    >>> mine_hard_triplets(embeddings, torch.tensor([0, 0, 1, 2]))
    tensor([[0, 1, 2],
            [1, 0, 2]])
    >>> mine_hard_triplets(embeddings, torch.tensor([0, 0, 1, 2]), max_triplets=3)
    tensor([[ 1,  0,  2],
            [ 0,  1,  2],
            [-1, -1, -1]])
    """
    where = "mine_hard_triplets"
    _checks.check_floating(where, "embeddings", embeddings, "(N, d)", (2,))
    labels = _checks.class_labels(where, labels, "embeddings", embeddings)
    margin = _checks.check_finite(where, "alpha", alpha)
    with torch.no_grad():
        unit = prepare_points(embeddings.detach(), "cosine")
        if max_triplets is None:
            return _all_hard(unit, labels, margin)[0]
        most = _checks.check_int(where, "max_triplets", max_triplets, 1)
        hardest: Tensor = torch.ops.otface.hardest_triplets(unit, labels, margin, most)
        return hardest


def _cosines(unit: Tensor) -> Tensor:
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ unit.T


def _all_hard(unit: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(T, 3) in ascending order, and how hard each is (T,). The positive pairs are compared a chunk at a time."""
    cosines = _cosines(unit)
    same = labels[:, None] == labels
    anchors, positives = (same & ~torch.eye(len(labels), dtype=torch.bool, device=unit.device)).nonzero().unbind(1)
    chunk = max(1, CHUNK_BYTES // max(1, len(labels) * (2 * unit.element_size() + 2)))
    triplets, hardness = [unit.new_empty((0, 3), dtype=torch.int64)], [unit.new_empty(0)]
    for begin in range(0, len(anchors), chunk):
        a, p = anchors[begin : begin + chunk], positives[begin : begin + chunk]
        excess = cosines[a] - cosines[a, p][:, None]
        pair, negative = ((excess > -alpha) & ~same[a]).nonzero().unbind(1)
        triplets.append(torch.stack([a[pair], p[pair], negative], dim=1))
        hardness.append(excess[pair, negative])
    return torch.cat(triplets), torch.cat(hardness)


def _fake_hardest(unit, labels, alpha, most):  # type: ignore[no-untyped-def]
    return unit.new_empty((most, 3), dtype=torch.int64)


@operator("hardest_triplets", _fake_hardest)
def _hardest(unit: Tensor, labels: Tensor, alpha: float, most: int) -> Tensor:
    if unit.device.type == "cpu":
        triplets, hardness = _all_hard(unit, labels, alpha)
        order = hardness.argsort(descending=True, stable=True)[:most]
        return torch.nn.functional.pad(triplets[order], (0, 0, 0, most - len(order)), value=-1)
    return hardest_without_counting(unit, labels, alpha, most)


def hardest_without_counting(unit: Tensor, labels: Tensor, alpha: float, most: int) -> Tensor:
    """The same without a list whose length the host would have to know; equally hard ones may come in any order.

    It looks at every (anchor, any, any), some anchors at a time.
    """
    result = torch.full((most, 3), -1, dtype=torch.int64, device=unit.device)
    N = len(labels)
    if N == 0:
        return result
    cosines, same = _cosines(unit), labels[:, None] == labels
    positive = same & ~torch.eye(N, dtype=torch.bool, device=unit.device)
    best = unit.new_full((most,), -torch.inf)
    indices = result[:, 0].clone()  # (anchor N + positive) N + negative
    chunk = max(1, CHUNK_BYTES // (N * N * 4 * unit.element_size()))
    for begin in range(0, N, chunk):
        rows = slice(begin, begin + chunk)
        excess = cosines[rows, None, :] - cosines[rows, :, None]
        hard = (excess > -alpha) & positive[rows, :, None] & ~same[rows, None, :]
        excess = torch.where(hard, excess, -torch.inf).reshape(-1)
        top, place = excess.topk(min(most, excess.shape[0]))
        best, order = torch.cat([best, top]).topk(most)
        indices = torch.cat([indices, place + begin * N * N])[order]
    found = best > -torch.inf
    for column, index in enumerate((indices // (N * N), indices // N % N, indices % N)):
        result[:, column] = torch.where(found, index, -1)
    return result
