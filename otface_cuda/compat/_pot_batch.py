"""`ot.batch` of POT: batches of entropic problems, from cost matrices or from samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._documented import documented_fields
from ..autograd import needs_graph, real_dtype
from ..functional import SinkhornOutput, _without_padding
from ._pot_costs import check_tol, checked_points, cost_of, floating, linear
from ._pot_schedule import Run, run_as_pot
from ._solver import Solver, solver_of

METHODS = ("auto", "proximal", "log_sinkhorn", "sinkhorn")
REG_TYPES = ("kl", "entropy")
GRADS = ("detach", "autodiff", "last_step", "envelope")
CITATION = (
    "Flamary et al.: POT: Python Optimal Transport. Journal of Machine Learning Research 22(78):1-8, 2021. "
    "https://jmlr.org/papers/v22/20-451.html"
)


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
    def sparse_plan(self) -> Tensor:
        """The plan, dense, as POT has it for torch tensors."""
        return self.plan

    @property
    def lazy_plan(self) -> None:
        """Always None, as in POT for these problems."""
        return

    @property
    def value_quad(self) -> None:
        """Always None, as in POT: there is no quadratic term."""
        return

    @property
    def status(self) -> None:
        """Always None, as in POT."""
        return

    @property
    def citation(self) -> str:
        """What to cite for POT, whose problems and conventions these are."""
        return CITATION


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
              (POT has none). `value_linear` has T in M. `plan` and `potentials` are constants. At a weight of 0 the
              derivative of the entropy is -inf: with ``"entropy"`` its gradient is 0, and the mean is that of the
              others; with ``"kl"`` it is finite, and right.
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
    return _solve("solve_batch", M, reg, a, b, max_iter, tol, method, reg_type, grad, row_lengths, col_lengths)


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
    where = "solve_sample_batch"
    X_a, X_b, metric = checked_points(where, ("X_a", "X_b"), (X_a, X_b), metric, takes_lengths=True)
    for name, points in (("X_a", X_a), ("X_b", X_b)):
        if points.shape[1] == 0:
            raise _checks.wrong_value(where, name, "at least one sample", points)
        _checks.check_has_kernels(where, name, points)
    M = cost_of(where, _without_padding(X_a, row_lengths), _without_padding(X_b, col_lengths), metric, p)
    return _solve(where, M, reg, a, b, max_iter, tol, method, reg_type, grad, row_lengths, col_lengths)


def _solve(
    where: str,
    M: Tensor,
    reg: float | Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    max_iter: int,
    tol: float,
    method: str,
    reg_type: str,
    grad: str,
    row_lengths: Tensor | None,
    col_lengths: Tensor | None,
) -> OTResult:
    """Messages begin with the name `where` of the user's function."""
    M = floating(where, "M", M, "(B, ns, nt)", 3, takes_lengths=True)
    _checks.check_has_kernels(where, "M", M)
    for name, weights in (("a", a), ("b", b)):
        if weights is not None and not isinstance(weights, Tensor):
            raise _checks.wrong_type(where, name, "a torch tensor (torch.from_numpy makes one of an array)", weights)
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

    solve = solver_of(where, "M", M, eps, a, b, row_lengths, col_lengths)
    p = solve.problems
    full_a = _full_weights(p.a, p.row_lengths, M, M.shape[1])
    full_b = _full_weights(p.b, p.col_lengths, M, M.shape[2])
    reg_column = eps.to(full_a.dtype).unsqueeze(1)
    # v = log b + g / reg. Uniform weights make v = 0 a constant g, and a constant changes nothing.
    start = None if b is None else -reg_column * full_b.detach().masked_fill(full_b == 0, 1.0).log()
    run = run_as_pot(solve, start, full_a.detach(), max_iter=max_iter, tol=tol, norm=_largest_norm)
    unrolled = grad in ("autodiff", "last_step") and needs_graph(M, p.a, p.b)
    out = _differentiable(solve, start, run, grad, unrolled)
    assert out.plan is not None
    u, v = full_a.log() + out.f / reg_column, full_b.log() + out.g / reg_column
    if not unrolled:
        u, v = u.detach(), v.detach()
    reg_row = reg_column.squeeze(1)
    if unrolled:
        value_linear = out.transport_cost
        value = value_linear + reg_row * _relative_entropy(M, out, full_a, full_b, reg_column, reg_type)
    else:
        value_linear = out.transport_cost
        if grad == "envelope":
            # Padding may hold anything.
            is_padded = p.row_lengths is not None or p.col_lengths is not None
            costs = M.to(full_a.dtype)
            value_linear = linear(costs.masked_fill(out.plan == 0, 0.0) if is_padded else costs, out.plan)
        with torch.no_grad():
            entropy = _relative_entropy(M, out, full_a, full_b, reg_column, reg_type)
        value = value_linear + reg_row * entropy
        if grad == "envelope":
            slopes = (out.f, out.g) if reg_type == "kl" else (reg_column * u, reg_column * v)
            for weights, slope, lengths in zip((full_a, full_b), slopes, (p.row_lengths, p.col_lengths), strict=True):
                if needs_graph(weights):
                    value = value + _with_slope(weights, slope, _has_slope(weights, lengths, reg_type))
    potentials = (u.exp(), v.exp()) if method == "sinkhorn" else (u, v)
    return OTResult(value, value_linear, potentials, out.plan, {"n_iter": run.n_iter - 1})


def _differentiable(solve: Solver, start: Tensor | None, run: Run, grad: str, unrolled: bool) -> SinkhornOutput:
    """The state that POT returns, in a graph of all iterations, of the last one or of none."""
    if grad == "last_step":
        with torch.no_grad():
            before = run.out or solve(run.n_iter, start)
        return solve(1, before.g, grad="unrolled" if unrolled else "envelope")
    if unrolled:
        return solve(run.n_iter, start, grad="unrolled")
    with torch.no_grad():
        return run.out or solve(run.n_iter, start)


def _full_weights(weights: Tensor | None, lengths: Tensor | None, M: Tensor, size: int) -> Tensor:
    """(B, size) in the dtype of the arithmetic, uniform for None, 0 past the lengths."""
    real = real_dtype(M)
    if lengths is None:
        return M.new_full((len(M), size), 1 / size, dtype=real) if weights is None else weights
    if weights is None:
        weights = lengths.to(real).reciprocal().unsqueeze(1)
    is_valid = torch.arange(size, device=M.device) < lengths.unsqueeze(1)
    return torch.where(is_valid, weights, 0.0)


def _largest_norm(differences: Tensor) -> Tensor:
    """A problem without a solution, whose difference is NaN, has no say."""
    norms: Tensor = torch.linalg.vector_norm(differences, dim=1)
    return norms.nan_to_num(nan=0.0).max() if len(norms) > 0 else norms.new_zeros(())


def _relative_entropy(
    M: Tensor, out: SinkhornOutput, a: Tensor, b: Tensor, reg_column: Tensor, reg_type: str
) -> Tensor:
    """(B,) sum T log T, or sum T log(T / (a b)), with POT's 1e-16 in the logarithm."""
    T = out.plan
    assert T is not None
    if reg_type == "entropy":
        return (T * (T + 1e-16).log()).sum((1, 2))
    product = a.unsqueeze(2) * b.unsqueeze(1)
    is_zero = product == 0
    log_ratio = (T / product.masked_fill(is_zero, 1.0) + 1e-16).log()
    if T.requires_grad:  # Without a weight there is no plan, but there is what the plan would be relative to it.
        exponent = (out.f.unsqueeze(2) + out.g.unsqueeze(1) - M) / reg_column.unsqueeze(2)
        log_ratio = torch.where(is_zero & M.isfinite(), exponent, log_ratio)
    return (T * log_ratio).sum((1, 2))


def _has_slope(weights: Tensor, lengths: Tensor | None, reg_type: str) -> Tensor:
    """(B, n) where the value has a derivative in the weights: not in padding, and that of w log w not at 0."""
    if reg_type == "entropy":
        return weights > 0
    if lengths is None:
        return torch.ones_like(weights, dtype=torch.bool)
    return torch.arange(weights.shape[1], device=weights.device) < lengths.unsqueeze(1)


def _with_slope(weights: Tensor, slope: Tensor, valid: Tensor) -> Tensor:
    """0, with a given gradient in the weights, centred: weights can be compared where their sums are equal only."""
    slope = torch.where(valid, slope, 0.0)
    slope = torch.where(valid, slope - slope.sum(1, keepdim=True) / valid.sum(1, keepdim=True), 0.0)
    return ((weights - weights.detach()) * slope).sum(1)
