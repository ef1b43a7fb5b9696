"""`ot.sinkhorn` and `ot.sinkhorn2` of POT: one problem, or one cost with several right-hand sides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..autograd import needs_graph, real_dtype
from ..functional import SinkhornOutput
from ._pot_costs import check_tol, floating
from ._pot_schedule import run_as_pot
from ._solver import Solver, transposed_solver_of

METHODS = ("sinkhorn", "sinkhorn_log")


def sinkhorn(
    a: Tensor,
    b: Tensor,
    M: Tensor,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    r"""`ot.sinkhorn` of POT 0.9.7, for torch tensors: the same iterates, by :func:`otface_cuda.sinkhorn`.

    The plan P of <P, M> + reg sum P log P with row sums a and column sums b. One iteration updates columns, then rows,
    from u = 0. After iteration 1, 11, 21, ... the L2 norm of P^T 1 - b is compared with `stopThr`.

    Args:
        a: (n,) weights of the rows; empty: uniform.
        b: (m,) weights of the columns, of the same sum; empty: uniform. Or (m, k): k problems with one a and M.
        M: (n, m) costs, float64, float32, bfloat16 or float16 (computed in float32). ``+inf`` forbids a pair.
        reg: strength of the entropy, in units of M.
        method: ``"sinkhorn"`` or ``"sinkhorn_log"``. Both run in the log domain, so that nothing underflows, and there
            is no "numerical errors" to warn of. With several right-hand sides all stop together, by the norm over all
            of them, for ``"sinkhorn"``; each stops by itself for ``"sinkhorn_log"``.
        numItermax: iterations at most.
        stopThr: see above. 0 does exactly `numItermax`. Each look at the error waits for a CUDA device.
        verbose: print the error at each look.
        log: also return a dictionary; then the error is looked at after every tenth iteration, which takes longer.
        warn: warn if `stopThr` was not reached.
        warmstart: a pair of log-scalings to start from, (n,) and (m,), of which the first counts. With several
            right-hand sides (n, k) and (m, k) for ``"sinkhorn"``, a list of pairs for ``"sinkhorn_log"``.
        **kwargs: nothing else; POT ignores what it does not know.

    Returns:
        The plan (n, m), or with several right-hand sides their <P, M>, (k,); float64 for a float64 M, else float32.
        With `log` also a dictionary: ``err`` (the errors looked at), ``niter`` (iterations less one, which is how POT
        counts), ``u``, ``v``, ``log_u`` and ``log_v``, with P = exp(log_u + log_v - M / reg). POT's log_u and log_v
        differ by a constant, log_u + c and log_v - c.
        Gradients in M, a and b are those of the iterations. The start is held constant, also where a is given, whereas
        POT's differs by log a from ours: the gradient of a differs by what is left of the start after the iterations.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.

    >>> a = b = torch.tensor([0.5, 0.5])
    >>> M = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> sinkhorn(a, b, M, 1.0, stopThr=1e-6)
    tensor([[0.3655, 0.1345],
            [0.1345, 0.3655]])
    """
    return _sinkhorn("sinkhorn", a, b, M, reg, method, numItermax, stopThr, verbose, log, warn, warmstart, kwargs)


def sinkhorn2(
    a: Tensor,
    b: Tensor,
    M: Tensor,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """`ot.sinkhorn2` of POT: as :func:`sinkhorn`, but <P, M>, of shape () or (k,), is returned instead of the plan.

    >>> a = b = torch.tensor([0.5, 0.5])
    >>> sinkhorn2(a, b, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1.0, stopThr=1e-6)
    tensor(0.2689)
    """
    return _sinkhorn("sinkhorn2", a, b, M, reg, method, numItermax, stopThr, verbose, log, warn, warmstart, kwargs)


def _sinkhorn(
    where: str,
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    method: Any,
    max_iter: Any,
    tol: Any,
    verbose: bool,
    log: bool,
    warn: bool,
    warmstart: Any,
    kwargs: dict[str, Any],
) -> Any:
    if kwargs:
        raise TypeError(f"{where}: got an unexpected keyword argument `{next(iter(kwargs))}`")
    M = floating(where, "M", M, "(n, m)", 2)
    _checks.check_has_kernels(where, "M", M)
    method = method.lower() if isinstance(method, str) else method
    _checks.check_choice(where, "method", method, METHODS)
    eps = _checks.per_problem(where, "reg", reg, 1, "M", M, positive=True)
    max_iter = _checks.check_int(where, "numItermax", max_iter, 1)
    tol = check_tol(where, "stopThr", tol)
    n, m = M.shape
    a = _weights(where, "a", a, M, n, (1,))
    b = _weights(where, "b", b, M, m, (1, 2))
    one = b.dim() == 1
    columns = b.unsqueeze(1) if one else b
    starts = _starts(where, warmstart, n, columns.shape[1], one, method)

    # On the transposed problem, whose rows come first.
    solve = transposed_solver_of(where, M, eps, a, columns)
    report = _Report(verbose, log)
    if method == "sinkhorn":
        runs = [_run(solve, starts, max_iter, tol, report)]
    else:
        runs = [
            _run(solve.only(k), None if starts is None else starts[:, k : k + 1], max_iter, tol, report)
            for k in range(columns.shape[1])
        ]
    if warn and not all(run.converged for run in runs):
        warnings.warn(
            f"Sinkhorn did not converge. After {max_iter} iterations the marginal error is still above {tol:g}: "
            "increase `numItermax`, `stopThr` or `reg`.",
            stacklevel=3,
        )
    if one:
        plan = runs[0].out.plan
        assert plan is not None
        result = plan[0].mT if where == "sinkhorn" else runs[0].out.transport_cost[0]
    else:
        result = torch.cat([run.out.transport_cost for run in runs])
    if not log:
        return result
    scale = eps.to(real_dtype(M))[:, None]
    f, g = (torch.cat([getattr(run.out, name) for run in runs]) for name in "fg")
    log_u, log_v = (a.to(g).log() + g / scale).mT, columns.to(f).log() + (f / scale).mT
    if one:
        log_u, log_v = log_u[:, 0], log_v[:, 0]
    return result, {
        "err": report.errors,
        "niter": max(run.n_iter for run in runs) - 1,
        "u": log_u.exp(),
        "v": log_v.exp(),
        "log_u": log_u,
        "log_v": log_v,
    }


class _Solved(NamedTuple):
    n_iter: int
    out: SinkhornOutput
    converged: bool


def _run(solve: Solver, log_u: Tensor | None, max_iter: int, tol: float, report: _Report) -> _Solved:
    """From log_u (n, k) or 0, until all stop together."""
    M, eps, columns, rows = solve.problems[:4]
    assert columns is not None
    assert rows is not None
    # log_u = log a + g / eps
    is_empty = rows == 0
    offset = rows.detach().masked_fill(is_empty, 1.0).log()
    start = -offset if log_u is None else (log_u.detach().mT.to(offset) - offset).masked_fill(is_empty, 0.0)
    start = (eps.to(offset).unsqueeze(1) * start).contiguous()
    run = run_as_pot(solve, start, columns.detach(), max_iter=max_iter, tol=tol, norm=_norm, on_check=report.callback())
    out = run.out
    needs_gradients = needs_graph(M, columns, rows)
    if out is None or needs_gradients:
        out = solve(run.n_iter, start, grad="unrolled" if needs_gradients else "envelope")
    return _Solved(run.n_iter, out, run.converged)


def _norm(differences: Tensor) -> Tensor:
    """Over all problems."""
    norm: Tensor = torch.linalg.vector_norm(differences)
    return norm


class _Report:
    """What is printed, and kept for the log, when the error is looked at."""

    def __init__(self, verbose: bool, log: bool):
        self.verbose, self.log = verbose, log
        self.errors: list[Tensor] = []

    def callback(self) -> Callable[[int, Tensor], None] | None:
        return self if self.verbose or self.log else None

    def __call__(self, n_iter: int, error: Tensor) -> None:
        if self.log:
            self.errors.append(error)
        if self.verbose:
            if n_iter == 1:
                print("  It.| error")
            print(f"{n_iter - 1:5d}| {error.item():.6e}")


def _weights(where: str, name: str, x: Any, M: Tensor, size: int, ranks: tuple[int, ...]) -> Tensor:
    """(size,) or (size, k); uniform for an empty one."""
    if isinstance(x, Tensor):
        _checks.check_dense(where, name, x)
    if isinstance(x, (Tensor, list)) and len(x) == 0:
        return torch.full((size,), 1.0 / size, dtype=real_dtype(M), device=M.device)
    shape = f"({size},)" if ranks == (1,) else f"({size},) or ({size}, k)"
    if not isinstance(x, Tensor):
        raise _checks.wrong_type(where, name, "a torch tensor (torch.from_numpy makes one of an array)", x)
    _checks.check_floating(where, name, x, shape, ranks)
    if x.shape[0] != size or x.shape[-1] == 0:
        raise _checks.wrong_value(where, name, f"of shape {shape}", x)
    _checks.check_device(where, name, x, "M", M)
    return x


def _starts(where: str, warmstart: Any, n: int, size: int, one: bool, method: str) -> Tensor | None:
    """log_u (n, size)."""
    if warmstart is None:
        return None
    try:
        if one:
            starts = warmstart[0][:, None]
        elif method == "sinkhorn":
            starts = warmstart[0]
        else:
            starts = torch.stack([pair[0] for pair in warmstart], 1)
        if starts.shape == (n, size):
            return starts  # type: ignore[no-any-return]
    except (TypeError, IndexError, AttributeError, RuntimeError):
        pass
    shapes = f"of shapes ({n},) and (m,)" if one or method != "sinkhorn" else f"of shapes ({n}, {size}) and (m, {size})"
    pairs = "a pair" if one or method == "sinkhorn" else f"a list of {size} pairs"
    raise _checks.wrong_value(where, "warmstart", f"{pairs} of tensors {shapes}", warmstart)
