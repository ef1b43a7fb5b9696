"""Who is measured: this package, and one adapter for each library it is compared with.

To add a library, write a subclass of ``Peer`` and add an instance to ``PEERS``. ``prepare`` does what a user does once
(convert the inputs, compile) and returns a call that solves the whole problem to the end, synchronously as far as its
device is torch's. What it must return is whatever ``read`` understands; ``read`` is not timed. Rules: float32, the
number of threads of the run, no gradient tracked that is not asked for, the fastest setting that its documentation
gives for the same task. What a library cannot do it says in ``cannot``; it is never given a different task silently.

All weights are uniform. A library that updates g before f gets the transposed cost, which is then the same iteration.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from harness import Library
from problems import Answer, Problem, Row
from torch import Tensor


class Peer(Library, ABC):
    own_streams = False  # on CUDA, torch's events do not see it
    # True: its iteration is another one, from points, so ours is timed at the error it reaches, from the same points;
    # ``read`` then returns its potentials (f, g) instead of an Answer.
    own_schedule = False

    def cannot(self, row: Row, device: str) -> str:
        """Why it cannot do this row, or an empty string."""
        return "needs the cost matrix" if row.from_points else ""

    def iterations(self, row: Row) -> int | None:
        return row.iterations

    def counted(self, row: Row) -> int:
        """How many problems of the batch it solves in a call; if not all, the time is scaled and the table says so."""
        return row.batch

    @abstractmethod
    def prepare(self, problem: Problem) -> Callable[[], Any]:
        """What is timed."""

    @abstractmethod
    def read(self, problem: Problem, result: Any) -> Answer | tuple[Tensor, Tensor]:
        """Its result in our terms."""


def with_gradient(solve: Callable[[Tensor], tuple[Tensor, Tensor]], cost: Tensor) -> Callable[[], Answer]:
    """Torch's autograd through ``solve``, which maps a cost to (transport costs, plan)."""

    def call() -> Answer:
        leaf = cost.detach().requires_grad_()
        transport_cost, plan = solve(leaf)
        (gradient,) = torch.autograd.grad(transport_cost.sum(), leaf)
        return Answer(transport_cost.detach(), plan.detach(), gradient)

    return call


def without_gradient(solve: Callable[[Tensor], tuple[Tensor, Tensor]], cost: Tensor) -> Callable[[], Answer]:
    @torch.no_grad()
    def call() -> Answer:
        return Answer(*solve(cost))

    return call


def head(answer: Answer, count: int) -> Answer:
    gradient = None if answer.gradient is None else answer.gradient[:count]
    return Answer(answer.transport_cost[:count], answer.plan[:count], gradient)


class Ours(Peer):
    name = "otface_cuda"
    label = "otface_cuda"
    module = "otface_cuda"
    package = "otface_cuda"

    def cannot(self, row: Row, device: str) -> str:
        return ""

    def prepare(self, problem: Problem) -> Callable[[], Any]:
        import otface_cuda

        row = problem.row
        if row.from_points:
            return self.prepare_points(problem, row.iterations)
        if not row.backward:
            return lambda: otface_cuda.sinkhorn(problem.cost, row.eps, max_iter=row.iterations)

        def call() -> tuple[Tensor, Tensor]:
            cost = problem.cost.detach().requires_grad_()
            out = otface_cuda.sinkhorn(cost, row.eps, max_iter=row.iterations, grad="unrolled")
            (gradient,) = torch.autograd.grad(out.transport_cost.sum(), cost)
            return out.transport_cost.detach(), gradient

        return call

    def prepare_points(self, problem: Problem, iterations: int) -> Callable[[], Any]:
        import otface_cuda

        return lambda: otface_cuda.sinkhorn_points(
            problem.x, problem.y, problem.row.eps, metric="cosine", max_iter=iterations
        )

    def read(self, problem: Problem, result: Any) -> Answer:
        """The plan is not part of the timed call; a second solve gives it."""
        import otface_cuda

        row, k = problem.row, problem.checked
        out = otface_cuda.sinkhorn(problem.cost[:k], row.eps, max_iter=row.iterations, return_plan=True)
        if row.backward:
            return Answer(result[0][:k], out.plan, result[1][:k])
        return Answer(result.transport_cost[:k], out.plan)


class PotBatch(Peer):
    name = "pot-batch"
    label = "POT batch"
    module = "ot"
    package = "pot"
    note = "ot.batch.solve_batch(method='log_sinkhorn', tol=0), grad='detach' or, with backward, 'autodiff'"

    def prepare(self, problem: Problem) -> Callable[[], Any]:
        import ot.batch

        row = problem.row

        def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
            out = ot.batch.solve_batch(
                cost,
                row.eps,
                max_iter=row.iterations,
                tol=0,  # its test, on every tenth iteration, is then never met: exactly max_iter iterations
                method="log_sinkhorn",
                grad="autodiff" if row.backward else "detach",
            )
            return out.value_linear, out.plan

        return (with_gradient if row.backward else without_gradient)(solve, problem.cost)

    def read(self, problem: Problem, result: Answer) -> Answer:
        return head(result, problem.checked)


class PotLoop(Peer):
    name = "pot-loop"
    label = "POT loop"
    module = "ot"
    package = "pot"
    note = "ot.sinkhorn(method='sinkhorn_log', stopThr=0) on numpy arrays, a Python loop over the batch"
    devices = ("cpu",)

    def cannot(self, row: Row, device: str) -> str:
        if row.backward:
            return "numpy has no gradients"
        if row.n * row.m > 2**20:
            return "one problem takes longer than the whole row"
        return super().cannot(row, device)

    def counted(self, row: Row) -> int:
        return min(row.batch, max(1, 2**16 // (row.n * row.m)))

    def prepare(self, problem: Problem) -> Callable[[], Any]:
        import ot

        row, count = problem.row, self.counted(problem.row)
        costs = problem.cost[:count].mT.contiguous().numpy()  # updates its second potential first

        def call() -> list[Any]:
            plans = [
                ot.sinkhorn([], [], c, row.eps, "sinkhorn_log", numItermax=row.iterations, stopThr=0, warn=False)
                for c in costs
            ]
            return [(plan, (plan * c).sum()) for plan, c in zip(plans, costs, strict=True)]

        return call

    def read(self, problem: Problem, result: list[Any]) -> Answer:
        return Answer(
            torch.tensor([float(value) for _, value in result]),
            torch.stack([torch.from_numpy(plan).mT for plan, _ in result]),
        )


class TorchLoop(Peer):
    name = "torch-loop"
    label = "torch log-sum-exp loop"
    note = "two torch.logsumexp an iteration; with backward, torch's autograd through the loop"

    def prepare(self, problem: Problem) -> Callable[[], Any]:
        row = problem.row

        def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
            scores = -cost / row.eps
            v = cost.new_zeros(cost.shape[0], 1, row.m)
            for _ in range(row.iterations):
                u = -math.log(row.n) - torch.logsumexp(scores + v, 2, keepdim=True)
                v = -math.log(row.m) - torch.logsumexp(scores + u, 1, keepdim=True)
            plan = (scores + u + v).exp()
            return (plan * cost).sum((1, 2)), plan

        return (with_gradient if row.backward else without_gradient)(solve, problem.cost)

    def read(self, problem: Problem, result: Answer) -> Answer:
        return head(result, problem.checked)


class TorchScaling(TorchLoop):
    name = "torch-scaling"
    label = "torch scaling loop"
    note = (
        "exp(-C / eps) once, then two torch.bmm an iteration: what is possible where float32 does not underflow, as in "
        "these rows; not a log-domain solver, it fails at small eps"
    )

    def prepare(self, problem: Problem) -> Callable[[], Any]:
        row = problem.row

        def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
            kernel = torch.exp(-cost / row.eps)
            transposed = kernel.mT
            v = cost.new_ones(cost.shape[0], row.m, 1)
            for _ in range(row.iterations):
                u = (1 / row.n) / torch.bmm(kernel, v)
                v = (1 / row.m) / torch.bmm(transposed, u)
            plan = u * kernel * v.mT
            return (plan * cost).sum((1, 2)), plan

        return (with_gradient if row.backward else without_gradient)(solve, problem.cost)


class GeomLoss(Peer):
    name = "geomloss"
    label = "GeomLoss"
    module = "geomloss"
    package = "geomloss"
    note = (
        "SamplesLoss('sinkhorn', p=2, blur=sqrt(eps), debias=False), its default annealing (scaling=0.5) and no "
        "iteration count; ours: as many iterations from the same points as reach its marginal error"
    )
    own_schedule = True

    def cannot(self, row: Row, device: str) -> str:
        if row.backward:
            return "its gradient holds at convergence only"
        return "needs KeOps at this size" if row.n > 20_000 and not importlib.util.find_spec("pykeops") else ""

    def iterations(self, row: Row) -> int | None:
        return None

    def _loss(self, row: Row, potentials: bool) -> Any:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import geomloss

            # "tensorized" is what it recommends for batches of small problems, "online" (KeOps) for large ones.
            backend = "tensorized" if row.n <= 5000 or not importlib.util.find_spec("pykeops") else "online"
            return geomloss.SamplesLoss(
                "sinkhorn", p=2, blur=math.sqrt(row.eps), debias=False, backend=backend, potentials=potentials
            )

    def prepare(self, problem: Problem) -> Callable[[], Any]:
        loss = self._loss(problem.row, potentials=False)
        return torch.no_grad()(lambda: loss(problem.x, problem.y))

    def read(self, problem: Problem, result: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self._loss(problem.row, potentials=True)(problem.x, problem.y)


class OttJax(Peer):
    name = "ott-jax"
    label = "OTT-JAX"
    module = "ott"
    package = "ott-jax"
    own_streams = True
    note = "jit(vmap(linear.sinkhorn.Sinkhorn)), lse_mode, fixed iteration count; with backward, implicit_diff=None"

    def cannot(self, row: Row, device: str) -> str:
        # By default jax takes most of a GPU's memory for itself when it starts; the others need some.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        if device == "cuda" and jax.default_backend() != "gpu":
            return "the jax installed has no GPU"
        return super().cannot(row, device)

    def prepare(self, problem: Problem) -> Callable[[], Any]:
        import jax
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn

        row = problem.row
        # Equal bounds run a plain scan and compute the error once, at the end. All of it is one inner block, because
        # the count is rounded down to whole blocks, and because the gradient through several blocks (ott-jax 0.6.0) is
        # not the derivative of the iteration: 4 % off for 20 iterations at eps 0.05, exact in one block.
        solver = sinkhorn.Sinkhorn(
            min_iterations=row.iterations,
            max_iterations=row.iterations,
            inner_iterations=row.iterations,
            implicit_diff=None,
        )

        def solve(cost: Any) -> tuple[Any, Any]:
            plan = solver(linear_problem.LinearProblem(geometry.Geometry(cost, epsilon=row.eps))).matrix
            return (plan * cost).sum(), plan

        batched = jax.vmap(jax.value_and_grad(solve, has_aux=True) if row.backward else solve)
        costs = jax.device_put(problem.cost.mT.contiguous().cpu().numpy())  # it updates g first
        compiled = jax.jit(batched).lower(costs).compile()
        return lambda: jax.block_until_ready(compiled(costs))

    def read(self, problem: Problem, result: Any) -> Answer:
        import numpy

        k, device = problem.checked, problem.cost.device

        def to_torch(array: Any) -> Tensor:
            return torch.from_numpy(numpy.array(array[:k])).to(device)

        if problem.row.backward:
            (values, plans), gradients = result
            return Answer(to_torch(values), to_torch(plans).mT, to_torch(gradients).mT)
        values, plans = result
        return Answer(to_torch(values), to_torch(plans).mT)


class FlashSinkhorn(Peer):
    name = "flash-sinkhorn"
    label = "flash-sinkhorn"
    module = "flash_sinkhorn"
    package = "flash-sinkhorn"
    devices = ("cuda",)
    own_schedule = True
    tf32 = True
    note = (
        "SamplesLoss(backend='alternating', half_cost=True), its default otherwise: points rounded to TF32; it loops "
        "over the batch; ours: as many iterations from the same points as reach its marginal error"
    )

    def cannot(self, row: Row, device: str) -> str:
        return "its gradient holds at convergence only" if row.backward else ""

    def counted(self, row: Row) -> int:
        return min(row.batch, 64)

    def _loss(self, row: Row, potentials: bool) -> Any:
        from flash_sinkhorn import SamplesLoss

        return SamplesLoss(
            "sinkhorn",
            backend="alternating",
            use_epsilon_scaling=False,
            eps=row.eps,
            n_iters=row.iterations,
            half_cost=True,
            allow_tf32=self.tf32,
            debias=False,
            potentials=potentials,
        )

    def prepare(self, problem: Problem) -> Callable[[], Any]:
        part = problem.head(self.counted(problem.row))
        loss = self._loss(part.row, potentials=False)
        return torch.no_grad()(lambda: loss(part.x, part.y))

    def read(self, problem: Problem, result: Any) -> tuple[Tensor, Tensor]:
        part = problem.head(self.counted(problem.row))
        with torch.no_grad():
            return self._loss(part.row, potentials=True)(part.x, part.y)


class FlashSinkhornFp32(FlashSinkhorn):
    name = "flash-sinkhorn-fp32"
    label = "flash-sinkhorn fp32"
    tf32 = False
    note = "as flash-sinkhorn, but with allow_tf32=False"


OURS = Ours()
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        PotBatch(),
        TorchLoop(),
        TorchScaling(),
        OttJax(),
        GeomLoss(),
        PotLoop(),
        FlashSinkhorn(),
        FlashSinkhornFp32(),
    )
}
