"""The specification: what every kernel of this package computes, in plain torch and float64.

Nothing here is fast. One problem is solved at a time, cut to its own rows and columns, every sum of exponentials is a
log-sum-exp, and torch's autograd differentiates through the whole loop, which defines the gradient mode ``"unrolled"``.

For a cost C (n x m), weights a, b >= 0 of the same total mass W, and eps > 0, entropic optimal transport is

    OT_eps(a, b) = min_P  <P, C> + eps sum_ij P_ij log(P_ij / (a_i b_j))    subject to  P 1 = a,  P^T 1 = b         (1)

and its optimal plan and its dual are (Feydy, Sejourne, Vialard, Amari, Trouve, Peyre 2019, arXiv 1810.08278)

    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)                                                                   (2)
    OT_eps(a, b) = max_{f, g}  <a, f> + <b, g> - eps sum_ij (P_ij - a_i b_j)                                       (3)

Sinkhorn's algorithm (Cuturi 2013, arXiv 1306.0895) is the maximisation of (3) over f and g in turn. In the log domain
(Peyre and Cuturi 2019, arXiv 1803.00567, section 4.4) one iteration is

    f_i <- -eps log sum_j b_j exp((g_j - C_ij) / eps)                                                              (4)
    g_j <- -eps log sum_i a_i exp((f_i - C_ij) / eps)                                                              (5)

After (5) the columns of P sum to b exactly, so the last term of (3) is zero and the value is <a, f> + <b, g>. What is
left to converge is the sum of each row.

>>> import torch
>>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
>>> out = sinkhorn_reference(cost, eps=0.5, max_iter=10, return_plan=True)
>>> out.plan.sum(0)
tensor([0.5000, 0.5000], dtype=torch.float64)
>>> round(out.transport_cost.item(), 4)
0.1192
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._documented import documented_fields

__all__ = ["ReferenceOutput", "cost_matrix", "sinkhorn_iterates", "sinkhorn_reference"]


@documented_fields
class ReferenceOutput(NamedTuple):
    """The fields of ``otface_cuda.SinkhornOutput``, in float64."""

    value: Tensor
    """(B,) <a, f> + <b, g>."""
    transport_cost: Tensor
    """(B,) <P, C>."""
    f: Tensor
    """(B, n) potentials of the rows."""
    g: Tensor
    """(B, m) potentials of the columns."""
    plan: Tensor | None
    """(B, n, m) P."""
    error: Tensor
    """(B,) |P 1 - a|_1 / W."""
    n_iter: Tensor
    """(B,) int64."""
    converged: Tensor
    """(B,) bool: error <= tol, or where tol is 0, error <= 2^-50 sqrt(n + m)."""


def sinkhorn_reference(
    cost: Tensor,
    eps: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    max_iter: int = 100,
    tol: float | Tensor = 0.0,
    check_every: int = 10,
    row_lengths: Tensor | None = None,
    col_lengths: Tensor | None = None,
    init: tuple[Tensor | None, Tensor] | None = None,
    return_plan: bool = False,
) -> ReferenceOutput:
    """Solve each problem of a batch (B, n, m), or one problem (n, m), by itself; the arguments are ``sinkhorn``'s."""
    if cost.dim() == 2:
        lengths = [None if x is None else x.reshape(1) for x in (row_lengths, col_lengths)]
        batch = sinkhorn_reference(
            cost[None],
            eps,
            a,
            b,
            max_iter=max_iter,
            tol=tol,
            check_every=check_every,
            row_lengths=lengths[0],
            col_lengths=lengths[1],
            init=None if init is None else (None, init[1].reshape(1, -1)),
            return_plan=return_plan,
        )
        return ReferenceOutput(*(None if x is None else x[0] for x in batch))  # type: ignore[arg-type]

    batch_size, n, m = cost.shape
    all_eps = torch.as_tensor(eps, dtype=torch.float64).expand(batch_size)
    all_tol = torch.as_tensor(tol, dtype=torch.float64).expand(batch_size)
    solved = []
    for k in range(batch_size):
        rows = n if row_lengths is None else int(row_lengths[k])
        cols = m if col_lengths is None else int(col_lengths[k])
        weights_a, weights_b = _weights(
            None if a is None else a.expand(batch_size, n)[k, :rows],
            None if b is None else b.expand(batch_size, m)[k, :cols],
            rows,
            cols,
            cost.device,
        )
        out = _solve(
            cost[k, :rows, :cols].double(),
            float(all_eps[k]),
            weights_a,
            weights_b,
            max_iter=max_iter,
            tol=float(all_tol[k]),
            check_every=check_every,
            start=None if init is None else init[1][k, :cols].detach().double(),
        )
        assert out.plan is not None
        solved.append(
            out._replace(
                f=pad(out.f, (0, n - rows)),
                g=pad(out.g, (0, m - cols)),
                plan=pad(out.plan, (0, m - cols, 0, n - rows)),
            )
        )
    batch = ReferenceOutput(*map(torch.stack, zip(*solved, strict=True)))
    return batch if return_plan else batch._replace(plan=None)


def sinkhorn_iterates(
    cost: Tensor, eps: float, a: Tensor, b: Tensor, g: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The potentials (f, g) of one problem (n, m) after 1, 2, 3, ... iterations, as (4) and (5) leave them.

    They are not shifted. The loop starts from the given ``g``, or from zero.
    """
    g = torch.zeros_like(b) if g is None else g
    while True:
        f = _soft_min(cost - g[None, :], b[None, :], eps, dim=1)  # (4)
        g = _soft_min(cost - f[:, None], a[:, None], eps, dim=0)  # (5)
        yield f, g


def cost_matrix(x: Tensor, y: Tensor, metric: str = "cosine") -> Tensor:
    """The cost (B, n, m) between points (B, n, d) and (B, m, d), or (n, m) between (n, d) and (m, d).

    ``"cosine"`` is 1 - cos, where the cosine with a zero vector is 0. ``"sqeuclidean"`` is |x - y|^2. ``"euclidean"``
    is |x - y|, whose gradient is 0, not NaN, where two points coincide.
    """
    if metric == "cosine":
        return 1 - _unit(x) @ _unit(y).mT
    difference = x[..., :, None, :] - y[..., None, :, :]
    if metric == "sqeuclidean":
        return difference.square().sum(-1)
    if metric == "euclidean":
        return _norm(difference)
    raise ValueError(f"cost_matrix: `metric` must be 'cosine', 'sqeuclidean' or 'euclidean', got {metric!r}")


def _solve(
    cost: Tensor, eps: float, a: Tensor, b: Tensor, *, max_iter: int, tol: float, check_every: int, start: Tensor | None
) -> ReferenceOutput:
    """One problem without padding: cost (n, m), a (n,), b (m,), all in float64."""
    # A row can only send its mass along a finite cost to a column of positive weight, and a column likewise.
    row_has_partner = (cost.isfinite() & (b[None, :] > 0)).any(1)
    col_has_partner = (cost.isfinite() & (a[:, None] > 0)).any(0)
    spoilt = cost.isnan().any() or cost.isneginf().any()
    infeasible = (a[~row_has_partner] > 0).any() or (b[~col_has_partner] > 0).any()
    if spoilt or infeasible:
        return _not_a_number(cost)

    mass = a.sum()
    for n_iter, (f, g) in enumerate(sinkhorn_iterates(cost, eps, a, b, start), start=1):
        last = n_iter == max_iter
        if last or n_iter % check_every == 0:
            error = (_plan(cost, eps, a, b, f, g).sum(1) - a).abs().sum() / mass
            if last or 0 < tol >= error:  # tol = 0 asks for exactly max_iter iterations
                break

    # (2) and (3) stay the same when f grows by a constant and g shrinks by it. We return the pair with <a, f> = <b, g>.
    shift = ((b * g).sum() - (a * f).sum()) / (a.sum() + b.sum())
    f = torch.where(row_has_partner, f + shift, 0.0)
    g = torch.where(col_has_partner, g - shift, 0.0)
    plan = _plan(cost, eps, a, b, f, g)
    return ReferenceOutput(
        value=(a * f).sum() + (b * g).sum(),
        transport_cost=(plan * cost.masked_fill(cost.isposinf(), 0.0)).sum(),  # a forbidden pair costs nothing
        f=f,
        g=g,
        plan=plan,
        error=error,
        n_iter=torch.tensor(n_iter),
        converged=error.detach() <= (tol if tol > 0 else _rounding_level(*cost.shape)),
    )


def _rounding_level(rows: int, cols: int) -> float:
    """The error that rounding may leave at a fixed point."""
    return 4 * torch.finfo(torch.float64).eps * math.sqrt(rows + cols)


def _soft_min(cost: Tensor, weights: Tensor, eps: float, dim: int) -> Tensor:
    """-eps log sum w exp(-c / eps) along ``dim``, and 0 where no entry has a positive weight and a finite cost."""
    exponent = -cost / eps
    largest = exponent.masked_fill(weights == 0, -torch.inf).amax(dim, keepdim=True).detach()
    found = largest.isfinite()
    largest = torch.where(found, largest, 0.0)
    # No exponent of a positive weight is above 0; that of a zero weight may be, and 0 * inf is kept from becoming NaN.
    total = (weights * (exponent - largest).clamp(max=700.0).exp()).sum(dim, keepdim=True)
    return (-eps * (largest + torch.where(found, total, 1.0).log())).squeeze(dim)


def _plan(cost: Tensor, eps: float, a: Tensor, b: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """Equation (2); the bound on the exponent matters to entries of zero weight only, see ``_soft_min``."""
    exponent = (f[:, None] + g[None, :] - cost) / eps
    return a[:, None] * b[None, :] * exponent.clamp(max=700.0).exp()


def _weights(a: Tensor | None, b: Tensor | None, rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The weights in float64. One that is not given is uniform and has the mass of the other, or 1."""
    given = a if a is not None else b
    mass = torch.ones((), dtype=torch.float64, device=device) if given is None else given.detach().double().sum()
    return (
        (mass / rows).expand(rows) if a is None else a.double(),
        (mass / cols).expand(cols) if b is None else b.double(),
    )


def _not_a_number(cost: Tensor) -> ReferenceOutput:
    nan = torch.full_like(cost, torch.nan)
    return ReferenceOutput(
        value=nan[0, 0],
        transport_cost=nan[0, 0],
        f=nan[:, 0],
        g=nan[0, :],
        plan=nan,
        error=nan[0, 0],
        n_iter=torch.tensor(0),
        converged=torch.tensor(False),
    )


def _norm(x: Tensor) -> Tensor:
    """|x| over the last dimension, with gradient 0 at x = 0, where the derivative of the square root is infinite."""
    square = x.square().sum(-1)
    nonzero = square > 0
    return torch.where(nonzero, torch.where(nonzero, square, 1.0).sqrt(), 0.0)


def _unit(x: Tensor) -> Tensor:
    """The unit vector x / |x|, and 0 for x = 0."""
    norm = _norm(x)[..., None]
    return x / torch.where(norm > 0, norm, 1.0)
