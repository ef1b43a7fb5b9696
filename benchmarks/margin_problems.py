"""What the margin benchmark measures: its rows, their inputs, and the float64 answers they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

MARGIN = 0.5  # of ArcFace, in radians
SCALE = 64.0
CHUNK_BYTES = 2**27  # of one (B, chunk) tensor of the float64 answer
TARGET_COSINES = (0.3, 0.9)  # of x with its own class: the middle of a training, where most rows still learn


@dataclass(frozen=True)
class Row:
    """One row of the table: loss and gradients of ``batch`` embeddings of ``dimension`` over ``classes``."""

    batch: int
    classes: int
    dimension: int
    dtype: str = "float32"  # of the products; bfloat16: under autocast, weight and x stay float32
    target: float | None = None  # percent of the matrix-product rate that we want

    @property
    def title(self) -> str:
        autocast = "" if self.dtype == "float32" else f", autocast to {self.dtype}"
        return f"B={self.batch} C={self.classes:,} d={self.dimension}{autocast}"

    @property
    def weight_bytes(self) -> int:
        """Of the weight, and of its gradient."""
        return 4 * self.classes * self.dimension

    @property
    def logits_bytes(self) -> int:
        return 4 * self.batch * self.classes

    def flops(self, products: int) -> int:
        """Of so many products between x, weight and logits."""
        return 2 * products * self.batch * self.classes * self.dimension


TARGET_BYTES = 64e6  # beyond weight, its gradient and x, at any B and C, on a CPU
SIZES = ((64, 256, 1024), (1000, 10_000, 100_000, 1_000_000), (128, 512))


def rows_for(device: str) -> list[Row]:
    grid = [
        Row(*size, target=85 if (device, size) == ("cpu", (256, 100_000, 512)) else None) for size in product(*SIZES)
    ]
    grid.sort(key=lambda row: row.classes)  # the last ones take minutes
    if device == "cpu":
        return grid
    return grid + [Row(4096, c, 512, dtype) for c in (1_000_000, 10_000_000) for dtype in ("float32", "bfloat16")]


def quick_rows(device: str) -> list[Row]:
    """Small rows that touch every code path, for a smoke test; their figures mean little."""
    small = [Row(16, 1000, 32), Row(32, 5000, 64, target=85)]
    return [*small, Row(32, 5000, 64, "bfloat16")] if device == "cuda" else small


@dataclass
class Problem:
    row: Row
    x: Tensor  # (B, d)
    weight: Tensor  # (C, d)
    labels: Tensor  # (B,)


def make_problem(row: Row, device: str, seed: int = 0) -> Problem:
    """Random directions; each x turned towards the weight of its class, and as long as a network's output would be."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = normal(row.classes, row.dimension).mul_(0.01)
    labels = torch.randint(row.classes, (row.batch,), generator=generator, device=device)
    cosines = torch.empty(row.batch, 1, device=device).uniform_(*TARGET_COSINES, generator=generator)
    towards = functional.normalize(weight[labels])
    across = normal(row.batch, row.dimension)
    across = functional.normalize(across - (across * towards).sum(1, keepdim=True) * towards)
    x = (cosines * towards + (1 - cosines**2).sqrt() * across) * row.dimension**0.5
    return Problem(row, x, weight, labels)


def arcface_logits(cos: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """In place: the logits from the cosines, with the margin where row ``rows[i]`` meets its class ``labels[i]``.

    As insightface writes it, the arc cosine of the target, but with the exact gradient: there it is taken without one.
    """
    theta = cos[rows, labels].clamp(-1, 1).arccos()
    cos[rows, labels] = (theta + MARGIN).cos()
    return cos * SCALE


@dataclass
class Answer:
    """The mean loss and its gradients."""

    loss: Tensor
    grad_x: Tensor
    grad_weight: Tensor


def solve_float64(problem: Problem) -> Answer:
    """The naive head in float64, differentiated by autograd, over chunks of classes so that it fits at any size.

    First the log-sum-exp of each row over all chunks; then the gradient of each chunk's logits is known, and autograd
    takes it to x and to the chunk's weights.
    """
    x = problem.x.double().requires_grad_()
    B = len(x)
    chunk = max(1, CHUNK_BYTES // (8 * B))

    def logits_of(start: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the classes from start; and which row meets which class there."""
        here = (problem.labels >= start) & (problem.labels < start + len(weight))
        rows = here.nonzero().squeeze(1)
        inside = problem.labels[rows] - start
        return (
            arcface_logits(functional.linear(functional.normalize(x), functional.normalize(weight)), rows, inside),
            rows,
            inside,
        )

    parts = list(enumerate(problem.weight.split(chunk)))
    log_sum = x.new_full((B,), -torch.inf)
    target = x.new_empty(B)
    with torch.no_grad():
        for i, part in parts:
            logits, rows, inside = logits_of(i * chunk, part.double())
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
            target[rows] = logits[rows, inside]
    grad_x = torch.zeros_like(x)
    grad_weight = torch.empty_like(problem.weight)
    for i, part in parts:
        leaf = part.double().requires_grad_()
        logits, rows, inside = logits_of(i * chunk, leaf)
        grad_logits = (logits.detach() - log_sum[:, None]).exp_()
        grad_logits[rows, inside] -= 1
        to_x, to_weight = torch.autograd.grad(logits, (x, leaf), grad_logits.div_(B))
        grad_x += to_x
        grad_weight[i * chunk : i * chunk + len(part)] = to_weight
    return Answer((log_sum - target).mean(), grad_x, grad_weight)


def largest_difference(answer: Answer, exact: Answer) -> dict[str, float]:
    """Of the loss, relative; of the entries of a gradient, relative to its largest. In slices, as it may be large."""

    def of_entries(ours: Tensor, theirs: Tensor) -> float:
        pairs = list(zip(ours.split(2**16), theirs.split(2**16), strict=True))
        largest = torch.stack([b.abs().amax() for _, b in pairs]).amax()
        return float(torch.stack([(a - b).abs().amax() for a, b in pairs]).amax() / largest)

    return {
        "loss": float((answer.loss / exact.loss - 1).abs()),
        "grad_x": of_entries(answer.grad_x, exact.grad_x),
        "grad_weight": of_entries(answer.grad_weight, exact.grad_weight),
    }
