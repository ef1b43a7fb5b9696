"""Random problems, the tolerances that go with them, and a comparison of two solutions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import otface_cuda
from otface_cuda import SinkhornOutput
from otface_cuda.reference import ReferenceOutput, sinkhorn_reference

# A run of the tests in which the CUDA kernels compute for the CPU: see test_suite_on_executor.py
CPU_IS_EXECUTOR = "OTFACE_TEST_EXECUTOR" in os.environ

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Problem(NamedTuple):
    cost: Tensor  # (B, n, m), entries in [0, 1)
    a: Tensor  # (B, n)
    b: Tensor  # (B, m)

    def to(self, device: str) -> Problem:
        return Problem(*(x.to(device) for x in self))

    def solve(self, eps: float | Tensor, **options: Any) -> SinkhornOutput:
        return otface_cuda.sinkhorn(self.cost, eps, self.a, self.b, **options)

    def reference(self, eps: float | Tensor, **options: Any) -> ReferenceOutput:
        cost, a, b = self.to("cpu")
        with one_thread():
            return sinkhorn_reference(cost, eps, a, b, **options)


@contextmanager
def one_thread() -> Iterator[None]:
    """For many small operations of torch: its threads would wait for one another most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_problem(
    batch: int,
    n: int,
    m: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    mass: float = 1.0,
    zero_weights: bool = False,
    device: str = "cpu",
) -> Problem:
    """Costs uniform in [0, 1), so that eps is a fraction of their range, and uneven weights.

    The numbers do not depend on the device. The weights are multiples of `mass` / 2^20, so that for a mass of few bits
    the two sums are equal without rounding, also in float32; without that there is no fixed point. With `zero_weights`
    about a third of them is zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def weights(size: int) -> Tensor:
        w = 0.1 + torch.rand(batch, size, generator=generator, dtype=torch.float64)
        if zero_weights:
            w[:, : size - 1] *= torch.rand(batch, size - 1, generator=generator) > 1 / 3
        w = (w / w.sum(1, keepdim=True) * 2**20).floor()
        w[:, -1] += 2**20 - w.sum(1)
        return (mass * w / 2**20).to(output_dtype(dtype))

    cost = torch.rand(batch, n, m, generator=generator, dtype=torch.float64).to(dtype)
    return Problem(cost, weights(n), weights(m)).to(device)


class Tolerance(NamedTuple):
    potential: float  # absolute, on f and g
    plan: float  # relative, on an entry of the plan


def has_cuda_kernels(device: str | torch.device) -> bool:
    """Whether the kernels of this device are those of CUDA."""
    return CPU_IS_EXECUTOR or torch.device(device).type == "cuda"


def errors_of_a_half_step(n: int, m: int, device: str | torch.device) -> float:
    """In units of u: those of a sum of up to max(n, m) terms grow like its root.

    On CUDA the exponentials in the terms and the quotients are off by up to 2 units in the last place, which are 4 u,
    and may all be off to the same side.
    """
    return math.sqrt(max(n, m)) + (8 if has_cuda_kernels(device) else 0)


def tolerance(
    dtype: torch.dtype,
    eps: float,
    n: int,
    m: int,
    n_iter: int,
    span: float = 1.0,
    device: str | torch.device = "cpu",
) -> Tolerance:
    """What rounding may change in `n_iter` iterations whose potentials and costs are of size `span`.

    With u the unit roundoff, plus that of the float64 we compare with, a half-step rounds exponents of size span / eps,
    each to u span / eps, and adds up to max(n, m) terms (see `errors_of_a_half_step`). It is a (soft)
    minimum, so it passes the errors of the potential before it on without enlarging them: those of 2 n_iter half-steps
    add up like sqrt(2 n_iter) if none fades. 2 more are for the shift and the rounding of the result. An entry of the
    plan is exp((f + g - C) / eps): its relative error is that of f, g and C, over eps.
    """
    u = (torch.finfo(output_dtype(dtype)).eps + torch.finfo(torch.float64).eps) / 2
    potential = (2 + math.sqrt(2 * n_iter)) * u * (span + errors_of_a_half_step(n, m, device) * eps)
    return Tolerance(potential, 3 * potential / eps)


def gradient_rtol(
    dtype: torch.dtype, eps: float, n: int, m: int, n_iter: int, device: str | torch.device = "cpu"
) -> float:
    """What rounding may change in a gradient, relative to its largest entry.

    Entries of the plan and of each iterate's kernel carry u / eps (see `tolerance`), which the reverse sweep multiplies
    in; sums over up to max(n, m) terms of both signs add their errors, and each of the 2 n_iter half-steps adds terms
    of the same size to the gradient of the weights, whose shares along the shift all but cancel.
    """
    u = (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps) / 2
    return 4 * u * (1 + 1 / eps) * errors_of_a_half_step(n, m, device) * 2 * n_iter


def assert_same_solution(
    out: SinkhornOutput, ref: ReferenceOutput, tol: Tolerance, *, mass: float = 1.0, span: float = 1.0
) -> None:
    """Compare every float field with the reference; n_iter and converged are compared where a test is about them."""

    def close(name: str, rtol: float, atol: float) -> None:
        actual, expected = getattr(out, name).double().cpu(), getattr(ref, name).double().cpu()
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}")

    close("f", 0, tol.potential)
    close("g", 0, tol.potential)
    # <a, f> + <b, g>: two averages of a potential, times the mass.
    close("value", 0, 2 * mass * tol.potential)
    # <P, C> and the row sums: every entry has the relative error of the plan, and C is at most `span`.
    close("transport_cost", 0, mass * span * tol.plan)
    close("error", 0, 2 * tol.plan)
    if out.plan is not None:
        # An entry smaller than the largest one by 1e-20 may be lost: the exponentials of float32 underflow.
        close("plan", tol.plan, 1e-20 * ref.plan.max().item())
