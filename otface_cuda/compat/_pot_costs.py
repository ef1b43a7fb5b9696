"""The costs and the linear loss of `ot.batch`, and checks that all of POT's functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..costs import pairwise_cost

METRICS = ("sqeuclidean", "euclidean", "minkowski", "kl")
# Differences of coordinates between which torch's powers of many numbers at once are quicker than those of `cdist`, for
# p above 1 but 2; beyond, they would take too much memory.
FEW, MANY = 2**10, 2**22


def dist_batch(
    X1: Tensor, X2: Tensor | None = None, metric: str = "sqeuclidean", p: float = 2, nx: None = None
) -> Tensor:
    r"""`ot.batch.dist_batch` of POT: the costs between the samples of each problem.

    Args:
        X1: (B, n1, d) samples, any float dtype, computed in float32 at least; integers count as torch's default dtype.
        X2: (B, n2, d); ``None``: those of X1.
        metric: ``"sqeuclidean"``, ``"euclidean"``, ``"minkowski"``: \|x - y\|_p, or ``"kl"``: sum_d y log(y / x), with
            1e-10 added to what a logarithm is taken of. The first two are those of
            :func:`otface_cuda.sinkhorn_points`, never negative, and 0 for equal samples (POT's can be negative by
            rounding, and their root NaN). All distances have gradient 0 where samples coincide (POT's is NaN).
        p: of ``"minkowski"``, positive.
        nx: only None; the backend is torch.

    Returns:
        (B, n1, n2).

    >>> dist_batch(torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]), metric="euclidean")
    tensor([[[0., 5.],
             [5., 0.]]])
    """
    where = "dist_batch"
    _check_nx(where, nx)
    x, y, metric = checked_points(where, ("X1", "X2"), (X1, X1 if X2 is None else X2), metric)
    return cost_of(where, x, y, metric, p)


def loss_linear_batch(M: Tensor, T: Tensor, nx: None = None) -> Tensor:
    """`ot.batch.loss_linear_batch` of POT: <M, T> of each problem, (B,); +inf times no plan is 0 (NaN in POT).

    Args:
        M: (B, ns, nt) costs, of any float or integer dtype.
        T: (B, ns, nt) plans; sizes of 1 in one of the two are expanded to those of the other.
        nx: only None; the backend is torch.

    >>> loss_linear_batch(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.5, 0.5]]]))
    tensor([1.])
    """
    where = "loss_linear_batch"
    _check_nx(where, nx)
    M, T = floating(where, "M", M, "(B, ns, nt)", 3), floating(where, "T", T, "(B, ns, nt)", 3)
    _check_goes_with(where, T, M, "that of `M`")
    return linear(M, T)


def loss_linear_samples_batch(X: Tensor, Y: Tensor, T: Tensor, metric: str = "sqeuclidean") -> Tensor:
    """`ot.batch.loss_linear_samples_batch` of POT: :func:`loss_linear_batch` of :func:`dist_batch`.

    >>> loss_linear_samples_batch(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, 1))
    tensor([2.])
    """
    where = "loss_linear_samples_batch"
    x, y, metric = checked_points(where, ("X", "Y"), (X, Y), metric)
    T = floating(where, "T", T, "(B, ns, nt)", 3)
    M = cost_of(where, x, y, metric, 2)
    _check_goes_with(where, T, M, "the costs'")
    return linear(M, T)


def cost_of(where: str, x: Tensor, y: Tensor, metric: str, p: float) -> Tensor:
    """(B, n1, n2) between points that have been checked."""
    if metric in ("sqeuclidean", "euclidean"):
        if y is x and torch.compiler.is_compiling():  # which cannot trace one tensor as two arguments
            y = y.view_as(y)
        return pairwise_cost(x, y, metric)
    if metric == "minkowski":
        p = _checks.check_finite(where, "p", p)
        if p <= 0:
            raise _checks.wrong_value(where, "p", "positive", p)
    x, y = (v if v.dtype == torch.float64 else v.float() for v in (x, y))
    if not torch.is_autocast_enabled(x.device.type):
        return _written_out(x, y, metric, p)
    with torch.autocast(x.device.type, enabled=False):
        return _written_out(x, y, metric, p)


def _written_out(x: Tensor, y: Tensor, metric: str, p: float) -> Tensor:
    if metric == "kl":
        own = (y * (y + 1e-10).log()).sum(2)
        return torch.baddbmm(own.unsqueeze(1), (x + 1e-10).log(), y.mT, alpha=-1)
    if p <= 1 or p == 2 or not FEW < x.shape[1] * y.numel() < MANY:
        return torch.cdist(x, y, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    powers = (x.unsqueeze(2) - y.unsqueeze(1)).abs().pow(p).sum(3)
    if _can_look(powers) and powers.detach().min().item() > 0:
        return powers.pow(1 / p)
    is_zero = powers == 0  # where the root has no slope
    return powers.masked_fill(is_zero, 1.0).pow(1 / p).masked_fill(is_zero, 0.0)


def linear(M: Tensor, T: Tensor) -> Tensor:
    """<M, T> of each problem. Where there is no plan M may be infinite."""
    if _can_look(M):
        total = (M * T).sum((1, 2))
        if torch.equal(total, total):  # no NaN, as nearly always
            return total
    return (M.masked_fill(M.isposinf() & (T == 0), 0.0) * T).sum((1, 2))


def _check_goes_with(where: str, T: Tensor, M: Tensor, whose: str) -> None:
    """Of shapes that are expanded to each other."""
    if M.shape != T.shape and any(m != t and 1 not in (m, t) for m, t in zip(M.shape, T.shape, strict=True)):
        raise _checks.wrong_value(where, "T", f"of a shape that goes with {whose}, {tuple(M.shape)}", T)


def _can_look(x: Tensor) -> bool:
    """Whether numbers can be looked at without waiting for a device or breaking a graph."""
    return x.is_cpu and not torch.compiler.is_compiling()


def checked_points(
    where: str, names: tuple[str, str], points: tuple[Any, Any], metric: Any, *, takes_lengths: bool = False
) -> tuple[Tensor, Tensor, str]:
    """Two sets of points that go together, as floats, and the metric in small letters."""
    name_x, name_y = names
    x, y = (
        floating(where, name, given, "(B, n, d)", 3, takes_lengths=takes_lengths)
        for name, given in zip(names, points, strict=True)
    )
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise _checks.wrong_value(where, name_y, f"of shape ({x.shape[0]}, n, {x.shape[2]}) to go with `{name_x}`", y)
    if x.dtype != y.dtype:
        raise _checks.wrong_type(where, name_y, f"of the dtype of `{name_x}` ({x.dtype})", y)
    _checks.check_device(where, name_y, y, name_x, x)
    name = metric.lower() if isinstance(metric, str) else metric
    _checks.check_choice(where, "metric", name, METRICS)
    return x, y, str(name)


def floating(where: str, name: str, x: Any, shape: str, rank: int, *, takes_lengths: bool = False) -> Tensor:
    """A tensor of this rank; integers, which POT takes too, in torch's default dtype."""
    if not isinstance(x, Tensor):
        raise _checks.wrong_type(where, name, "a torch tensor (torch.from_numpy makes one of an array)", x)
    if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        x = x.to(torch.get_default_dtype())
    _checks.check_floating(where, name, x, shape, (rank,), takes_lengths=takes_lengths)
    numbers: Tensor = x
    return numbers


def check_tol(where: str, name: str, x: Any) -> float:
    tol = _checks.check_finite(where, name, x)
    if tol < 0:
        raise _checks.wrong_value(where, name, "at least 0", x)
    return tol


def _check_nx(where: str, nx: Any) -> None:
    if nx is not None:
        raise _checks.wrong_type(where, "nx", "None, because the backend is torch", nx)
