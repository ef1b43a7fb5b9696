"""The operators `torch.ops.otface.sinkhorn_*` under torch's autograd, and what tracing needs to know of them.

Everything here is checked: see `functional.py` for the arguments that users give.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from . import _convergence

_ops = torch.ops.otface

# What the implicit gradient promises: the residual of its adjoint system, relative to the right-hand side.
IMPLICIT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-7}


class Problems(NamedTuple):
    """What every operator of the family takes first."""

    cost: Tensor  # (B, n, m), or (n, m): then nothing else has a B either
    eps: Tensor  # (B,) or () float64
    a: Tensor | None  # (B, n), in the dtype of the arithmetic, or None for uniform weights
    b: Tensor | None  # (B, m)
    row_lengths: Tensor | None  # (B,) int64, (1,) without a batch
    col_lengths: Tensor | None


class Settings(NamedTuple):
    where: str  # the user's function, for messages
    max_iter: int
    check_every: int
    grad: str  # "envelope", "unrolled" or "implicit"
    return_plan: bool
    mass_tolerance: float  # how far the masses of a and b may be apart, relative to the larger


class Solution(NamedTuple):
    """What `sinkhorn_forward` returns. `plan`, `history` and `rebuilt` are empty where they were not asked for."""

    value: Tensor
    transport_cost: Tensor
    f: Tensor
    g: Tensor
    plan: Tensor
    error: Tensor
    n_iter: Tensor
    converged: Tensor
    potentials: Tensor
    history: Tensor
    rebuilt: Tensor


class OutputGradients(NamedTuple):
    value: Tensor | None
    transport_cost: Tensor | None
    f: Tensor | None
    g: Tensor | None
    plan: Tensor | None


def real_dtype(cost: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the outputs."""
    return torch.float64 if cost.dtype == torch.float64 else torch.float32


def solve(problems: Problems, tol: Tensor, init_g: Tensor | None, settings: Settings, want_history: bool) -> Solution:
    p, s = problems, settings
    return Solution(
        *_ops.sinkhorn_forward(
            p.cost, p.eps, p.a, p.b, tol, p.row_lengths, p.col_lengths, init_g, s.max_iter, s.check_every,
            s.return_plan, want_history, s.mass_tolerance,
        )
    )  # fmt: skip


def solution_for_backward(
    potentials: Tensor, n_iter: Tensor, history: Tensor | None = None, rebuilt: Tensor | None = None
) -> Solution:
    """The part of a solution that the gradients read."""
    none = potentials.new_empty(0)
    return Solution(
        none, none, none, none, none, none, n_iter, none, potentials,
        none if history is None else history, none if rebuilt is None else rebuilt,
    )  # fmt: skip


def check_differentiable(where: str, grad: str, incoming: OutputGradients) -> None:
    """The envelope has the gradient of `value` only: say so, rather than give zeros for the others.

    Nothing is said under torch.compile, where a raise would break the graph.
    """
    if grad != "envelope" or torch.compiler.is_compiling():
        return
    for name, x in incoming._asdict().items():
        if name != "value" and x is not None:
            raise RuntimeError(
                f"{where}: `{name}` has no gradient with grad='envelope', which differentiates `value` only; "
                "use grad='unrolled' or grad='implicit'"
            )


def gradients(
    problems: Problems,
    solution: Solution,
    settings: Settings,
    incoming: OutputGradients,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of cost, a and b that are wanted, each in its input's dtype."""
    p = problems
    incoming = OutputGradients(*(None if x is None else x.contiguous() for x in incoming))
    if all(x is None for x in incoming):
        return None, None, None
    if settings.grad == "envelope":
        out = _ops.sinkhorn_envelope_backward(*p, solution.potentials, incoming.value, *wanted)
    elif settings.grad == "unrolled":
        out = _ops.sinkhorn_unrolled_backward(
            *p, solution.potentials, solution.n_iter, solution.history, solution.rebuilt, *incoming, *wanted
        )
    else:
        *out, solved = _ops.sinkhorn_implicit_backward(
            *p, solution.potentials, *incoming, IMPLICIT_TOLERANCE[real_dtype(p.cost)], *wanted
        )
        _convergence.warn_of_adjoint(settings.where, solved)
    grad_cost, grad_a, grad_b = (x if want else None for x, want in zip(out, wanted, strict=True))
    return None if grad_cost is None else grad_cost.to(p.cost.dtype), grad_a, grad_b


def needs_graph(*inputs: Tensor | None) -> bool:
    """Whether autograd has to see the call: else the operator is called directly."""
    tensors = [x for x in inputs if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    # Forward mode is not supported; the Function says so, where a bare operator would drop the tangents.
    return not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in tensors)


class _OnceDifferentiable(torch.autograd.Function):
    """The identity on gradients, for a graph of them: a second derivative that reaches it is an error, not zero."""

    @staticmethod
    def forward(ctx, where: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        ctx.where = where
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_: Any) -> Any:  # type: ignore[no-untyped-def]
        raise RuntimeError(f"{ctx.where}: second derivatives are not computed, only first ones")


def once_differentiable(
    where: str, grads: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients, which depend on the inputs in a way that autograd must not take for a constant.

    torch's own decorator notices this only where the incoming gradient has a graph.
    """
    given = [x for x in grads if x is not None]
    if not torch.is_grad_enabled() or not given:
        return grads
    marked = iter(_OnceDifferentiable.apply(where, len(given), *given, *(x for x in inputs if x is not None)))
    return tuple(None if x is None else next(marked) for x in grads)


class Sinkhorn(torch.autograd.Function):
    """cost, a and b to value, transport_cost, f, g, plan, error, n_iter and converged."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        cost: Tensor,
        eps: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        row_lengths: Tensor | None,
        col_lengths: Tensor | None,
        tol: Tensor,
        init_g: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        problems = Problems(cost, eps, a, b, row_lengths, col_lengths)
        out = solve(problems, tol, init_g, settings, want_history=settings.grad == "unrolled")
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out.error, out.n_iter, out.converged)
        ctx.save_for_backward(*problems, out.potentials, out.n_iter, out.history, out.rebuilt)
        return out[:8]

    @staticmethod
    def backward(ctx, value, transport_cost, f, g, plan, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        *problems, potentials, n_iter, history, rebuilt = ctx.saved_tensors
        incoming = OutputGradients(value, transport_cost, f, g, plan if ctx.settings.return_plan else None)
        check_differentiable(ctx.settings.where, ctx.settings.grad, incoming)
        with torch.no_grad():
            grads = gradients(
                Problems(*problems),
                solution_for_backward(potentials, n_iter, history, rebuilt),
                ctx.settings,
                incoming,
                (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]),
            )
        grad_cost, grad_a, grad_b = once_differentiable(ctx.settings.where, grads, (*problems, *incoming))
        return grad_cost, None, grad_a, grad_b, None, None, None, None, None


@torch.library.register_fake("otface::sinkhorn_forward")
def _(cost, eps, a, b, tol, row_lengths, col_lengths, init_g, max_iter, check_every, want_plan, want_history, _):  # type: ignore[no-untyped-def]
    *B, n, m = cost.shape
    real = real_dtype(cost)
    new = cost.new_empty
    return (
        new(B, dtype=real),
        new(B, dtype=real),
        new((*B, n), dtype=real),
        new((*B, m), dtype=real),
        new((*B, n, m) if want_plan else (0,), dtype=real),
        new(B, dtype=real),
        new(B, dtype=torch.int64),
        new(B, dtype=torch.bool),
        new((*B, n + m), dtype=torch.float64),
        new((*B, max_iter, m + torch.sym_max(n, m)) if want_history else (0,), dtype=real),
        new((*B, max_iter) if want_history else (0,), dtype=torch.uint8),
    )


def _fake_gradients(cost: Tensor, want_cost: bool, want_a: bool, want_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    *B, n, m = cost.shape
    real = real_dtype(cost)
    return (
        cost.new_empty((*B, n, m) if want_cost else (0,), dtype=real),
        cost.new_empty((*B, n) if want_a else (0,), dtype=real),
        cost.new_empty((*B, m) if want_b else (0,), dtype=real),
    )


@torch.library.register_fake("otface::sinkhorn_envelope_backward")
def _(cost, *args):  # type: ignore[no-untyped-def]
    return _fake_gradients(cost, *args[-3:])


@torch.library.register_fake("otface::sinkhorn_unrolled_backward")
def _(cost, *args):  # type: ignore[no-untyped-def]
    return _fake_gradients(cost, *args[-3:])


@torch.library.register_fake("otface::sinkhorn_implicit_backward")
def _(cost, *args):  # type: ignore[no-untyped-def]
    return *_fake_gradients(cost, *args[-3:]), cost.new_empty(cost.shape[:-2], dtype=torch.bool)
