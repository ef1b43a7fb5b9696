"""`ot.batch` of POT: batches of entropic problems, from cost matrices or from samples."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._documented import documented_fields
from ..autograd import needs_graph, real_dtype
from ..costs import pairwise_cost
from ..functional import _check_and_solve, _without_padding
from ._pot_schedule import PERIOD, run_as_pot

METHODS = ("auto", "proximal", "log_sinkhorn", "sinkhorn")
REG_TYPES = ("kl", "entropy")
GRADS = ("detach", "autodiff", "last_step", "envelope")
METRICS = ("sqeuclidean", "euclidean", "minkowski", "kl")


@documented_fields
class OTResult(NamedTuple):
    """What :func:`solve_batch` returns."""

    value: Tensor
    """(B,) <M, T> + reg R(T)."""
    value_linear: Tensor
    """(B,) <M, T>."""
    potentials: tuple[Tensor, Tensor]
    """u (B, ns) and v (B, nt) with T = exp(u + v - M / reg); for the method "sinkhorn" exp(u) and exp(v)."""
    plan: Tensor
    """(B, ns, nt) T."""
    log: dict[str, int]
    """``n_iter``: the number of iterations less one, which is how POT counts."""

    @property
    def n_iter(self) -> int:
        """The number of iterations."""
        return self.log["n_iter"] + 1

    @property
    def potential_a(self) -> Tensor:
        """(B, ns) the first of `potentials`."""
        return self.potentials[0]

    @property
    def potential_b(self) -> Tensor:
        """(B, nt) the second."""
        return self.potentials[1]

    @property
    def marginal_a(self) -> Tensor:
        """(B, ns) the row sums of the plan (POT 0.9.7 gives the column sums, by the axes of a single plan)."""
        return self.plan.sum(2)

    @property
    def marginal_b(self) -> Tensor:
        """(B, nt) the column sums of the plan (POT 0.9.7 sums over the batch)."""
        return self.plan.sum(1)

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.marginal_a, self.marginal_b

    @property
    def status(self) -> None:
        """Always None, as in POT."""
        return


def solve_batch(
    M: Tensor,
    reg: float | Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
    *,
    row_lengths: Tensor | None = None,
    col_lengths: Tensor | None = None,
) -> OTResult:
    r"""`ot.batch.solve_batch` of POT 0.9.7, for torch tensors: the same iterates, by :func:`otface_cuda.sinkhorn`.

    For each problem the minimum of <M, T> + reg R(T) over T with row sums a and column sums b. One iteration updates
    rows, then columns, from v = 0. After iteration 1, 11, 21, ... the largest L2 norm of T 1 - a of the batch is
    compared with `tol`, and all problems stop together.

    Args:
        M: (B, ns, nt) costs, float64, float32, bfloat16 or float16 (computed in float32). ``+inf`` forbids a pair.
        reg: strength of the entropy, in units of M; a float or (B,).
        a: (B, ns) or (ns,) weights of the rows; ``None``: uniform, of sum 1 or of the sum of `b`.
        b: (B, nt) or (nt,) weights of the columns, of the same sums.
        max_iter: iterations at most.
        tol: see above. 0 does exactly `max_iter`, and then nothing waits for a CUDA device; else each look does.
        method: ``"log_sinkhorn"``, ``"auto"`` or ``"sinkhorn"``. All run in the log domain; with ``"sinkhorn"`` the
            potentials are exp(u) and exp(v). POT's proximal method is no Sinkhorn iteration and is not here.
        inner_iter, inner_reg: of the proximal method; not used.
        reg_type: R is ``"entropy"``: sum T log T, or ``"kl"`` (``"KL"`` too): sum T log(T / (a b)). T is the same.
        grad: how gradients are computed.

            - ``"envelope"``: of `value`: T in M, and in a and b the derivative at convergence, centred by its mean
              (POT has none). `value_linear` has T in M. `plan` and `potentials` are constants.
            - ``"autodiff"``: the derivative of the iterations, for every output. The start is held constant, also
              where b is given, whereas POT's v = 0 makes g = -reg log b: the gradient of b differs by what is left of
              the start after the iterations.
            - ``"last_step"``: one more iteration, and its derivative; in a and b, too. (POT takes M for a constant
              in T = exp(u + v - M / reg), which is not the derivative, and differentiates all iterations in a and b.)
            - ``"detach"``: none.
        row_lengths, col_lengths: (B,) integers; problem k has only so many rows, and columns.

    Returns:
        :class:`OTResult`, float64 for a float64 M, else float32. u and v are those with reg <a, u - log a> =
        reg <b, v - log b>; POT's differ by a constant, u + c and v - c, which depends on every iteration.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.

    >>> M = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], requires_grad=True)
    >>> res = solve_batch(M, reg=0.5)
    >>> res.plan
    tensor([[[0.4404, 0.0596],
             [0.0596, 0.4404]]])
    >>> res.value.sum().backward()
    >>> torch.equal(M.grad, res.plan)
    True
    """
    where = "solve_batch"
    check_tensor(where, "M", M)
    _checks.check_floating(where, "M", M, "(B, ns, nt)", (3,), takes_lengths=True)
    _checks.check_has_kernels(where, "M", M)
    for name, weights in (("a", a), ("b", b)):
        if weights is not None:
            check_tensor(where, name, weights)
    _checks.check_choice(where, "method", method, METHODS)
    reg_type = reg_type.lower() if isinstance(reg_type, str) else reg_type
    _checks.check_choice(where, "reg_type", reg_type, REG_TYPES)
    _checks.check_choice(where, "grad", grad, GRADS)
    if method == "proximal" or (method == "auto" and (reg is None or (not isinstance(reg, Tensor) and reg == 0))):
        raise ValueError(
            f"{where}: `reg` must be positive and `method` not 'proximal': the proximal point method, which POT also "
            "takes without a reg, is not a Sinkhorn iteration; use ot.batch.solve_batch for it"
        )
    if reg is None:
        raise _checks.wrong_value(where, "reg", "positive", reg)
    eps = _checks.per_problem(where, "reg", reg, len(M), "M", M, positive=True)
    max_iter = _checks.check_int(where, "max_iter", max_iter, 1)
    tol = check_tol(where, "tol", tol)

    solve = partial(
        _check_and_solve,
        where,
        "M",
        M,
        M,
        eps,
        a,
        b,
        tol=0.0,
        check_every=PERIOD,
        row_lengths=row_lengths,
        col_lengths=col_lengths,
        grad="envelope",
        return_plan=True,
    )
    real = real_dtype(M)
    full_a, full_b = _full_weights(where, M, a, b, row_lengths, col_lengths)
    reg_column = eps[:, None].to(real)
    # v = log b + g / reg. Uniform weights make v = 0 a constant g, and a constant changes nothing.
    start = None if b is None else (None, -reg_column * torch.where(full_b > 0, full_b, 1.0).detach().log())
    run = run_as_pot(solve, start, full_a.detach(), max_iter=max_iter, tol=tol, norm=_largest_norm)
    unrolled = grad in ("autodiff", "last_step") and needs_graph(M, a, b)
    if grad == "last_step":
        with torch.no_grad():
            before = run.out or solve(init=start, max_iter=run.n_iter)
        out = solve(init=(None, before.g), max_iter=1, grad="unrolled" if unrolled else "envelope")
    elif unrolled:
        out = solve(init=start, max_iter=run.n_iter, grad="unrolled")
    else:
        with torch.no_grad():
            out = run.out or solve(init=start, max_iter=run.n_iter)
    assert out.plan is not None
    u, v = full_a.log() + out.f / reg_column, full_b.log() + out.g / reg_column
    if not unrolled:
        u, v = u.detach(), v.detach()
    reg_row = eps.to(real)
    if grad == "envelope":
        value_linear = _linear(M.to(real), out.plan)
        value = value_linear + reg_row * _relative_entropy(out.plan, full_a.detach(), full_b.detach(), reg_type)
        for weights, log_scaling, potential in ((full_a, u, out.f), (full_b, v, out.g)):
            if needs_graph(weights):
                slope = reg_column * log_scaling if reg_type == "entropy" else potential
                value = value + _with_slope(weights, slope, log_scaling.isfinite())
    else:
        with torch.set_grad_enabled(torch.is_grad_enabled() and grad != "detach"):
            value_linear = out.transport_cost
            value = value_linear + reg_row * _relative_entropy(out.plan, full_a, full_b, reg_type)
    potentials = (u.exp(), v.exp()) if method == "sinkhorn" else (u, v)
    return OTResult(value, value_linear, potentials, out.plan, {"n_iter": run.n_iter - 1})


def solve_sample_batch(
    X_a: Tensor,
    X_b: Tensor,
    reg: float | Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    metric: str = "sqeuclidean",
    p: float = 2,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
    *,
    row_lengths: Tensor | None = None,
    col_lengths: Tensor | None = None,
) -> OTResult:
    """`ot.batch.solve_sample_batch` of POT: :func:`solve_batch` of :func:`dist_batch`.

    Args:
        X_a: (B, ns, d) samples; what is past `row_lengths` may hold anything.
        X_b: (B, nt, d).
        metric, p: as in :func:`dist_batch`.
        reg, a, b, max_iter, tol, method, inner_iter, inner_reg, reg_type, grad, row_lengths, col_lengths: as in
            :func:`solve_batch`.

    >>> x = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    >>> solve_sample_batch(x, x.flip(1), reg=0.1).plan
    tensor([[[2.2699e-05, 4.9998e-01],
             [4.9998e-01, 2.2699e-05]]])
    """
    _check_points("solve_sample_batch", {"X_a": X_a, "X_b": X_b}, metric, takes_lengths=True)
    M = dist_batch(_without_padding(X_a, row_lengths), _without_padding(X_b, col_lengths), metric=metric, p=p)
    return solve_batch(
        M,
        reg,
        a,
        b,
        max_iter,
        tol,
        method,
        inner_iter,
        inner_reg,
        reg_type,
        grad,
        row_lengths=row_lengths,
        col_lengths=col_lengths,
    )


def dist_batch(
    X1: Tensor, X2: Tensor | None = None, metric: str = "sqeuclidean", p: float = 2, nx: None = None
) -> Tensor:
    r"""`ot.batch.dist_batch` of POT: the costs between the samples of each problem.

    Args:
        X1: (B, n1, d) samples, any float dtype; computed in float32 at least.
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
    X2 = X1 if X2 is None else X2
    metric = _check_points(where, {"X1": X1, "X2": X2}, metric)
    if metric in ("sqeuclidean", "euclidean"):
        return pairwise_cost(X1, X2, metric)
    X1, X2 = (x if x.dtype == torch.float64 else x.float() for x in (X1, X2))
    with torch.autocast(X1.device.type, enabled=False):
        if metric == "kl":
            own = (X2 * (X2 + 1e-10).log()).sum(2)
            return own[:, None, :] - (X1 + 1e-10).log() @ X2.mT
        p = _checks.check_finite(where, "p", p)
        if p <= 0:
            raise _checks.wrong_value(where, "p", "positive", p)
        return torch.cdist(X1, X2, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def loss_linear_batch(M: Tensor, T: Tensor, nx: None = None) -> Tensor:
    """`ot.batch.loss_linear_batch` of POT: <M, T> of each problem, (B,); +inf times no plan is 0 (NaN in POT).

    >>> loss_linear_batch(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.5, 0.5]]]))
    tensor([1.])
    """
    where = "loss_linear_batch"
    _check_nx(where, nx)
    for name, x in (("M", M), ("T", T)):
        check_tensor(where, name, x)
        _checks.check_floating(where, name, x, "(B, ns, nt)", (3,))
    if M.shape != T.shape:
        raise _checks.wrong_value(where, "T", f"of the shape of `M`, {tuple(M.shape)}", T)
    return (M.masked_fill(M.isposinf() & (T == 0), 0.0) * T).sum((1, 2))


def loss_linear_samples_batch(X: Tensor, Y: Tensor, T: Tensor, metric: str = "sqeuclidean") -> Tensor:
    """`ot.batch.loss_linear_samples_batch` of POT: :func:`loss_linear_batch` of :func:`dist_batch`.

    >>> loss_linear_samples_batch(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, 1))
    tensor([2.])
    """
    _check_points("loss_linear_samples_batch", {"X": X, "Y": Y}, metric)
    return loss_linear_batch(dist_batch(X, Y, metric=metric), T)


def check_tensor(where: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise _checks.wrong_type(where, name, "a torch tensor (torch.from_numpy makes one of an array)", x)


def check_tol(where: str, name: str, x: Any) -> float:
    tol = _checks.check_finite(where, name, x)
    if tol < 0:
        raise _checks.wrong_value(where, name, "at least 0", x)
    return tol


def _check_nx(where: str, nx: Any) -> None:
    if nx is not None:
        raise _checks.wrong_type(where, "nx", "None, because the backend is torch", nx)


def _check_points(where: str, points: dict[str, Any], metric: Any, *, takes_lengths: bool = False) -> str:
    """The metric in small letters."""
    for name, x in points.items():
        check_tensor(where, name, x)
        _checks.check_floating(where, name, x, "(B, n, d)", (3,), takes_lengths=takes_lengths)
    (name_x, x), (name_y, y) = points.items()
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise _checks.wrong_value(where, name_y, f"of shape ({x.shape[0]}, n, {x.shape[2]}) to go with `{name_x}`", y)
    if x.dtype != y.dtype:
        raise _checks.wrong_type(where, name_y, f"of the dtype of `{name_x}` ({x.dtype})", y)
    _checks.check_device(where, name_y, y, name_x, x)
    name = metric.lower() if isinstance(metric, str) else metric
    _checks.check_choice(where, "metric", name, METRICS)
    return str(name)


def _full_weights(
    where: str, M: Tensor, a: Tensor | None, b: Tensor | None, row_lengths: Tensor | None, col_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, ns) and (B, nt), in the dtype of the arithmetic, 0 past the lengths."""
    full = []
    for name, x, side, size, given in (
        ("a", a, "row_lengths", M.shape[1], row_lengths),
        ("b", b, "col_lengths", M.shape[2], col_lengths),
    ):
        valid = M.new_ones(len(M), size, dtype=real_dtype(M))
        lengths = _checks.lengths(where, side, given, len(M), size, "M", M)
        if lengths is not None:
            valid = (torch.arange(size, device=M.device) < lengths[:, None]).to(valid)
        if x is None:
            full.append(valid / valid.sum(1, keepdim=True))
        else:
            weights = _checks.weights(where, name, x, len(M), size, True, "M", M)
            full.append(torch.where(valid > 0, weights.to(valid), 0.0))
    if a is None and b is not None:
        full[0] = full[0] * full[1].detach().sum(1, keepdim=True)
    if b is None and a is not None:
        full[1] = full[1] * full[0].detach().sum(1, keepdim=True)
    return full[0], full[1]


def _largest_norm(differences: Tensor) -> Tensor:
    """A problem without a solution, whose difference is NaN, has no say."""
    norms: Tensor = torch.linalg.vector_norm(differences, dim=1)
    return norms.nan_to_num(nan=0.0).max() if len(norms) > 0 else norms.new_zeros(())


def _linear(M: Tensor, T: Tensor) -> Tensor:
    """<M, T>. Where there is no plan M may be infinite, or padding and anything."""
    linear: Tensor = (torch.where(T == 0, 0.0, M) * T).sum((1, 2))
    return linear


def _relative_entropy(T: Tensor, a: Tensor, b: Tensor, reg_type: str) -> Tensor:
    if reg_type == "kl":
        product = a[:, :, None] * b[:, None, :]
        return (T * (T / torch.where(product == 0, 1.0, product) + 1e-16).log()).sum((1, 2))
    return (T * (T + 1e-16).log()).sum((1, 2))


def _with_slope(weights: Tensor, slope: Tensor, valid: Tensor) -> Tensor:
    """0, with a given gradient in the weights, centred: weights can be compared where their sums are equal only."""
    slope = torch.where(valid, slope, 0.0)
    slope = torch.where(valid, slope - slope.sum(1, keepdim=True) / valid.sum(1, keepdim=True), 0.0)
    return ((weights - weights.detach()) * slope).sum(1)
