"""torch.ops.otface.sinkhorn_* of the CPU, computed by the CUDA kernels on the host executor (see simt/): so that the
tests of the Python functions test these kernels too, where there is no GPU.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .simt import kernels, near

NAMES = [
    "sinkhorn_forward",
    *(f"sinkhorn_{mode}_backward" for mode in ("envelope", "unrolled", "implicit")),
    *near.STEPS,
]
OUTPUTS = ["value", "transport_cost", "f", "g", "plan"]

runs: collections.Counter[str] = collections.Counter()  # of each operator, by the tier that it ran in


tier = "any"


def replace_those_of_the_cpu(tier: str) -> torch.library.Library:
    """As long as the returned object lives. `tier`: one of kernels.TIERS, "any" for what a problem takes on a GPU."""
    globals()["tier"] = tier
    library = torch.library.Library("otface", "IMPL")
    for name in NAMES:
        library.impl(name, globals()[name], "CPU", allow_override=True)
    return library


def sinkhorn_forward(
    cost: Tensor, eps: Tensor, a: Any, b: Any, tol: Tensor, row_lengths: Any, col_lengths: Any, init_g: Any,
    max_iter: int, check_every: int, want_plan: bool, want_history: bool, mass_tolerance: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = run(
        "forward", cost, eps, a, b, row_lengths, col_lengths, tol=tol.numpy(), init_g=numpy_or_none(init_g),
        max_iter=max_iter, check_every=check_every, want_plan=want_plan, want_history=want_history,
        mass_tolerance=mass_tolerance,
    )  # fmt: skip
    *B, n, m = cost.shape
    shapes = {
        "value": (*B,), "transport_cost": (*B,), "f": (*B, n), "g": (*B, m), "plan": (*B, n, m), "error": (*B,),
        "n_iter": (*B,), "converged": (*B,), "potentials": (*B, n + m), "history": (*B, max_iter, m + max(n, m)),
        "rebuilt": (*B, max_iter),
    }  # fmt: skip
    dtypes = {"n_iter": torch.int64, "converged": torch.bool, "potentials": torch.float64, "rebuilt": torch.uint8}
    wanted = set(shapes) - (set() if want_plan else {"plan"}) - (set() if want_history else {"history", "rebuilt"})
    return tuple(result(found, name, shape, dtypes.get(name), cost, name in wanted) for name, shape in shapes.items())


def sinkhorn_envelope_backward(*args: Any) -> tuple[Tensor, ...]:
    *problems, potentials, grad_value, want_cost, want_a, want_b = args
    return gradients("envelope", problems, potentials, [grad_value], (want_cost, want_a, want_b))


def sinkhorn_unrolled_backward(*args: Any) -> tuple[Tensor, ...]:
    *problems, potentials, n_iter, history, rebuilt, value, transport_cost, f, g, plan, want_cost, want_a, want_b = args
    kept = {"n_iter": n_iter.numpy(), "history": history.numpy(), "rebuilt": rebuilt.numpy()}
    incoming = [value, transport_cost, f, g, plan]
    return gradients("unrolled", problems, potentials, incoming, (want_cost, want_a, want_b), kept)


def sinkhorn_implicit_backward(*args: Any) -> tuple[Tensor, ...]:
    *problems, potentials, value, transport_cost, f, g, plan, tol, want_cost, want_a, want_b = args
    cost = problems[0]
    options = {"implicit_tol": tol, "implicit_max_iter": 100 + 10 * min(cost.shape[-2:])}
    incoming = [value, transport_cost, f, g, plan]
    return gradients("implicit", problems, potentials, incoming, (want_cost, want_a, want_b), **options)


def near_costs(cost: Tensor, x: Tensor, y: Tensor, x_squares: Any, y_squares: Any, metric: int) -> None:
    found = run_near("near_costs", metric, cost=cost, x=x, y=y, x_squares=x_squares, y_squares=y_squares)
    cost.copy_(found["cost"])


def far_weights(
    cost: Tensor, grad: Tensor, x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor, metric: int
) -> Tensor:
    squares = {"x_squares": x_squares, "y_squares": y_squares}
    return run_near("far_weights", metric, cost=cost, grad=grad, x=x, y=y, **squares)["weights"]


def near_gradient(
    cost: Tensor, grad: Tensor, x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor, metric: int,
    far_x: Tensor, far_y: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = {"x_squares": x_squares, "y_squares": y_squares, "far_x": far_x, "far_y": far_y}
    found = run_near("near_gradient", metric, cost=cost, grad=grad, x=x, y=y, **given)
    return found["grad_x"], found["grad_y"]


def run_near(step: str, metric: int, **tensors: Tensor | None) -> dict[str, Tensor]:
    case = near.make(step, metric, {name: numpy_or_none(x) for name, x in tensors.items()})
    runs[f"{step}, warps"] += 1
    return {name: torch.from_numpy(array) for name, array in kernels.run(case).items()}


def gradients(
    mode: str,
    problems: Sequence[Any],
    potentials: Tensor,
    incoming: Sequence[Tensor | None],
    wanted: tuple[bool, bool, bool],
    kept: dict[str, np.ndarray] | None = None,
    **options: float,
) -> tuple[Tensor, ...]:
    cost, eps, a, b, row_lengths, col_lengths = problems
    given = {name: x.numpy() for name, x in zip(OUTPUTS, incoming, strict=False) if x is not None}
    wants = dict(zip(("want_grad_cost", "want_grad_a", "want_grad_b"), wanted, strict=True))
    brought = {"potentials": potentials.numpy()} | (kept or {})
    found = run(mode, cost, eps, a, b, row_lengths, col_lengths, brought=brought, grads=given, **wants, **options)
    *B, n, m = cost.shape
    shapes = {"grad_cost": (*B, n, m), "grad_a": (*B, n), "grad_b": (*B, m)}
    out = [result(found, name, shapes[name], None, cost, want) for name, want in zip(shapes, wanted, strict=True)]
    if mode == "implicit":
        out.append(result(found, "implicit_converged", (*B,), torch.bool, cost, True))
    return tuple(out)


def run(
    step: str, cost: Tensor, eps: Tensor, a: Any, b: Any, row_lengths: Any, col_lengths: Any,
    brought: dict[str, np.ndarray] | None = None, **options: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    if cost.numel() == 0:
        return {}
    cost, a, b = (x[None] if x is not None and cost.dim() == 2 else x for x in (cost, a, b))
    is_bfloat = cost.dtype == torch.bfloat16
    case = kernels.make_case(
        (cost.view(torch.uint16) if is_bfloat else cost).detach().numpy(),
        eps.contiguous().numpy(),
        numpy_or_none(a),
        numpy_or_none(b),
        steps=(step,),
        row_lengths=numpy_or_none(row_lengths),
        col_lengths=numpy_or_none(col_lengths),
        cost_bfloat=is_bfloat,
        tier=tier,
        **options,
    )
    found: dict[str, np.ndarray] = kernels.run(case | (brought or {}))
    runs[f"{step}, {'rows' if step == 'envelope' else kernels.tier_of(found, step)}"] += 1
    return found


def numpy_or_none(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().numpy()


def result(
    found: dict[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: torch.dtype | None, cost: Tensor, want: bool
) -> Tensor:
    dtype = dtype or (torch.float64 if cost.dtype == torch.float64 else torch.float32)
    if not want or 0 in shape:
        return torch.empty(shape if want else (0,), dtype=dtype)
    return torch.from_numpy(found[name]).to(dtype).reshape(shape)
