"""Who takes part in the OTFace benchmark: this package, and two ways to write the term in torch.

``prepare`` returns a call that computes the loss and its gradient in the feature maps, as an ``Answer``. Rules: the
same formula, float32, torch's autograd.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from harness import Library
from otface_problems import (
    EPS,
    N_ITER,
    Answer,
    Problem,
    distances_by_scaling,
    pairs_of,
    unit_cells,
)
from torch import Tensor

SAMPLE = 24  # triplets that the loop is timed on


class Peer(Library, ABC):
    sample: int | None = None  # of so many triplets; the time is then extrapolated to all

    @abstractmethod
    def needs(self, problem: Problem) -> int:
        """Bytes beyond the maps, about, at the peak of a call."""

    @abstractmethod
    def loss(self, maps: Tensor, problem: Problem) -> Tensor:
        """The transport term, differentiable."""

    def prepare(self, problem: Problem) -> Callable[[], Answer]:
        def call() -> Answer:
            maps = problem.maps.detach().requires_grad_()
            loss = self.loss(maps, problem)
            return Answer(loss.detach(), *torch.autograd.grad(loss, maps))

        return call


class Ours(Peer):
    name = "otface_cuda"
    label = "otface_cuda"
    module = "otface_cuda"
    package = "otface_cuda"

    def needs(self, problem: Problem) -> int:
        return 6 * problem.maps.numel() * 4 + 2**30

    def loss(self, maps: Tensor, problem: Problem) -> Tensor:
        import otface_cuda

        return otface_cuda.ot_triplet_loss(maps, problem.triplets, eps=EPS, n_iter=N_ITER).loss


def mean_of_active(hinge: Tensor) -> Tensor:
    hinge = hinge.relu()
    return hinge.sum() / (hinge > 0).sum().clamp(min=1)


class TripletLoop(Peer):
    name = "triplet-loop"
    label = "torch, one triplet at a time"
    note = f"as the authors' code; timed on {SAMPLE} triplets and extrapolated to all, memory of these alone"
    sample = SAMPLE

    def needs(self, problem: Problem) -> int:
        return 2**28

    def loss(self, maps: Tensor, problem: Problem) -> Tensor:
        terms = []
        for a, p, n in problem.triplets.tolist():
            cells = unit_cells(maps[[a, p, n]])
            positive, negative = (distances_by_scaling(cells[:1], cells[k : k + 1]) for k in (1, 2))
            terms.append(positive - negative)
        return mean_of_active(torch.cat(terms))


class Batched(Peer):
    name = "batched"
    label = "torch, log-sum-exp of all pairs"
    note = "each different pair once, all at the same time, differentiated by autograd"

    def needs(self, problem: Problem) -> int:
        pairs, row = len(pairs_of(problem.triplets)[0]), problem.row
        # Both point sets and their gradients; of each half-step autograd keeps the sum's terms, and one copy is made.
        return 4 * pairs * row.cells * (4 * row.channels + row.cells * (2 * N_ITER * 2 + 8))

    def loss(self, maps: Tensor, problem: Problem) -> Tensor:
        pairs, positive, negative = pairs_of(problem.triplets)
        cells = unit_cells(maps)
        cost = 1 - cells[pairs[:, 0]] @ cells[pairs[:, 1]].mT
        scaled = -cost / EPS
        log_weight = -math.log(cost.shape[1])
        g = cost.new_zeros(len(cost), 1, cost.shape[2])
        for _ in range(N_ITER):
            f = log_weight - (scaled + g).logsumexp(2, keepdim=True)
            g = log_weight - (scaled + f).logsumexp(1, keepdim=True)
        distances = ((scaled + f + g).exp() * cost).sum((1, 2))
        return mean_of_active(distances[positive] - distances[negative])


OURS = Ours()
PEERS: dict[str, Peer] = {peer.name: peer for peer in (TripletLoop(), Batched())}
EVERYONE: dict[str, Peer] = {peer.name: peer for peer in (OURS, *PEERS.values())}
