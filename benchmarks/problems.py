"""What is measured: the rows of the benchmark, their inputs, and the float64 answers they are held against.

Every input is a batch of clouds of unit vectors x (B, n, d) and y (B, m, d) with uniform weights and the cosine cost
C = 1 - x y^T. For unit vectors this is also |x - y|^2 / 2, so libraries that only know the squared Euclidean cost of
points solve the very same problem as those that take a cost matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DIMENSION = 32  # of the random points: costs from about 0.2 to 1.8, so exp(-C / 0.05) spans 14 powers of ten
CHECKED_ENTRIES = 2**24  # plan entries compared with float64 in each row


@dataclass(frozen=True)
class Row:
    """One row of the table: ``batch`` problems of n x m, solved with ``iterations`` iterations at ``eps``."""

    batch: int
    n: int
    m: int
    eps: float
    iterations: int
    backward: bool = False  # also the gradient of the transport costs in C, through all iterations
    faces: bool = False  # takes its costs from real faces when --faces is given
    from_points: bool = False  # the cost matrix is too large to be an input: solve from x and y

    @property
    def title(self) -> str:
        return (
            f"B={self.batch} {self.n}x{self.m}, eps {self.eps:g}, {self.iterations} iterations, "
            f"{'forward + backward' if self.backward else 'forward'}"
        )


_FACE_ROWS = [
    Row(256, 49, 49, 0.05, 100, faces=True),
    Row(256, 49, 49, 1.0, 10, faces=True),
    Row(256, 49, 49, 0.05, 100, backward=True, faces=True),
    Row(256, 49, 49, 1.0, 10, backward=True, faces=True),
]
ROWS = {
    "cpu": [*_FACE_ROWS, Row(16, 256, 256, 0.05, 100), Row(1, 2048, 2048, 0.05, 100)],
    "cuda": [
        *[replace(row, batch=4096) for row in _FACE_ROWS],
        Row(256, 224, 224, 0.05, 100),  # one problem fills the shared memory of a block
        Row(8, 2048, 2048, 0.05, 100),
        Row(8, 2048, 2048, 0.05, 100, backward=True),
        Row(1, 10_000, 10_000, 0.05, 100, from_points=True),
        Row(1, 50_000, 50_000, 0.05, 100, from_points=True),
    ],
}


def quick_rows(device: str) -> list[Row]:
    """Small rows that touch every code path, for a smoke test; their figures mean little."""
    small = [replace(row, batch=32) for row in ROWS[device] if row.n == 49] + [Row(2, 256, 256, 0.05, 20)]
    return [*small, Row(1, 500, 500, 0.05, 20, from_points=True)] if device == "cuda" else small


@dataclass
class Problem:
    row: Row
    x: Tensor  # (B, n, d) unit vectors, float32
    y: Tensor  # (B, m, d)
    cost: Tensor | None  # (B, n, m), None when the row solves from points

    @property
    def checked(self) -> int:
        """How many problems of the batch are compared with float64."""
        return min(self.row.batch, max(1, CHECKED_ENTRIES // (self.row.n * self.row.m)))

    def head(self, count: int) -> Problem:
        """The first problems of the batch."""
        count = min(count, self.row.batch)
        cost = None if self.cost is None else self.cost[:count]
        return Problem(replace(self.row, batch=count), self.x[:count], self.y[:count], cost)


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    return 1 - x @ y.mT


def make_problem(row: Row, device: str, points: tuple[Tensor, Tensor] | None = None, seed: int = 0) -> Problem:
    """The problem of a row, from given unit vectors (B, n, d) and (B, m, d) or from random ones."""
    if points is None:
        generator = torch.Generator().manual_seed(seed)
        points = tuple(
            torch.nn.functional.normalize(torch.randn(row.batch, size, DIMENSION, generator=generator), dim=-1)
            for size in (row.n, row.m)
        )
    x, y = (p.to(device) for p in points)
    return Problem(row, x, y, None if row.from_points else cosine_cost(x, y))


@dataclass
class Answer:
    """What a contender returned for the first problems of a batch, for the comparison with float64."""

    transport_cost: Tensor  # (k,)  <P, C>
    plan: Tensor  # (k, n, m)
    gradient: Tensor | None = None  # (k, n, m)  of the sum of the transport costs in C


def solve_float64(problem: Problem) -> Answer:
    """The float64 answer after exactly the row's iterations.

    Here the iteration is written with exponentials taken once, u = 1 / K (v b), v = 1 / K^T (u a). In float64 that is
    the log-domain iteration up to rounding as long as the range of C / eps stays far below 700, and it needs seconds
    where float64 log-sum-exps need minutes. A test holds it against ``otface_cuda.reference``.
    """
    row = problem.row
    cost = problem.cost.double().requires_grad_(row.backward)
    if float(cost.detach().amax() - cost.detach().amin()) > 300 * row.eps:
        raise ValueError(f"solve_float64: the range of the cost is too large for eps = {row.eps}")
    kernel = torch.exp(-cost / row.eps)
    v = cost.new_ones(cost.shape[0], row.m, 1)
    for _ in range(row.iterations):
        u = row.m / (kernel @ v)
        v = row.n / (kernel.mT @ u)
    plan = u * kernel * v.mT / (row.n * row.m)
    transport_cost = (plan * cost).sum((1, 2))
    gradient = torch.autograd.grad(transport_cost.sum(), cost)[0] if row.backward else None
    return Answer(transport_cost.detach(), plan.detach(), gradient)


def largest_difference(answer: Answer, exact: Answer) -> dict[str, float]:
    """Largest differences from float64: of the transport costs, relative; of the entries of plan and gradient.

    An entry's difference is relative to the largest entry of its own problem.
    """
    k = answer.transport_cost.shape[0]

    def of_entries(ours: Tensor, theirs: Tensor) -> float:
        theirs = theirs[:k]
        return float(((ours - theirs).abs().amax((1, 2)) / theirs.abs().amax((1, 2))).max())

    differences = {
        "transport_cost": float((answer.transport_cost / exact.transport_cost[:k] - 1).abs().max()),
        "plan": of_entries(answer.plan, exact.plan),
    }
    if exact.gradient is not None:
        differences["gradient"] = of_entries(answer.gradient, exact.gradient)
    return differences


def plan_error(plan: Tensor) -> float:
    """Mean over the problems of |P 1 - a|_1 + |P^T 1 - b|_1, for uniform a and b of mass 1."""
    _, n, m = plan.shape
    plan = plan.double()
    return float(((plan.sum(2) - 1 / n).abs().sum(1) + (plan.sum(1) - 1 / m).abs().sum(1)).mean())


def potentials_error(problem: Problem, f: Tensor, g: Tensor) -> float:
    """The same from potentials (of at least these problems), in float64, a slice of a plan at a time."""
    row, errors = problem.row, []
    for x, y, f1, g1 in zip(problem.x.double(), problem.y.double(), f.double(), g.double(), strict=False):
        columns, rows_off = torch.zeros_like(g1), 0.0
        for part in torch.arange(row.n, device=x.device).split(max(1, CHECKED_ENTRIES // row.m)):
            plan = torch.exp((f1[part, None] + g1 - cosine_cost(x[part], y)) / row.eps) / (row.n * row.m)
            columns += plan.sum(0)
            rows_off += float((plan.sum(1) - 1 / row.n).abs().sum())
        errors.append(rows_off + float((columns - 1 / row.m).abs().sum()))
    return sum(errors) / len(errors)
