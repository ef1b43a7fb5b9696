"""`sinkhorn_pairs`: optimal transport between the point sets of listed pairs, a bounded chunk of them at a time.

The two operators take the points as the user holds them, and are opaque to tracing, because the number of different
pairs depends on the data. Neither keeps a cost matrix: the backward computes those of a chunk again. On CUDA nothing
here may wait for the device, so every listed pair is solved there, also one that is listed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _convergence, autograd
from ._operators import operator
from .costs import METRICS
from .functional import SinkhornOutput
from .pair_costs import PackedSets, PairCosts, PointSets, point_sets

# A chunk should stay in a processor's cache, but give a GPU thousands of small problems at a time.
DEFAULT_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
# Where copies are multiplied: both point sets of a pair and their gradients; for the distances also centred copies and
# the two products of each.
COPIES_OF_POINTS = {"cosine": 4, "sqeuclidean": 8, "euclidean": 8}


def sinkhorn_pairs(
    features: Tensor,
    pairs: Tensor,
    eps: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str = "cosine",
    max_iter: int = 100,
    tol: float | Tensor = 0.0,
    check_every: int = 10,
    grad: str = "envelope",
    chunk_bytes: int | None = None,
) -> SinkhornOutput:
    r"""Entropic optimal transport between ``features[i]`` and ``features[j]`` for each listed pair (i, j).

    The same as :func:`otface_cuda.sinkhorn_points` on ``features[pairs[:, 0]]`` and ``features[pairs[:, 1]]``, without
    holding those copies, their cost matrices or their gradients for more than a chunk of pairs. On the CPU a pair that
    is listed twice is solved once. On CUDA it is solved twice, with the same result: to find it, the host would have to
    wait for the device.

    Args:
        features: (N, p, d), p points of dimension d each (the cells of a feature map, say); any float dtype, the cost
            is computed in float32 at least.
        pairs: (K, 2) integers in 0..N-1.
        eps: strength of the entropy, in units of the cost; a float or (K,).
        a, b: weights of the first and of the second point set, (K, p) or (p,); ``None``: uniform.
        metric: as in :func:`otface_cuda.sinkhorn_points`.
        max_iter, tol, check_every, grad: as in :func:`otface_cuda.sinkhorn`.
        chunk_bytes: working memory at most, forward and backward, beyond arguments, results and the gradient of
            ``features``: 4 p (4 d + 2 p) bytes a pair in float32 (8 d for the two distances; for the cosine on the CPU
            8 p^2), and 8 p max_iter more for ``grad="unrolled"``. At least one pair is done at a time. ``None``: 32 MiB
            on the CPU, 512 MiB on CUDA. The solver's own working memory comes on top, and for the cosine on the CPU the
            features in the order that the products read: with p and d rounded up to multiples of 16, 8 N p d bytes in
            float32, and 4 N p d more in the backward, for the gradient.

    Returns:
        :class:`otface_cuda.SinkhornOutput` over the K pairs; ``plan`` is None. Gradients reach ``features``, a and b,
        summed in a fixed order.

    Raises:
        TypeError, ValueError: as :func:`otface_cuda.sinkhorn`; an index out of range where indices are not looked at
            (on CUDA without ``OTFACE_CHECK=1``) gives NaN for its own pair.

    >>> maps = torch.nn.functional.one_hot(torch.tensor([[0, 1], [1, 0], [2, 3]]), 4).float()
    >>> out = sinkhorn_pairs(maps, torch.tensor([[0, 1], [0, 2]]), eps=0.05)
    >>> out.transport_cost.round(decimals=4)
    tensor([0., 1.])
    """
    where = "sinkhorn_pairs"
    _checks.check_floating(where, "features", features, "(N, p, d)", (3,))
    if features.shape[1] == 0:
        raise _checks.wrong_value(where, "features", "at least one point each", features)
    if not isinstance(pairs, Tensor) or pairs.is_floating_point() or pairs.is_complex() or pairs.dtype == torch.bool:
        raise _checks.wrong_type(where, "pairs", "an integer tensor of shape (K, 2)", pairs)
    _checks.check_dense(where, "pairs", pairs)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise _checks.wrong_value(where, "pairs", "an integer tensor of shape (K, 2)", pairs)
    _checks.check_device(where, "pairs", pairs, "features", features)
    _checks.check_has_kernels(where, "features", features)
    count, points, pairs = pairs.shape[0], features.shape[0], pairs.to(torch.int64)
    if count > 0 and points == 0:
        raise ValueError(f"{where}: `pairs` must be empty where `features` are, got {count} of them")
    if _checks.checks_data(pairs) and count > 0 and not ((pairs >= 0) & (pairs < points)).all():
        k, side = (int(index) for index in ((pairs < 0) | (pairs >= points)).nonzero()[0])
        raise ValueError(f"{where}: `pairs` must be between 0 and {points - 1}, got {int(pairs[k, side])} in pair {k}")
    _checks.check_choice(where, "metric", metric, METRICS)
    _checks.check_choice(where, "grad", grad, _checks.GRADIENT_MODES)
    max_iter = _checks.check_int(where, "max_iter", max_iter, 1)
    check_every = _checks.check_int(where, "check_every", check_every, 1)
    if chunk_bytes is None:
        chunk_bytes = DEFAULT_CHUNK_BYTES[features.device.type]
    chunk_bytes = _checks.check_int(where, "chunk_bytes", chunk_bytes, 1)
    eps = _checks.per_problem(where, "eps", eps, count, "features", features, positive=True)
    tols = _checks.per_problem(where, "tol", tol, count, "features", features, positive=False)
    a, b, mass_tolerance = _weights(where, a, b, count, features)
    arguments = (features, pairs, eps, a, b, tols, metric, max_iter, check_every, grad, chunk_bytes, mass_tolerance)
    if autograd.needs_graph(features, a, b):
        outputs = _SinkhornPairs.apply(*arguments)
    else:
        outputs = torch.ops.otface.sinkhorn_pairs_forward(*arguments)[:7]
    value, transport_cost, f, g, error, n_iter, converged = outputs
    _convergence.warn_of_tol(where, tol, max_iter, error, converged)
    return SinkhornOutput(value, transport_cost, f, g, None, error, n_iter, converged)


def _weights(
    where: str, a: Tensor | None, b: Tensor | None, count: int, features: Tensor
) -> tuple[Tensor | None, Tensor | None, float]:
    """a and b as (K, p), or (1, p) for all pairs alike, in the dtype of the arithmetic, both or neither.

    And how far their masses may be apart.
    """
    points = features.shape[1]
    given: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, x in (("a", a), ("b", b)):
        if x is not None:
            _checks.weights(where, name, x, count, points, True, "features", features, takes_lengths=False)
            given[name] = (x if x.dim() == 2 else x[None]), None
    if not given:
        return None, None, math.inf
    tolerance = _checks.mass_tolerance(*(x for x, _ in given.values()))
    _checks.check_weights_data(where, given, tolerance)
    real = autograd.real_dtype(features)
    full = {name: x.to(real) for name, (x, _) in given.items()}
    for name, other in (("a", "b"), ("b", "a")):
        if name not in full:
            full[name] = (full[other].detach().sum(1, keepdim=True) / points).expand(-1, points)
    return full["a"], full["b"], tolerance


class _SinkhornPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, pairs, eps, a, b, tol, *settings: Any) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        out = torch.ops.otface.sinkhorn_pairs_forward(features, pairs, eps, a, b, tol, *settings)
        *results, potentials = out
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[4:])
        ctx.save_for_backward(features, pairs, eps, a, b, tol, potentials, results[5])
        return tuple(results)

    @staticmethod
    def backward(ctx, value, transport_cost, f, g, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        features, pairs, eps, a, b, tol, potentials, n_iter = ctx.saved_tensors
        incoming = autograd.OutputGradients(value, transport_cost, f, g, None)
        autograd.check_differentiable("sinkhorn_pairs", ctx.settings[3], incoming)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        with torch.no_grad():
            out = torch.ops.otface.sinkhorn_pairs_backward(
                features, pairs, eps, a, b, tol, *ctx.settings, potentials, n_iter, *incoming[:4], *wanted
            )
        grads = tuple(x if want else None for x, want in zip(out, wanted, strict=True))
        grad_features, grad_a, grad_b = autograd.once_differentiable(
            "sinkhorn_pairs", grads, (features, a, b, *incoming)
        )
        return grad_features, None, None, grad_a, grad_b, None, *(None for _ in ctx.settings)


class Distinct(NamedTuple):
    """The different ones among the listed pairs, and which of them each listed pair is."""

    first: Tensor  # (U,) index into the features, within range
    second: Tensor  # (U,)
    valid: Tensor  # (U,) False where an index was out of range
    listed: Tensor | None  # (U,) the first place in the list where the pair stands; None: U = K, each in its place
    which: Tensor | None  # (K,) into the U

    def places(self, rows: slice) -> slice | Tensor:
        """Where these of the different pairs stand in the list."""
        return rows if self.listed is None else self.listed[rows]


def _distinct(pairs: Tensor, eps: Tensor, tol: Tensor, points: int, own_weights: bool) -> Distinct:
    listed = which = None
    if not own_weights and pairs.device.type == "cpu":  # elsewhere torch.unique would wait for the device
        # Two entries of the list are one problem if eps and tol are the same too.
        keys = torch.cat([pairs.double(), eps[:, None], tol[:, None]], dim=1)
        distinct, which = torch.unique(keys, dim=0, return_inverse=True)
        places = torch.arange(pairs.shape[0], device=pairs.device)
        listed = torch.full((distinct.shape[0],), pairs.shape[0], device=pairs.device)
        listed.scatter_reduce_(0, which, places, "amin")
        pairs = pairs[listed]
    first, second = pairs.unbind(1)
    valid = (first >= 0) & (first < points) & (second >= 0) & (second < points)
    # One that is not valid becomes a pair of a set with itself, if possible one that it names: then a NaN in that set
    # gets into the gradient of no other one.
    named = torch.where((first >= 0) & (first < points), first, second.clamp(0, max(0, points - 1)))
    return Distinct(torch.where(valid, first, named), torch.where(valid, second, named), valid, listed, which)


class _Chunk(NamedTuple):
    rows: slice  # of the distinct pairs
    costs: PairCosts
    cost: Tensor  # (k, p, p)
    problems: autograd.Problems


class PairSettings(NamedTuple):
    metric: str
    max_iter: int
    check_every: int
    grad: str
    chunk_bytes: int
    mass_tolerance: float = math.inf  # there may be no weights

    def for_solver(self) -> autograd.Settings:
        return autograd.Settings(
            "sinkhorn_pairs", self.max_iter, self.check_every, self.grad, False, self.mass_tolerance
        )


class KeptCosts(NamedTuple):
    """The costs of all listed pairs, kept by the forward for the pairs that the backward wants."""

    costs: Tensor  # (L, p, p)
    places: Tensor | None  # (U,) of the different pairs; None: U = L


def _chunks(
    sets: PointSets,
    points: Tensor,
    distinct: Distinct,
    eps: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    s: PairSettings,
    write: Tensor | None = None,
    read: KeptCosts | None = None,
) -> Iterator[_Chunk]:
    """`write`: where the costs (U, p, p) go; `read`: where they are already."""
    count = distinct.first.shape[0]
    # An index out of range is solved as some other pair with eps NaN: its results are NaN, nothing is out of bounds.
    eps = torch.where(distinct.valid, eps[distinct.places(slice(count))], torch.nan)
    _, p, d = points.shape
    copies = 0 if isinstance(sets, PackedSets) else COPIES_OF_POINTS[s.metric]
    history = 2 * p * s.max_iter if s.grad == "unrolled" else 0
    per_pair = (p * (copies * d + 2 * p) + history) * autograd.real_dtype(points).itemsize
    size = max(1, s.chunk_bytes // per_pair)
    for begin in range(0, count, size):
        rows = slice(begin, min(begin + size, count))
        costs = sets.pairs(distinct.first[rows], distinct.second[rows])
        if read is None:
            cost = costs.cost(None if write is None else write[rows])
        else:
            cost = read.costs[rows if read.places is None else read.places[rows]]
        # Where a weight is each pair's own, no two pairs are one problem.
        weights_a, weights_b = (
            None if w is None else w.expand(len(cost), -1) if w.shape[0] == 1 else w[rows] for w in (a, b)
        )
        yield _Chunk(rows, costs, cost, autograd.Problems(cost, eps[rows], weights_a, weights_b, None, None))


def solve_pairs(
    out: tuple[Tensor, ...],
    points: Tensor,
    distinct: Distinct,
    eps: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    tol: Tensor,
    s: PairSettings,
    keep: Tensor | None = None,
) -> None:
    """Solves the different pairs, and writes the results to their first places in the list, and costs into `keep`."""
    sets = point_sets(points, s.metric)
    for chunk in _chunks(sets, points, distinct, eps, a, b, s, write=keep):
        places = distinct.places(chunk.rows)
        solution = autograd.solve(chunk.problems, tol[places], None, s.for_solver(), False)
        for result, part in zip(out, (*solution[:4], *solution[5:9]), strict=True):
            result[places] = part


def differentiate_pairs(
    want_points: bool,
    grad_weights: Sequence[Tensor],
    points: Tensor,
    distinct: Distinct,
    eps: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    tol: Tensor,
    s: PairSettings,
    potentials: Tensor,
    n_iter: Tensor,
    incoming: autograd.OutputGradients,
    kept: KeptCosts | None = None,
) -> Tensor:
    """The gradient of the points from what comes in for the different pairs, empty if not wanted; those of the weights
    are written into `grad_weights`, of which the ones without an element are not wanted.
    """
    if len(distinct.first) == 0:
        return torch.zeros_like(points) if want_points else points.new_empty(0)
    want_a, want_b = (x.numel() > 0 for x in grad_weights)
    wanted = (want_points, want_a, want_b)
    sets = point_sets(points, s.metric, want_costs=kept is None)
    on_cpu = points.device.type == "cpu"
    for chunk in _chunks(sets, points, distinct, eps, a, b, s, read=kept):
        places = distinct.places(chunk.rows)
        if s.grad == "unrolled":  # its history is not kept: solve once more
            solution = autograd.solve(chunk.problems, tol[places], None, s.for_solver(), True)
        else:
            solution = autograd.solution_for_backward(potentials[places], n_iter[places])
        parts = autograd.OutputGradients(*(None if x is None else x[chunk.rows] for x in incoming))
        grads = autograd.gradients(chunk.problems, solution, s.for_solver(), parts, wanted)
        if grads[0] is not None:
            valid = distinct.valid[chunk.rows]
            if not (on_cpu and valid.all()):
                grads[0].masked_fill_(~valid[:, None, None], 0.0)
            chunk.costs.add_gradient(grads[0], chunk.cost)
        for out, part in zip(grad_weights, grads[1:], strict=True):
            if part is not None:
                out[places] = part
    return sets.gradient() if want_points else points.new_empty(0)


def empty_results(
    features: Tensor, pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, points, new, real = pairs.shape[0], features.shape[1], features.new_empty, autograd.real_dtype(features)
    return (
        new(count, dtype=real),
        new(count, dtype=real),
        new((count, points), dtype=real),
        new((count, points), dtype=real),
        new(count, dtype=real),
        new(count, dtype=torch.int64),
        new(count, dtype=torch.bool),
        new((count, 2 * points), dtype=torch.float64),
    )


def _fake_forward(features, pairs, *args):  # type: ignore[no-untyped-def]
    return empty_results(features, pairs)


def _fake_backward(features, pairs, eps, a, b, *args):  # type: ignore[no-untyped-def]
    want_features, want_a, want_b = args[-3:]
    real = autograd.real_dtype(features)
    return (
        torch.empty_like(features) if want_features else features.new_empty(0),
        torch.empty_like(a) if want_a else features.new_empty(0, dtype=real),
        torch.empty_like(b) if want_b else features.new_empty(0, dtype=real),
    )


@operator("sinkhorn_pairs_forward", _fake_forward)
def _forward(
    features: Tensor,
    pairs: Tensor,
    eps: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    tol: Tensor,
    metric: str,
    max_iter: int,
    check_every: int,
    grad: str,
    chunk_bytes: int,
    mass_tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = empty_results(features, pairs)
    if pairs.shape[0] == 0:
        return out
    distinct = _distinct(pairs, eps, tol, features.shape[0], _one_per_pair(a, b))
    settings = PairSettings(metric, max_iter, check_every, grad, chunk_bytes, mass_tolerance)
    solve_pairs(out, features, distinct, eps, a, b, tol, settings)
    if distinct.listed is not None and distinct.listed.shape[0] < pairs.shape[0]:
        for result in out:  # what is listed again
            result.copy_(result[distinct.listed[distinct.which]])
    return out


@operator("sinkhorn_pairs_backward", _fake_backward)
def _backward(
    features: Tensor,
    pairs: Tensor,
    eps: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    tol: Tensor,
    metric: str,
    max_iter: int,
    check_every: int,
    grad: str,
    chunk_bytes: int,
    mass_tolerance: float,
    potentials: Tensor,
    n_iter: Tensor,
    grad_value: Tensor | None,
    grad_transport_cost: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    want_features: bool,
    want_a: bool,
    want_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count, points = pairs.shape[0], features.shape[1]
    real = autograd.real_dtype(features)
    grad_weights = [
        w.new_zeros(count, points) if w is not None and want else features.new_empty(0, dtype=real)
        for w, want in ((a, want_a), (b, want_b))
    ]
    if count == 0:
        grad_features = torch.zeros_like(features) if want_features else features.new_empty(0)
    else:
        distinct = _distinct(pairs, eps, tol, features.shape[0], _one_per_pair(a, b))
        incoming = autograd.OutputGradients(grad_value, grad_transport_cost, grad_f, grad_g, None)
        if distinct.which is not None:
            size = len(distinct.first)
            incoming = autograd.OutputGradients(
                *(
                    None if x is None else x.new_zeros(size, *x.shape[1:]).index_add_(0, distinct.which, x)
                    for x in incoming
                )
            )
        settings = PairSettings(metric, max_iter, check_every, grad, chunk_bytes, mass_tolerance)
        grad_features = differentiate_pairs(
            want_features, grad_weights, features, distinct, eps, a, b, tol, settings, potentials, n_iter, incoming
        )
    # A weight that all pairs share gets the sum over the list; one of a pair its own (duplicates were added up above).
    grad_a, grad_b = (
        x.sum(0, keepdim=True) if w is not None and x.numel() > 0 and w.shape[0] == 1 != count else x
        for x, w in zip(grad_weights, (a, b), strict=True)
    )
    return grad_features, grad_a, grad_b


def _one_per_pair(a: Tensor | None, b: Tensor | None) -> bool:
    return any(w is not None and w.shape[0] != 1 for w in (a, b))
