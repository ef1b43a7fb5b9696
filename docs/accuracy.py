"""Measure how far float32 results are from the float64 reference, and print the table of docs/sinkhorn.md.

python docs/accuracy.py      # a few minutes

Differences of the potentials are given as a share of the cost's range, those of the plan as a share of its largest
entry, those of <P, C> relatively: the largest over all inputs and iteration counts below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import otface_cuda
from otface_cuda.reference import cost_matrix, sinkhorn_reference

BATCH = 16
EPS_OF_RANGE = (10.0, 1.0, 1e-2, 1e-4)
ITERATIONS = (100, 500)
HEADER = """\
| eps / range | f, g | plan | `<P, C>` | rebuilds | torch loop: f, g | torch loop: plan |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def costs() -> Iterator[Tensor]:
    """Float32 cost matrices of four kinds, BATCH of each."""
    generator = torch.Generator().manual_seed(0)

    def points(dimension: int) -> Tensor:
        return torch.randn(BATCH, 49, dimension, generator=generator)

    yield torch.rand(BATCH, 49, 49, generator=generator)
    yield torch.rand(BATCH, 30, 200, generator=generator)
    yield cost_matrix(points(2), points(2), "sqeuclidean")
    yield cost_matrix(points(32), points(32), "cosine")


def torch_loop(cost: Tensor, eps: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same iteration in float32 torch, with two log-sum-exps, for comparison: f, g and the plan."""
    eps = eps.float()[:, None, None]
    log_a, log_b = -math.log(cost.shape[1]), -math.log(cost.shape[2])
    g = torch.zeros_like(cost[:, :1])
    for _ in range(iterations):
        f = -eps * torch.logsumexp((g - cost) / eps + log_b, 2, keepdim=True)
        g = -eps * torch.logsumexp((f - cost) / eps + log_a, 1, keepdim=True)
    plan = torch.exp((f + g - cost) / eps + log_a + log_b)
    shift = (g.mean((1, 2), keepdim=True) - f.mean((1, 2), keepdim=True)) / 2
    return (f + shift)[:, :, 0], (g - shift)[:, 0], plan


def rebuilds(cost: Tensor, eps: Tensor, iterations: int) -> Tensor:
    """How often K was built again in each problem, from the history that the unrolled gradient keeps."""
    weights = lengths = (None, None)
    tol, init, check_every, want_plan, want_history = torch.zeros_like(eps), None, 10, False, True
    *_, rebuilt = torch.ops.otface.sinkhorn_forward(
        cost, eps, *weights, tol, *lengths, init, iterations, check_every, want_plan, want_history, math.inf
    )
    return rebuilt.sum(1) - 1  # the first K counts as rebuilt, too


def measure(cost: Tensor, eps_of_range: float, iterations: int) -> Tensor:
    """The worst of the batch: the columns of the table, without the first."""
    span = (cost.amax((1, 2)) - cost.amin((1, 2))).double()
    eps = eps_of_range * span
    exact = sinkhorn_reference(cost, eps, max_iter=iterations, return_plan=True)
    ours = otface_cuda.sinkhorn(cost, eps, max_iter=iterations, return_plan=True)
    loop_f, loop_g, loop_plan = torch_loop(cost, eps, iterations)

    def of_potentials(f: Tensor, g: Tensor) -> Tensor:
        difference = torch.cat([f - exact.f, g - exact.g], 1).abs().amax(1)
        return (difference / span).max()

    def of_plan(plan: Tensor) -> Tensor:
        return ((plan - exact.plan).abs().amax((1, 2)) / exact.plan.amax((1, 2))).max()

    return torch.stack(
        [
            of_potentials(ours.f, ours.g),
            of_plan(ours.plan),
            (ours.transport_cost / exact.transport_cost - 1).abs().max(),
            rebuilds(cost, eps, iterations).max().double(),
            of_potentials(loop_f, loop_g),
            of_plan(loop_plan),
        ]
    )


def main() -> None:
    print(HEADER)
    inputs = list(costs())
    for eps_of_range in EPS_OF_RANGE:
        worst = torch.stack([measure(cost, eps_of_range, t) for cost in inputs for t in ITERATIONS]).amax(0)
        f_g, plan, transport_cost, built, *loop = worst.tolist()
        cells = [f"{eps_of_range:g}", f"{f_g:.0e}", f"{plan:.0e}", f"{transport_cost:.0e}", f"{built:.0f}"]
        print("| " + " | ".join([*cells, *(f"{x:.0e}" for x in loop)]) + " |", flush=True)


if __name__ == "__main__":
    main()
