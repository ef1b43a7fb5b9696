"""Hard triplets of a mini-batch: those whose negative is nearer to the anchor than the positive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._numbers import number_tensor
from ._operators import operator
from .costs import UnitVectors
from .margin_softmax import check_index

CHUNK_BYTES = 64 << 20  # of the comparisons that are held at a time


def mine_hard_triplets(
    embeddings: Tensor,
    labels: Tensor,
    alpha: float = 0.0,
    max_triplets: int | None = None,
    *,
    ignore_index: int | None = None,
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
        ignore_index: rows with this label are no person: they are in no triplet.

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
    margin = check_alpha(where, alpha)
    if ignore_index is not None:
        ignore_index = check_index(where, ignore_index)
    with torch.no_grad():
        rows = embeddings.detach()
        unit = UnitVectors.of(rows if rows.dtype == torch.float64 else rows.float()).unit
        if max_triplets is None:
            return _all_hard(unit, labels, margin, ignore_index)[0]
        most = check_most(where, max_triplets)
        hardest: Tensor = torch.ops.otface.hardest_triplets(unit, labels, number_tensor(margin), most, ignore_index)
        return hardest


def check_alpha(where: str, alpha: Any) -> float:
    return _checks.check_finite(where, "alpha", alpha)


def check_most(where: str, max_triplets: Any) -> int:
    return _checks.check_int(where, "max_triplets", max_triplets, 1)


def _cosines(unit: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(unit.device.type):
        return unit @ unit.T
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ unit.T


def _all_hard(unit: Tensor, labels: Tensor, alpha: float, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """(T, 3) in ascending order, and how hard each is (T,)."""
    cosines = _cosines(unit)
    if unit.device.type == "cpu":
        triplets, hardness = torch.ops.otface.hard_triplets.default(cosines, labels, alpha, ignore_index)
        return triplets, hardness
    return hard_of_cosines(cosines, labels, alpha, ignore_index)


def hard_of_cosines(cosines: Tensor, labels: Tensor, alpha: float, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """In torch, where there is no kernel for it. The positive pairs are compared a chunk at a time."""
    positive, is_negative = _roles(labels, ignore_index)
    anchors, positives = positive.nonzero().unbind(1)
    chunk = max(1, CHUNK_BYTES // max(1, len(labels) * (2 * cosines.element_size() + 2)))
    triplets, hardness = [cosines.new_empty((0, 3), dtype=torch.int64)], [cosines.new_empty(0)]
    for begin in range(0, len(anchors), chunk):
        a, p = anchors[begin : begin + chunk], positives[begin : begin + chunk]
        excess = cosines[a] - cosines[a, p][:, None]
        pair, negative = ((excess > -alpha) & is_negative[a]).nonzero().unbind(1)
        triplets.append(torch.stack([a[pair], p[pair], negative], dim=1))
        hardness.append(excess[pair, negative])
    return torch.cat(triplets), torch.cat(hardness)


def _roles(labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """(N, N) whether a row can be an anchor's positive, and whether it can be its negative."""
    same = labels[:, None] == labels
    positive, negative = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same
    if ignore_index is not None:
        counts = labels != ignore_index
        positive, negative = positive & counts, negative & counts  # of an ignored anchor there is no positive
    return positive, negative


def _fake_hardest(unit, labels, alpha, most, ignore_index):  # type: ignore[no-untyped-def]
    return unit.new_empty((most, 3), dtype=torch.int64)


@operator("hardest_triplets", _fake_hardest)
def _hardest(unit: Tensor, labels: Tensor, alpha: Tensor, most: int, ignore_index: int | None) -> Tensor:
    if unit.device.type == "cpu":
        triplets, hardness = _all_hard(unit, labels, alpha.item(), ignore_index)
        order = hardness.argsort(descending=True, stable=True)[:most]
        return torch.nn.functional.pad(triplets[order], (0, 0, 0, most - len(order)), value=-1)
    return hardest_without_counting(unit, labels, alpha[0], most, ignore_index)


def hardest_without_counting(
    unit: Tensor, labels: Tensor, alpha: Tensor, most: int, ignore_index: int | None
) -> Tensor:
    """The same without a list whose length the host would have to know; equally hard ones may come in any order.

    It looks at every (anchor, any, any), some anchors at a time.
    """
    result = torch.full((most, 3), -1, dtype=torch.int64, device=unit.device)
    N = len(labels)
    if N == 0:
        return result
    cosines = _cosines(unit)
    positive, negative = _roles(labels, ignore_index)
    best = unit.new_full((most,), -torch.inf)
    indices = result[:, 0].clone()  # (anchor N + positive) N + negative
    chunk = max(1, CHUNK_BYTES // (N * N * 4 * unit.element_size()))
    for begin in range(0, N, chunk):
        rows = slice(begin, begin + chunk)
        excess = cosines[rows, None, :] - cosines[rows, :, None]
        hard = (excess > -alpha) & positive[rows, :, None] & negative[rows, None, :]
        excess = torch.where(hard, excess, -torch.inf).reshape(-1)
        top, place = excess.topk(min(most, excess.shape[0]))
        best, order = torch.cat([best, top]).topk(most)
        indices = torch.cat([indices, place + begin * N * N])[order]
    found = best > -torch.inf
    for column, index in enumerate((indices // (N * N), indices // N % N, indices % N)):
        result[:, column] = torch.where(found, index, -1)
    return result


@torch.library.register_fake("otface::hard_triplets")
def _(cosines, labels, alpha, ignore_index):  # type: ignore[no-untyped-def]
    count = torch.library.get_ctx().new_dynamic_size()
    return cosines.new_empty((count, 3), dtype=torch.int64), cosines.new_empty(count)
