"""Batched entropic optimal transport: `sinkhorn` on cost matrices, `sinkhorn_points` on points."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _convergence, autograd
from ._documented import documented_fields
from .costs import METRICS, pairwise_cost


@documented_fields
class SinkhornOutput(NamedTuple):
    """What the solvers return; without the leading B for an unbatched input."""

    value: Tensor
    """(B,) the regularised cost OT_eps, as <a, f> + <b, g>."""
    transport_cost: Tensor
    """(B,) <P, C>, without the entropy."""
    f: Tensor
    """(B, n) potentials of the rows, in units of the cost."""
    g: Tensor
    """(B, m) potentials of the columns; f and g are shifted so that <a, f> = <b, g>."""
    plan: Tensor | None
    """(B, n, m) the transport plan P, if it was asked for."""
    error: Tensor
    """(B,) |P 1 - a|_1 / W; the columns are exact. Has no gradient."""
    n_iter: Tensor
    """(B,) iterations done, int64; 0 for a problem without a solution."""
    converged: Tensor
    """(B,) bool: error <= tol. Where tol is 0, error <= 4 u sqrt(n + m), which is what rounding may leave of it;
    u = 2^-23, or 2^-52 in float64."""


def sinkhorn(
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
    init: SinkhornOutput | tuple[Tensor | None, Tensor] | None = None,
    grad: str = "envelope",
    return_plan: bool = False,
) -> SinkhornOutput:
    r"""Solve a batch of entropic optimal-transport problems, each by itself, in the log domain.

    For each problem, with cost C (n x m), weights a, b >= 0 of equal total mass W, and eps > 0::

        OT_eps(a, b) = min_P <P, C> + eps * sum_ij P_ij log(P_ij / (a_i b_j))   subject to  P 1 = a,  P^T 1 = b
        f_i <- -eps * log sum_j b_j exp((g_j - C_ij) / eps),  then  g_j <- -eps * log sum_i a_i exp((f_i - C_ij) / eps)
        P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)

    (Cuturi 2013, arXiv 1306.0895; the scaled iteration with absorption is Schmitzer 2019, arXiv 1610.06519.)

    Args:
        cost: (B, n, m) or (n, m), on the CPU or a CUDA device; float64, float32, bfloat16 or float16, any strides (a
            batch stride of 0 shares one matrix). Half types are read as they are and computed in float32. ``+inf``
            forbids a pair.
        eps: strength of the entropy, in units of the cost; a float or (B,).
        a: weights of the rows, (B, n) or (n,); ``None``: uniform. Any positive total mass, the same as that of ``b`` to
            the rounding of the coarser of their dtypes, where float64 counts as float32: the masses may differ by
            2 eps(dtype) + 3.5e-4 of the larger. Nothing is scaled: the columns of the plan sum to b, and ``error``
            stays at or above the difference.
        b: weights of the columns, (B, m) or (m,); ``None``: uniform.
        max_iter: iterations at most. One iteration updates f, then g.
        tol: a problem stops when its ``error`` is at most this, a float or (B,); one that stopped before ``max_iter``
            has converged. 0 does exactly ``max_iter``. Where one that is given is not reached, a
            :class:`otface_cuda.ConvergenceWarning` says so, once for each line that calls (on CUDA only with
            ``OTFACE_CHECK=1``, and not in a compiled graph).
        check_every: iterations between two looks at the error.
        row_lengths: (B,) integers; problem k has only its first ``row_lengths[k]`` rows. Padding gets zero plan,
            potentials and gradients, and may hold anything.
        col_lengths: likewise for the columns.
        init: a former output, or a pair (f, g), to start from; g is what counts.
        grad: how gradients are computed.

            - ``"envelope"``: of ``value`` only: d/dC = P, d/da = f, d/db = g, the last two centred by their mean over
              the valid entries. Exact at convergence, and costs one exponential per entry.
            - ``"unrolled"``: the exact derivative of the iterations that were done, for ``value``, ``transport_cost``,
              ``plan``, ``f`` and ``g``. Keeps m + max(n, m) numbers per iteration, for ``max_iter`` of them.
            - ``"implicit"``: the derivative at the fixed point, for the same outputs, whatever the number of
              iterations. Solves an adjoint system by conjugate gradients in float64 to a relative residual of 1e-7
              (1e-11 for float64 costs) in at most 100 + 10 min(n, m) steps; where that fails, the gradients are NaN
              and a warning is given (on CUDA only with ``OTFACE_CHECK=1``; not under vmap). The gradients of a and b
              are centred.
        return_plan: also return the plan.

    Returns:
        :class:`SinkhornOutput`, float64 for a float64 cost, else float32. Gradients have the dtype of their input.
        A problem with NaN or -inf in its cost, or with a row or column of positive weight that is +inf throughout, has
        NaN outputs and ``converged`` False; the others are not touched by it.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came. Values on a CUDA device
            are looked at only if the environment has ``OTFACE_CHECK=1``, because that waits for the device; without it
            nothing does, so that calls can be captured in a CUDA graph, and a wrong value gives NaN in its own problem;
            so it does in a compiled graph.
        RuntimeError: in backward, for a gradient that ``grad`` does not have.

    >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]], requires_grad=True)
    >>> out = sinkhorn(cost, eps=0.5, tol=1e-6, return_plan=True)
    >>> out.plan[0]
    tensor([[0.4404, 0.0596],
            [0.0596, 0.4404]], grad_fn=<SelectBackward0>)
    >>> out.converged, out.n_iter
    (tensor([True, True]), tensor([10, 30]))
    >>> out.value.sum().backward()
    >>> torch.allclose(cost.grad, out.plan)
    True
    """
    _checks.check_floating("sinkhorn", "cost", cost, "(B, n, m) or (n, m)", (2, 3), takes_lengths=True)
    _checks.check_has_kernels("sinkhorn", "cost", cost)
    out = _check_and_solve(
        "sinkhorn",
        "cost",
        cost,
        cost,
        eps,
        a,
        b,
        max_iter=max_iter,
        tol=tol,
        check_every=check_every,
        row_lengths=row_lengths,
        col_lengths=col_lengths,
        init=init,
        grad=grad,
        return_plan=return_plan,
    )
    _convergence.warn_of_tol("sinkhorn", tol, max_iter, out.error, out.converged)
    return out


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    metric: str = "cosine",
    max_iter: int = 100,
    tol: float | Tensor = 0.0,
    check_every: int = 10,
    row_lengths: Tensor | None = None,
    col_lengths: Tensor | None = None,
    init: SinkhornOutput | tuple[Tensor | None, Tensor] | None = None,
    grad: str = "envelope",
    return_plan: bool = False,
) -> SinkhornOutput:
    r"""Entropic optimal transport between two sets of points each: :func:`sinkhorn` on the cost between them.

    Args:
        x: (B, n, d) or (n, d), any float dtype; the cost is computed in float32 at least, also under autocast.
        y: (B, m, d) or (m, d).
        eps: strength of the entropy, in units of the cost; a float or (B,).
        a, b: weights, as in :func:`sinkhorn`.
        metric: ``"cosine"``: 1 - cos(x_i, y_j), where a zero vector has cosine 0; ``"sqeuclidean"``: \|x_i - y_j\|^2;
            ``"euclidean"``: \|x_i - y_j\|, with gradient 0 where the points coincide. All come from a matrix product,
            and for points that are near to one another from their differences: never negative, exactly 0 for equal
            points (for the cosine: equal unit vectors), with a relative error of 2.4e-4 at most in float32, 4.5e-13 in
            float64; of a cosine also of 4 u / t + 4 (u / t)^2, for points at an angle t whose directions are rounded by
            u = 6e-8 or 1.1e-16. The gradient of a distance is right to the same share of its terms. Of points that are
            not finite nothing reaches the costs of others, and a Euclidean distance is right also where its square is
            too large or too small for the dtype. The products are torch's, which rounds more if
            ``torch.set_float32_matmul_precision`` allows it (TensorFloat32 on CUDA): then what is not near, costs above
            (sqrt(d) + 4) / 1024 of \|x\|^2 + \|y\|^2 about the mean point (of 1 for the cosine), is right to 1/256 of
            these. With ``"medium"``, on a CPU with AMX, equal points were seen to cost more than 0.
        max_iter, tol, check_every, row_lengths, col_lengths, init, grad, return_plan: as in :func:`sinkhorn`.

    Returns:
        :class:`SinkhornOutput`, with gradients in x and y (and a, b) by the chain rule through the cost.

    Raises:
        TypeError, ValueError: as :func:`sinkhorn`.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> out = sinkhorn_points(x, x.detach().flip(0), eps=0.01, metric="sqeuclidean")
    >>> round(out.transport_cost.item(), 4)
    0.0
    >>> out.value.backward()
    >>> x.grad.shape
    torch.Size([2, 2])
    """
    where = "sinkhorn_points"
    check_points(where, x, y, takes_lengths=True)
    _checks.check_choice(where, "metric", metric, METRICS)
    batched = x.dim() == 3
    x, y = _without_padding(x, row_lengths), _without_padding(y, col_lengths)
    cost = pairwise_cost(x if batched else x[None], y if batched else y[None], metric)
    out = _check_and_solve(
        where,
        "x",
        x,
        cost if batched else cost[0],
        eps,
        a,
        b,
        max_iter=max_iter,
        tol=tol,
        check_every=check_every,
        row_lengths=row_lengths,
        col_lengths=col_lengths,
        init=init,
        grad=grad,
        return_plan=return_plan,
    )
    _convergence.warn_of_tol(where, tol, max_iter, out.error, out.converged)
    return out


def check_points(where: str, x: Any, y: Any, *, takes_lengths: bool = False) -> None:
    """Two sets of points that go together: (B, n, d) and (B, m, d), or (n, d) and (m, d)."""
    for name, points, size in (("x", x, "n"), ("y", y, "m")):
        shape = f"(B, {size}, d) or ({size}, d)"
        _checks.check_floating(where, name, points, shape, (2, 3), takes_lengths=takes_lengths)
    _checks.check_device(where, "y", y, "x", x)
    _checks.check_has_kernels(where, "x", x)
    if x.dim() != y.dim() or x.shape[-1] != y.shape[-1] or (x.dim() == 3 and x.shape[0] != y.shape[0]):
        expected = f"(m, {x.shape[-1]})" if x.dim() == 2 else f"({x.shape[0]}, m, {x.shape[-1]})"
        raise _checks.wrong_value(where, "y", f"of shape {expected} to go with `x`", y)
    if x.dtype != y.dtype:
        raise _checks.wrong_type(where, "y", f"of the dtype of `x` ({x.dtype})", y)
    if x.shape[-2] == 0 or y.shape[-2] == 0:
        empty = ("x", x) if x.shape[-2] == 0 else ("y", y)
        raise _checks.wrong_value(where, empty[0], "at least one point", empty[1])


def _check_and_solve(
    where: str,
    source_name: str,
    source: Tensor,
    cost: Tensor,
    eps: float | Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    max_iter: int,
    tol: float | Tensor,
    check_every: int,
    row_lengths: Tensor | None,
    col_lengths: Tensor | None,
    init: SinkhornOutput | tuple[Tensor | None, Tensor] | None,
    grad: str,
    return_plan: bool,
) -> SinkhornOutput:
    """Check what goes with the cost, bring it into the form the operators take, and solve.

    Messages begin with the name `where` of the user's function, and call what the user gave `source_name`.
    """
    batched = cost.dim() == 3
    batch, (n, m) = cost.shape[0] if batched else 1, cost.shape[-2:]
    if n == 0 or m == 0:
        raise _checks.wrong_value(where, source_name, "at least 1 x 1", cost)
    _checks.check_choice(where, "grad", grad, _checks.GRADIENT_MODES)
    _checks.check_bool(where, "return_plan", return_plan)
    max_iter = _checks.check_int(where, "max_iter", max_iter, 1)
    check_every = _checks.check_int(where, "check_every", check_every, 1)
    eps = _checks.numbers(where, "eps", eps, batch, source_name, source, positive=True)
    tol = _checks.numbers(where, "tol", tol, batch, source_name, source, positive=False)
    if not batched:
        row_lengths, col_lengths = (_unsqueeze_scalar(x) for x in (row_lengths, col_lengths))
    rows = _checks.lengths(where, "row_lengths", row_lengths, batch, n, source_name, source)
    cols = _checks.lengths(where, "col_lengths", col_lengths, batch, m, source_name, source)
    a, b, mass_tolerance = _weights(where, source_name, a, b, cost, rows, cols)
    init_g = _init_g(where, source_name, init, cost)
    settings = autograd.Settings(where, max_iter, check_every, grad, return_plan, mass_tolerance)
    return _solve(autograd.Problems(cost, eps, a, b, rows, cols), tol, init_g, settings)


def _without_padding(points: Tensor, lengths: Any) -> Tensor:
    """Copies of the first point for those past the lengths, which may hold anything and be anywhere.

    Lengths that do not fit are refused later.
    """
    if not isinstance(lengths, Tensor) or lengths.is_complex() or lengths.device != points.device:
        return points
    if lengths.is_nested or lengths.shape not in (points.shape[:-2], points.shape[:-2] or (1,)):
        return points
    places = torch.arange(points.shape[-2], device=points.device)
    valid = places < lengths.to(torch.int64).reshape(points.shape[:-2])[..., None]
    return torch.where(valid[..., None], points, points[..., :1, :].detach())


def _unsqueeze_scalar(x: Any) -> Any:
    return x[None] if isinstance(x, Tensor) and x.dim() == 0 else x


def _weights(
    where: str,
    source_name: str,
    a: Tensor | None,
    b: Tensor | None,
    cost: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, float]:
    """a (B, n) and b (B, m), or (n,) and (m,) for a single problem, in the dtype of the arithmetic, and how far their
    masses may be apart. None where both are uniform.
    """
    if a is None and b is None:
        return None, None, math.inf
    batched = cost.dim() == 3
    batch, (n, m) = cost.shape[0] if batched else 1, cost.shape[-2:]
    given: dict[str, tuple[Tensor, Tensor | None]] = {}
    if a is not None:
        given["a"] = _checks.weights(where, "a", a, batch, n, batched, source_name, cost), rows
    if b is not None:
        given["b"] = _checks.weights(where, "b", b, batch, m, batched, source_name, cost), cols
    tolerance = _checks.mass_tolerance(*(x for x, _ in given.values()))
    _checks.check_weights_data(where, given, tolerance)
    real = autograd.real_dtype(cost)
    full = {name: x if x.dtype == real else x.to(real) for name, (x, _) in given.items()}
    if "a" not in full:
        full["a"] = _uniform_like(full["b"], cols, n, rows)
    if "b" not in full:
        full["b"] = _uniform_like(full["a"], rows, m, cols)
    return full["a"], full["b"], tolerance


def _uniform_like(other: Tensor, other_lengths: Tensor | None, size: int, lengths: Tensor | None) -> Tensor:
    """Uniform weights (B, size), or (size,), of the mass of the other side. Entries past the length are never read."""
    real, other = other.dtype, other.detach().double()
    if other_lengths is not None:
        places = torch.arange(other.shape[-1], device=other.device)
        other = torch.where(places < _per_row(other_lengths, other), other, 0.0)
    mass = other.sum(-1, keepdim=True)
    counts = size if lengths is None else _per_row(lengths, other)
    return (mass / counts).to(real).expand(*mass.shape[:-1], size)


def _per_row(lengths: Tensor, weights: Tensor) -> Tensor:
    """Lengths (B,) to go with weights (B, n); (1,) go with (n,) as they are."""
    return lengths if weights.dim() == 1 else lengths[:, None]


def _init_g(
    where: str,
    source_name: str,
    init: SinkhornOutput | tuple[Tensor | None, Tensor] | None,
    cost: Tensor,
) -> Tensor | None:
    if init is None:
        return None
    shape = (*cost.shape[:-2], cost.shape[-1])
    if isinstance(init, SinkhornOutput):
        g: Any = init.g
    elif isinstance(init, tuple) and len(init) == 2:
        g = init[1]
    else:
        raise _checks.wrong_type(where, "init", "a SinkhornOutput or a pair (f, g)", init)
    expected = f"(f, g) with g of shape {shape}"
    if not isinstance(g, Tensor) or not g.is_floating_point():
        raise _checks.wrong_type(where, "init", expected, g)
    _checks.check_dense(where, "init", g)
    if g.shape != shape:
        raise _checks.wrong_value(where, "init", expected, g)
    _checks.check_device(where, "init", g, source_name, cost)
    return g.detach().to(autograd.real_dtype(cost)).contiguous()


def _solve(
    problems: autograd.Problems, tol: Tensor, init_g: Tensor | None, settings: autograd.Settings
) -> SinkhornOutput:
    p = problems
    if autograd.needs_graph(p.cost, p.a, p.b):
        outputs = autograd.Sinkhorn.apply(*p, tol, init_g, settings)
    else:
        outputs = autograd.solve(p, tol, init_g, settings, want_history=False)[:8]
    value, transport_cost, f, g, plan, error, n_iter, converged = outputs
    kept_plan = plan if settings.return_plan else None
    return SinkhornOutput(value, transport_cost, f, g, kept_plan, error, n_iter, converged)
