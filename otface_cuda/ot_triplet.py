"""`ot_triplet_loss`: the hinge on the transport distances of hard triplets, each pair of images solved once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, autograd
from ._documented import documented_fields
from ._numbers import number_tensor
from ._operators import operator
from .costs import METRICS
from .pairs import (
    DEFAULT_CHUNK_BYTES,
    Distinct,
    KeptCosts,
    PairSettings,
    differentiate_pairs,
    empty_results,
    solve_pairs,
)

KEPT_BYTES = 64 << 20  # of costs, from the forward to the backward; more are computed again


@documented_fields
class OTTripletLossOutput(NamedTuple):
    """What :func:`ot_triplet_loss` returns; the counts are int64 tensors without dimension."""

    loss: Tensor
    """() the mean over the active triplets, 0 where there is none."""
    n_hard: Tensor
    """() triplets given, without padding."""
    n_active: Tensor
    """() of these, the ones with a loss."""


def ot_triplet_loss(
    feature_map: Tensor,
    triplets: Tensor,
    *,
    eps: float = 1.0,
    n_iter: int = 10,
    beta: float = 0.0,
    metric: str = "cosine",
    chunk_bytes: int | None = None,
) -> OTTripletLossOutput:
    r"""The mean of max(D(anchor, positive) - D(anchor, negative) + beta, 0) over the triplets where it is positive.

    D is the transport cost <P, C> between the cells of two feature maps, with uniform weights, after ``n_iter``
    Sinkhorn iterations, and differentiated through these: Qian, Zhu, Zhao, Yang, Wong 2022, arXiv 2203.14461. However
    often a pair of images occurs, and in whatever order, it is solved once, from the one with the lower index to the
    other; the gradient takes the pairs of active triplets only. D(i, j) and D(j, i) are equal at convergence, and at
    eps = 1 after 10 iterations already to rounding.

    Args:
        feature_map: (N, C, H, W), the output of a convolution, whose cells are the H W points; or points (N, P, D). Any
            float dtype, computed in float32 at least.
        triplets: (T, 3) integers, rows (anchor, positive, negative) of indices into the batch, as of
            :func:`mine_hard_triplets`; rows of -1 do not count.
        eps: strength of the entropy, in units of the cost.
        n_iter: Sinkhorn iterations.
        beta: a float; the distance that is asked for between positives and negatives.
        metric: of two cells, as in :func:`sinkhorn_points`.
        chunk_bytes: working memory at most, as in :func:`sinkhorn_pairs`. Beside it, a few tables of N^2 integers, the
            feature map in other orders as there, and the costs of the pairs if they take no more than 64 MiB.

    Returns:
        :class:`OTTripletLossOutput`: ``loss`` (a float32 scalar, float64 for float64 maps), exactly 0 with gradient 0
        where no triplet is active; ``n_hard``, ``n_active``.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came. Where indices are not
            looked at (on CUDA without ``OTFACE_CHECK=1``), one that is too large makes the loss NaN, and a row with a
            negative one does not count.

    >>> maps = torch.nn.functional.one_hot(torch.tensor([[0, 1], [2, 1], [1, 0]]), 4).float().requires_grad_()
    >>> out = ot_triplet_loss(maps, torch.tensor([[0, 1, 2]]), eps=0.05)
    >>> out.loss.round(decimals=3), out.n_hard, out.n_active
    (tensor(0.5240, grad_fn=<RoundBackward1>), tensor(1), tensor(1))
    """
    where = "ot_triplet_loss"
    _checks.check_floating(where, "feature_map", feature_map, "(N, C, H, W) or (N, P, D)", (3, 4))
    _checks.check_has_kernels(where, "feature_map", feature_map)
    points = feature_map if feature_map.dim() == 3 else feature_map.flatten(2).mT
    if points.shape[1] == 0:
        raise _checks.wrong_value(where, "feature_map", "at least one cell each", feature_map)
    _check_triplets(where, triplets, feature_map)
    numbers = number_tensor(check_eps(where, eps), check_beta(where, beta))
    n_iter = check_iterations(where, n_iter)
    metric = check_metric(where, metric)
    if chunk_bytes is None:
        chunk_bytes = DEFAULT_CHUNK_BYTES[feature_map.device.type]
    chunk_bytes = _checks.check_int(where, "chunk_bytes", chunk_bytes, 1)
    arguments = (points, triplets.to(torch.int64), numbers, n_iter, metric, chunk_bytes)
    if autograd.needs_graph(points):
        loss, n_hard, n_active = _OTTripletLoss.apply(*arguments)
    else:
        loss, n_hard, n_active = torch.ops.otface.ot_triplet_forward(*arguments, False)[:3]
    return OTTripletLossOutput(loss, n_hard, n_active)


def check_eps(where: str, eps: Any) -> float:
    if isinstance(eps, Tensor):
        raise _checks.wrong_type(where, "eps", "a positive float", eps)
    strength = _checks.check_finite(where, "eps", eps)
    if strength <= 0:
        raise _checks.wrong_value(where, "eps", "positive and finite", eps)
    return strength


def check_iterations(where: str, n_iter: Any) -> int:
    return _checks.check_int(where, "n_iter", n_iter, 1)


def check_beta(where: str, beta: Any) -> float:
    return _checks.check_finite(where, "beta", beta)


def check_metric(where: str, metric: Any) -> str:
    _checks.check_choice(where, "metric", metric, METRICS)
    return str(metric)


def _check_triplets(where: str, triplets: Any, feature_map: Tensor) -> None:
    expected = "an integer tensor of shape (T, 3)"
    if not isinstance(triplets, Tensor) or triplets.is_floating_point() or triplets.is_complex():
        raise _checks.wrong_type(where, "triplets", expected, triplets)
    if triplets.dtype == torch.bool:
        raise _checks.wrong_type(where, "triplets", expected, triplets)
    _checks.check_dense(where, "triplets", triplets)
    if triplets.dim() != 2 or triplets.shape[1] != 3:
        raise _checks.wrong_value(where, "triplets", expected, triplets)
    _checks.check_device(where, "triplets", triplets, "feature_map", feature_map)
    if not _checks.checks_data(triplets):
        return
    N = feature_map.shape[0]
    in_range = (triplets >= 0) & (triplets < N)
    if in_range.all():
        return
    wrong = ~in_range.all(1) & ~(triplets == -1).all(1)
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"{where}: `triplets` must be between 0 and {N - 1}, or -1 throughout a row that does not count, "
            f"got {triplets[t].tolist()} in row {t}"
        )


class _OTTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, points: Tensor, triplets: Tensor, numbers: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, n_hard, n_active, hinge, kept = torch.ops.otface.ot_triplet_forward(
            points, triplets, numbers, *settings, True
        )
        ctx.settings = settings
        ctx.mark_non_differentiable(n_hard, n_active)
        ctx.save_for_backward(points, triplets, numbers, hinge, kept)
        return loss, n_hard, n_active

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        points, triplets, numbers, hinge, kept = ctx.saved_tensors
        with torch.no_grad():
            grad = torch.ops.otface.ot_triplet_backward(
                points, triplets, hinge, kept, grad_loss, numbers, *ctx.settings
            )
        (grad,) = autograd.once_differentiable("ot_triplet_loss", (grad,), (points, grad_loss))
        return grad, None, None, *(None for _ in ctx.settings)


class _Pairs(NamedTuple):
    listed: Tensor  # (K, 2) each pair of images that occurs, lower index first; past the last one, where K is fixed, -1
    positive: Tensor  # (T,) into these: anchor and positive; K where the triplet does not count
    negative: Tensor  # (T,) anchor and negative


def _counts(triplets: Tensor) -> Tensor:
    """(T,) whether a row is a triplet and no padding."""
    a, p, n = (x >= 0 for x in triplets.unbind(1))
    return a & p & n


def _pairs_of(triplets: Tensor, counts: Tensor, N: int) -> _Pairs:
    """The pairs of the triplets that count, each once.

    They are marked in a table of all pairs, which takes no longer than the list is. How many there are is asked for on
    the CPU only; elsewhere there is room for as many as there can be.
    """
    a, p, n = triplets.unbind(1)
    keys = torch.stack([torch.minimum(a, other) * N + torch.maximum(a, other) for other in (p, n)])
    nowhere = N * N
    keys = torch.where(counts & (a < N) & (p < N) & (n < N), keys, nowhere)
    table = torch.zeros(nowhere + 1, dtype=torch.bool, device=triplets.device)
    table[keys.reshape(-1)] = True
    table[nowhere:].fill_(False)  # an assignment may copy the number from the host
    number = table.cumsum(0) - 1
    size = int(number[-1]) + 1 if table.device.type == "cpu" else min(keys.numel(), N * (N + 1) // 2)  # = _room
    listed = torch.full((size + 1,), -1, device=triplets.device)
    every = torch.arange(nowhere + 1, device=triplets.device)
    listed.scatter_(0, torch.where(table, number, size), torch.where(table, every, -1))
    listed = listed[:size]
    first, second = torch.where(listed < 0, -1, listed // max(1, N)), torch.where(listed < 0, -1, listed % max(1, N))
    number = torch.where(table, number, size)
    return _Pairs(torch.stack([first, second], dim=1), *number[keys])


def _distinct(pairs: _Pairs, rows: Tensor | slice, wanted: Tensor | None = None) -> Distinct:
    """These of the pairs as `sinkhorn_pairs` takes them; those not `wanted` are left unsolved."""
    first, second = pairs.listed[rows].unbind(1)
    valid = first >= 0 if wanted is None else (first >= 0) & wanted
    return Distinct(first.clamp(min=0), second.clamp(min=0), valid, None, None)


def _strengths(eps: Tensor, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """`eps`, a number on the CPU, and `tol` of so many problems."""
    tol = torch.zeros(1, dtype=torch.float64, device=like.device)
    # By arithmetic, which hands the number to the GPU with the launch: a copy from the CPU would wait for it.
    return (tol + eps).expand(count), tol.expand(count)


def _room(triplets: Tensor, points: Tensor) -> int:
    """How many pairs there can be."""
    return min(2 * len(triplets), len(points) * (len(points) + 1) // 2)


def _kept_shape(triplets: Tensor, points: Tensor) -> tuple[int, ...]:
    """Of the costs that the forward keeps for the gradient: none if they might be too large."""
    p = points.shape[1]
    room = _room(triplets, points)
    return (room, p, p) if room * p * p * autograd.real_dtype(points).itemsize <= KEPT_BYTES else (0, p, p)


def _fake_forward(points, triplets, numbers, n_iter, metric, chunk_bytes, keep):  # type: ignore[no-untyped-def]
    count, real = points.new_empty((), dtype=torch.int64), autograd.real_dtype(points)
    kept = points.new_empty(_kept_shape(triplets, points) if keep else 0, dtype=real)
    loss, hinge = (points.new_empty(shape, dtype=real) for shape in ((), len(triplets)))
    return loss, count, torch.empty_like(count), hinge, kept


def _fake_backward(points, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(points)


@operator("ot_triplet_forward", _fake_forward)
def _forward(
    points: Tensor, triplets: Tensor, numbers: Tensor, n_iter: int, metric: str, chunk_bytes: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    eps, beta = numbers  # on the CPU
    real = autograd.real_dtype(points)
    kept = points.new_empty(_kept_shape(triplets, points) if keep else 0, dtype=real)
    if len(triplets) == 0 or len(points) == 0:
        none, loss = points.new_zeros((), dtype=torch.int64), points.new_zeros((), dtype=real)
        return loss, none, none.clone(), loss.new_zeros(len(triplets)), kept
    counts = _counts(triplets)
    n_hard = counts.sum()
    pairs = _pairs_of(triplets, counts, len(points))
    size = len(pairs.listed)
    distances = points.new_full((size + 1,), torch.nan, dtype=real)  # the last one is that of pairs that do not exist
    settings = PairSettings(metric, n_iter, n_iter, "unrolled", chunk_bytes)
    strengths, tol = _strengths(eps, size, points)
    out = empty_results(points, pairs.listed)
    keep_in = kept[:size] if kept.numel() > 0 else None
    solve_pairs(out, points, _distinct(pairs, slice(size)), strengths, None, None, tol, settings, keep_in)
    distances[:size] = out[1]
    hinge = torch.where(counts, distances[pairs.positive] - distances[pairs.negative] + beta, 0.0)
    hinge = torch.where(hinge <= 0, 0.0, hinge)  # NaN stays
    n_active = (hinge != 0).sum()
    return hinge.sum() / n_active.clamp(min=1), n_hard, n_active, hinge, kept


@operator("ot_triplet_backward", _fake_backward)
def _backward(
    points: Tensor,
    triplets: Tensor,
    hinge: Tensor,
    kept: Tensor,
    grad_loss: Tensor,
    numbers: Tensor,
    n_iter: int,
    metric: str,
    chunk_bytes: int,
) -> Tensor:
    if len(triplets) == 0 or len(points) == 0:
        return torch.zeros_like(points)
    pairs = _pairs_of(triplets, _counts(triplets), len(points))  # as in the forward
    size = len(pairs.listed)
    active = (hinge != 0).long()
    # An active triplet adds the same number to one distance as it takes from another: adding them up is counting.
    none = torch.zeros(size + 1, dtype=torch.int64, device=points.device)
    plus = none.index_add(0, pairs.positive, active)[:size]
    minus = none.index_add(0, pairs.negative, active)[:size]
    grad_distances = (plus - minus).to(hinge.dtype) * (grad_loss / active.sum().clamp(min=1)) + hinge.sum() * 0
    wanted = (plus != minus) | ~grad_distances.isfinite()
    rows: Tensor | None = None
    if points.device.type == "cpu":
        rows = wanted.nonzero()[:, 0]
        distinct, grad_distances = _distinct(pairs, rows), grad_distances[rows]
    else:
        distinct = _distinct(pairs, slice(size), wanted)
    strengths, tol = _strengths(numbers[0], len(distinct.first), points)
    settings = PairSettings(metric, n_iter, n_iter, "unrolled", chunk_bytes)
    nothing = points.new_empty(0)
    incoming = autograd.OutputGradients(None, grad_distances, None, None, None)
    return differentiate_pairs(
        True, (nothing, nothing), points, distinct, strengths, None, None, tol, settings, nothing, nothing, incoming,
        KeptCosts(kept, rows) if kept.numel() > 0 else None,
    )  # fmt: skip
