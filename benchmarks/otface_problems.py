"""What the OTFace benchmark measures: its rows, their inputs, and the float64 answers they are held against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EPS, N_ITER = 1.0, 10  # of the paper
PER_PERSON = 4  # images
NOISE = 4.0  # of an embedding, by that of its person: about 2,000 triplets of 64 images are hard
SIGNAL = 0.3  # of a person in a feature map, by its noise: about a third of these are active
CLEAR = 1e-5  # a hinge nearer to 0 than this is left out: rounding would decide whether it is active
CHUNK = 512  # pairs of the float64 answer


@dataclass(frozen=True)
class Row:
    """One row of the table: forward and backward for the hard triplets of a batch."""

    batch: int
    channels: int = 512
    side: int = 7
    target: float | None = None  # times its own matrix products, at most

    @property
    def title(self) -> str:
        return f"batch {self.batch}, maps {self.channels} x {self.side} x {self.side}"

    @property
    def cells(self) -> int:
        return self.side**2

    def flops(self, pairs: int, active: int) -> int:
        """Of the matrix products: the costs of the pairs, and two for the gradient of each that is in the loss."""
        return 2 * self.cells**2 * self.channels * (pairs + 2 * active)


TARGET = 1.5
BATCHES = (64, 128, 256, 512)


def rows_for(device: str) -> list[Row]:
    return [Row(batch, target=TARGET if (device, batch) == ("cpu", 64) else None) for batch in BATCHES]


def quick_rows(device: str) -> list[Row]:
    """Small rows that touch every code path, for a smoke test; their figures mean little."""
    return [Row(16, 32, 3), Row(32, 64, 4)]


@dataclass
class Problem:
    row: Row
    maps: Tensor  # (N, C, H, W)
    triplets: Tensor  # (T, 3)

    def sample(self, count: int) -> Problem:
        """With so many of its triplets, evenly spread."""
        places = torch.linspace(0, len(self.triplets) - 1, min(count, len(self.triplets)), device=self.maps.device)
        return replace(self, triplets=self.triplets[places.round().long()])


@dataclass
class Answer:
    loss: Tensor
    grad: Tensor  # as the maps


@dataclass
class Exact(Answer):
    """In float64, with what the products need to be counted."""

    pairs: Tensor  # (K, 2) the different pairs of the triplets, the lower index first, in order
    active: Tensor  # those of them that have a part in the gradient
    n_active: int  # triplets


def make_problem(row: Row, device: str, seed: int = 0) -> Problem:
    """Embeddings and maps of people: what they have in common, and noise. The maps come out of a rectifier."""
    import otface_cuda

    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    labels = torch.arange(row.batch, device=device) // PER_PERSON
    people = int(labels[-1]) + 1
    embeddings = normal(people, 512)[labels] + NOISE * normal(row.batch, 512)
    common = normal(people, row.channels, row.side, row.side)[labels]
    maps = (SIGNAL * common + normal(row.batch, row.channels, row.side, row.side)).relu_()
    problem = Problem(row, maps, otface_cuda.mine_hard_triplets(embeddings, labels))
    return replace(problem, triplets=problem.triplets[hinges_float64(problem).abs() > CLEAR])


def pairs_of(triplets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different pairs, and which of them are the positive and the negative one of each triplet."""
    listed = torch.cat([triplets[:, [0, 1]], triplets[:, [0, 2]]]).sort(1).values
    pairs, which = listed.unique(dim=0, return_inverse=True)
    return pairs, *which.chunk(2)


def unit_cells(maps: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H W, C), each of length 1."""
    return torch.nn.functional.normalize(maps.flatten(2).mT, dim=2)


def distances_by_scaling(x: Tensor, y: Tensor) -> Tensor:
    """(K, p, d) unit cells -> (K,): <P, C>, by multiplications from b = 1. For autograd."""
    cost = 1 - x @ y.mT
    kernel = (-cost / EPS).exp()
    b = kernel.new_ones(len(cost), cost.shape[2], 1)
    for _ in range(N_ITER):
        a = 1 / (cost.shape[1] * (kernel @ b))
        b = 1 / (cost.shape[2] * (kernel.mT @ a))
    return (a * kernel * b.mT * cost).sum((1, 2))


def hinges_float64(problem: Problem) -> Tensor:
    """D(anchor, positive) - D(anchor, negative) of each triplet."""
    cells = unit_cells(problem.maps.double())
    pairs, positive, negative = pairs_of(problem.triplets)
    found = [distances_by_scaling(cells[part[:, 0]], cells[part[:, 1]]) for part in pairs.split(CHUNK)]
    distances = torch.cat([cells.new_empty(0), *found])
    return distances[positive] - distances[negative]


def solve_float64(problem: Problem) -> Exact:
    """By autograd, some pairs at a time."""
    pairs, positive, negative = pairs_of(problem.triplets)
    hinge = hinges_float64(problem).relu()
    count = int((hinge > 0).sum())
    share = (hinge > 0).double()
    part_in = share.new_zeros(len(pairs)).index_add_(0, positive, share).index_add_(0, negative, -share)
    active, part_in = pairs[part_in != 0], part_in[part_in != 0] / max(1, count)
    leaf = problem.maps.double().requires_grad_()
    grad = torch.zeros_like(leaf)
    for some, shares in zip(active.split(CHUNK), part_in.split(CHUNK), strict=True):
        cells = unit_cells(leaf)
        total = (shares * distances_by_scaling(cells[some[:, 0]], cells[some[:, 1]])).sum()
        grad += torch.autograd.grad(total, leaf)[0]
    return Exact(hinge.sum() / max(1, count), grad, pairs, active, count)


def largest_difference(answer: Answer, exact: Answer) -> dict[str, float]:
    """Of the loss, relative; of the entries of the gradient, relative to the largest."""
    return {
        "loss": float((answer.loss / exact.loss - 1).abs()),
        "grad": float((answer.grad - exact.grad).abs().amax() / exact.grad.abs().amax()),
    }
