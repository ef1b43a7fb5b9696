"""`ot_triplet_loss`: the hinge on the transport distances of hard triplets, each pair of images solved once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, autograd
from .costs import METRICS, prepare_points
from .pairs import DEFAULT_CHUNK_BYTES


class OTTripletLossOutput(NamedTuple):
    """What :func:`ot_triplet_loss` returns; the counts are int64 tensors without dimension."""

    loss: Tensor
    n_hard: Tensor  # triplets given, without padding
    n_active: Tensor  # of these, the ones with a loss


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
        chunk_bytes: working memory at most, as in :func:`sinkhorn_pairs`. Beside it, a table of 9 N^2 bytes.

    Returns:
        :class:`OTTripletLossOutput`: ``loss`` (a float32 scalar, float64 for float64 maps), exactly 0 with gradient 0
        where no triplet is active; ``n_hard``, ``n_active``.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came. An index out of range
            where indices are not looked at (on CUDA without ``OTFACE_CHECK=1``) makes the loss NaN.

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
    if isinstance(eps, Tensor):
        raise _checks.wrong_type(where, "eps", "a positive float", eps)
    strength = _checks.check_finite(where, "eps", eps)
    if strength <= 0:
        raise _checks.wrong_value(where, "eps", "positive and finite", eps)
    n_iter = _checks.check_int(where, "n_iter", n_iter, 1)
    slack = _checks.check_finite(where, "beta", beta)
    _checks.check_choice(where, "metric", metric, METRICS)
    if chunk_bytes is None:
        chunk_bytes = DEFAULT_CHUNK_BYTES[feature_map.device.type]
    chunk_bytes = _checks.check_int(where, "chunk_bytes", chunk_bytes, 1)
    prepared = prepare_points(points, metric).contiguous()
    arguments = (prepared, triplets.to(torch.int64), strength, n_iter, slack, metric, chunk_bytes)
    if autograd.needs_graph(prepared):
        loss, n_hard, n_active = _OTTripletLoss.apply(*arguments)
    else:
        loss, n_hard, n_active, _ = torch.ops.otface.ot_triplet_forward(*arguments)
    return OTTripletLossOutput(loss, n_hard, n_active)


def _check_triplets(where: str, triplets: Any, feature_map: Tensor) -> None:
    expected = "an integer tensor of shape (T, 3)"
    if not isinstance(triplets, Tensor) or triplets.is_floating_point() or triplets.is_complex():
        raise _checks.wrong_type(where, "triplets", expected, triplets)
    if triplets.dtype == torch.bool:
        raise _checks.wrong_type(where, "triplets", expected, triplets)
    if triplets.dim() != 2 or triplets.shape[1] != 3:
        raise _checks.wrong_value(where, "triplets", expected, triplets)
    _checks.check_dense(where, "triplets", triplets)
    _checks.check_device(where, "triplets", triplets, "feature_map", feature_map)
    if not _checks.checks_data(triplets):
        return
    N = feature_map.shape[0]
    wrong = ((triplets < 0) | (triplets >= N)).any(1) & ~(triplets == -1).all(1)
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise ValueError(
            f"{where}: `triplets` must be between 0 and {N - 1}, or -1 throughout a row that does not count, "
            f"got {triplets[t].tolist()} in row {t}"
        )


class _OTTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points: Tensor, triplets: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        loss, n_hard, n_active, hinge = torch.ops.otface.ot_triplet_forward(points, triplets, *settings)
        ctx.settings = settings
        ctx.mark_non_differentiable(n_hard, n_active)
        ctx.save_for_backward(points, triplets, hinge)
        return loss, n_hard, n_active

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        points, triplets, hinge = ctx.saved_tensors
        with torch.no_grad():
            grad = torch.ops.otface.ot_triplet_backward(points, triplets, hinge, grad_loss, *ctx.settings)
        (grad,) = autograd.once_differentiable("ot_triplet_loss", (grad,), (points, grad_loss))
        return grad, None, *(None for _ in ctx.settings)


class _Pairs(NamedTuple):
    listed: Tensor  # (K, 2) each pair of images that occurs, lower index first; past the last one, where K is fixed, -1
    positive: Tensor  # (T,) into these: anchor and positive; K where the triplet does not count
    negative: Tensor  # (T,) anchor and negative


def _pairs_of(triplets: Tensor, counts: Tensor, N: int) -> _Pairs:
    """The pairs of the triplets that count, each once.

    They are marked in a table of all pairs, which takes no longer than the list is. How many there are is asked for on
    the CPU only; elsewhere there is room for as many as there can be.
    """
    a, p, n = triplets.unbind(1)
    keys = torch.stack([torch.minimum(a, other) * N + torch.maximum(a, other) for other in (p, n)])
    nowhere = N * N
    keys = torch.where(counts & (triplets.amin(1) >= 0) & (triplets.amax(1) < N), keys, nowhere)
    table = torch.zeros(nowhere + 1, dtype=torch.bool, device=triplets.device)
    table[keys.reshape(-1)] = True
    table[nowhere] = False
    number = table.cumsum(0) - 1
    size = int(number[-1]) + 1 if table.device.type == "cpu" else min(keys.numel(), N * (N + 1) // 2)
    listed = torch.full((size + 1,), -1, device=triplets.device)
    every = torch.arange(nowhere + 1, device=triplets.device)
    listed.scatter_(0, torch.where(table, number, size), torch.where(table, every, -1))
    listed = listed[:size]
    first, second = torch.where(listed < 0, -1, listed // max(1, N)), torch.where(listed < 0, -1, listed % max(1, N))
    number = torch.where(table, number, size)
    return _Pairs(torch.stack([first, second], dim=1), *number[keys])


def _pair_arguments(listed: Tensor, eps: float, n_iter: int, metric: str, chunk_bytes: int) -> tuple[Any, ...]:
    """What the operators of `sinkhorn_pairs` take after the features."""
    numbers = torch.full((2, 1), eps, dtype=torch.float64, device=listed.device)
    numbers[1] = 0
    strengths, tol = numbers.expand(2, len(listed))
    return listed, strengths, None, None, tol, metric, n_iter, n_iter, "unrolled", chunk_bytes


@torch.library.custom_op("otface::ot_triplet_forward", mutates_args=())
def _forward(
    points: Tensor,
    triplets: Tensor,
    eps: float,
    n_iter: int,
    beta: float,
    metric: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = triplets.amin(1) >= 0 if len(triplets) else triplets.new_zeros(0, dtype=torch.bool)
    n_hard = counts.sum()
    if len(triplets) == 0 or len(points) == 0:
        return points.new_zeros(()), n_hard, n_hard.clone(), points.new_zeros(len(triplets))
    pairs = _pairs_of(triplets, counts, len(points))
    distances = torch.ops.otface.sinkhorn_pairs_forward(
        points, *_pair_arguments(pairs.listed, eps, n_iter, metric, chunk_bytes)
    )[1]
    distances = torch.cat([distances, distances.new_full((1,), torch.nan)])  # of pairs that do not exist
    hinge = torch.where(counts, distances[pairs.positive] - distances[pairs.negative] + beta, 0.0)
    hinge = torch.where(hinge <= 0, 0.0, hinge)  # NaN stays
    n_active = (hinge != 0).sum()
    return hinge.sum() / n_active.clamp(min=1), n_hard, n_active, hinge


@torch.library.custom_op("otface::ot_triplet_backward", mutates_args=())
def _backward(
    points: Tensor,
    triplets: Tensor,
    hinge: Tensor,
    grad_loss: Tensor,
    eps: float,
    n_iter: int,
    beta: float,
    metric: str,
    chunk_bytes: int,
) -> Tensor:
    active = hinge != 0
    if points.device.type == "cpu":
        triplets, hinge = triplets[active], hinge[active]
        active = hinge != 0
    if len(triplets) == 0 or len(points) == 0:
        return torch.zeros_like(points)
    pairs = _pairs_of(triplets, active, len(points))
    size = len(pairs.listed)
    # The same number for every active triplet, so that adding them up is counting.
    times = torch.zeros(size + 1, dtype=torch.int64, device=points.device)
    times = times.index_add(0, pairs.positive, active.long()).index_add(0, pairs.negative, -active.long())
    each = grad_loss / active.sum().clamp(min=1)
    spoilt = hinge.sum() * 0  # NaN if any of them is
    grad_distances = times[:size].to(points.dtype) * each + spoilt
    arguments = _pair_arguments(pairs.listed, eps, n_iter, metric, chunk_bytes)
    none = points.new_empty((size, 2 * points.shape[1]), dtype=torch.float64)  # the unrolled gradient solves again
    n_iters = torch.full((size,), n_iter, device=points.device)
    grad: Tensor = torch.ops.otface.sinkhorn_pairs_backward(
        points, *arguments, none, n_iters, None, grad_distances, None, None, True, False, False
    )[0]
    return grad


@_forward.register_fake
def _(points, triplets, *args):  # type: ignore[no-untyped-def]
    count = points.new_empty((), dtype=torch.int64)
    return points.new_empty(()), count, torch.empty_like(count), points.new_empty(len(triplets))


@_backward.register_fake
def _(points, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(points)
