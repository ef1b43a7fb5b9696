"""`torch.ops.otface.sinkhorn_*` keep torch's rules for operators, and `sinkhorn` works under its transformations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import otface_cuda

from .problems import Problem, random_problem

pytestmark = pytest.mark.either_torch

MODES = ["envelope", "unrolled", "implicit"]
EPS = 0.5


# They look at values and return numbers: tests of their own.
LOOK = ("otface::first_outside", "otface::weights_fault", "otface::look_at_labels")


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an operator of ours that computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.name().startswith("otface::") and op.name() not in LOOK:
            assert not kwargs
            self.calls.append((op, tuple(x.detach() if isinstance(x, Tensor) else x for x in args)))
        return op(*args, **(kwargs or {}))


def combination(out: otface_cuda.SinkhornOutput, grad: str) -> Tensor:
    """A loss in every output that has a gradient."""
    loss = out.value.sum()
    if grad == "envelope":
        return loss
    return loss + out.transport_cost.sum() + out.f.square().sum() + out.g[..., 0].sum() + out.plan.square().sum()


def solve_and_differentiate(problem: Problem, grad: str, **options: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in problem]
    out = otface_cuda.sinkhorn(leaves[0], EPS, *leaves[1:], grad=grad, return_plan=True, max_iter=12, **options)
    return (*(x.detach() for x in out), *torch.autograd.grad(combination(out, grad), leaves))


# What calls the operators with every kind of argument: half types, lengths, a warm start, shared weights, strides.
def callers(device: str) -> list[Callable[[str], Any]]:
    def lengths(grad: str) -> Any:
        problem = random_problem(2, 6, 5, device=device)
        rows = torch.tensor([6, 3], device=device)
        a = problem.a * (torch.arange(6, device=device) < rows[:, None])
        problem = problem._replace(a=a / a.sum(1, keepdim=True))
        init = (torch.zeros_like(problem.a), torch.ones_like(problem.b))
        return solve_and_differentiate(problem, grad, row_lengths=rows, init=init)

    def shared_and_strided(grad: str) -> Any:
        problem = random_problem(1, 6, 5, dtype=torch.bfloat16, device=device)
        cost = problem.cost[0].mT.contiguous().mT.expand(3, 6, 5).requires_grad_()
        out = otface_cuda.sinkhorn(cost, EPS, problem.a[0], problem.b[0], grad=grad, return_plan=True, max_iter=7)
        return torch.autograd.grad(combination(out, grad), cost)

    def uniform(grad: str) -> Any:
        cost = random_problem(2, 6, 5, dtype=torch.float32, device=device).cost.requires_grad_()
        out = otface_cuda.sinkhorn(cost, EPS, grad=grad, return_plan=True, tol=0.1, check_every=1)
        return torch.autograd.grad(combination(out, grad), cost)

    def empty(grad: str) -> Any:
        cost = torch.empty(0, 6, 5, device=device, requires_grad=True)
        return torch.autograd.grad(otface_cuda.sinkhorn(cost, EPS, grad=grad).value.sum(), cost)

    return [lengths, shared_and_strided, uniform, empty]


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("grad", MODES)
def test_opcheck(grad: str, case: int, device: str) -> None:
    """Schemas say what is mutated and aliased, and the fake implementations give the true shapes, types and strides."""
    recorder = Recorder()
    with recorder:
        callers(device)[case](grad)
    names = [op.name() for op, _ in recorder.calls]
    assert names == ["otface::sinkhorn_forward", f"otface::sinkhorn_{grad}_backward"]
    for op, args in recorder.calls:
        utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if args[-2] is True and op.name() == "otface::sinkhorn_forward":
            # This one compares two runs, but the history of rows and iterations that there are not is never written.
            utils.remove("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, args, test_utils=utils)


def test_opcheck_of_what_looks_at_values() -> None:
    """They give numbers, no tensors; a fake implementation finds nothing wrong."""
    a, b, lengths = torch.full((2, 3), 1 / 3), torch.full((4,), 0.25).half().expand(2, 4), torch.tensor([3, 2])
    utils = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.otface.weights_fault, (a, None, b, None, 0.1), test_utils=utils)
    torch.library.opcheck(torch.ops.otface.weights_fault, (b, None, None, None, 0.1), test_utils=utils)
    torch.library.opcheck(torch.ops.otface.first_outside, (lengths, 1.0, 3.0), test_utils=utils)


def test_every_operator_is_checked() -> None:
    """The operators of the pairs are checked in test_points_pairs.py; sinkhorn_kernel has no tensors."""
    ours = {x.name for x in torch._C._jit_get_all_schemas() if x.name.startswith("otface::sinkhorn_")}
    ours -= {"otface::sinkhorn_kernel"}
    checked = {f"otface::sinkhorn_{name}" for name in ("forward", *(f"{grad}_backward" for grad in MODES))}
    assert {name for name in ours if "pairs" not in name} == checked


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """`fullgraph=True`: no graph break. "aot_eager" traces forward and backward, and runs torch's part as it is."""

    @pytest.mark.parametrize("grad", MODES)
    def test_forward_and_backward(self, grad: str, device: str) -> None:
        problem = random_problem(2, 6, 5, device=device)

        def solve(cost: Tensor, a: Tensor, b: Tensor) -> otface_cuda.SinkhornOutput:
            return otface_cuda.sinkhorn(2 * cost, EPS, a, b, grad=grad, return_plan=True, max_iter=12)

        results = []
        for function in (solve, torch.compile(solve, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in problem]
            out = function(*leaves)
            results.append((*(x.detach() for x in out), *torch.autograd.grad(combination(out, grad), leaves)))
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)

    def test_every_option(self, device: str) -> None:
        problem = random_problem(2, 6, 5, dtype=torch.float32, device=device)

        def solve(cost: Tensor, eps: Tensor, tol: Tensor, lengths: Tensor, g: Tensor) -> otface_cuda.SinkhornOutput:
            first = otface_cuda.sinkhorn(cost, eps, max_iter=2, row_lengths=lengths, init=(None, g))
            return otface_cuda.sinkhorn(cost, eps, tol=tol, check_every=1, row_lengths=lengths, init=first)

        arguments = (
            problem.cost,
            torch.tensor([0.1, 1.0], device=device),
            torch.tensor([1e-2, 1e-3], device=device),
            torch.tensor([6, 4], device=device),
            torch.ones(2, 5, device=device),
        )
        compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")(*arguments)
        for x, y in zip(solve(*arguments), compiled, strict=True):
            assert (x is None and y is None) or torch.equal(x, y)

    @pytest.mark.parametrize("grad", MODES)
    def test_dynamic_shapes(self, grad: str, device: str) -> None:
        """One graph for every batch and size, though the history of the iterations depends on them."""

        def solve(cost: Tensor) -> Tensor:
            return otface_cuda.sinkhorn(cost, EPS, grad=grad, max_iter=5).value

        compiled = torch.compile(solve, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch.compiler.set_stance("default"):
            compiled(random_problem(2, 6, 5, device=device).cost.requires_grad_())
        with torch.compiler.set_stance("fail_on_recompile"):
            for shape in ((3, 7, 4), (5, 4, 9)):
                cost = random_problem(*shape, device=device).cost.requires_grad_()
                (gradient,) = torch.autograd.grad(compiled(cost).sum(), cost)
                (expected,) = torch.autograd.grad(solve(cost).sum(), cost)
                assert torch.equal(gradient, expected)

    def test_inductor(self, device: str) -> None:
        """Generated code around the solver: what it reads and writes has the layout that the fakes say."""
        problem = random_problem(2, 6, 5, dtype=torch.float32, device=device)

        def loss(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
            out = otface_cuda.sinkhorn(cost.mT.exp().mT - 1, EPS, a, b, grad="unrolled", max_iter=4, return_plan=True)
            return (out.plan.mT.square().sum((1, 2)) * out.value.sin()).sum()

        results = []
        for function in (loss, torch.compile(loss, fullgraph=True)):
            leaves = [x.clone().requires_grad_() for x in problem]
            results.append(torch.autograd.grad(function(*leaves), leaves))
        # The generated exponential and sine round in another way: some units in the last place.
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)

    def test_module(self, device: str) -> None:
        problem = random_problem(2, 6, 5, device=device)
        compiled = torch.compile(otface_cuda.Sinkhorn(EPS), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*problem).value, problem.solve(EPS).value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("grad", MODES)
def test_autocast_leaves_the_solve_alone(grad: str, dtype: torch.dtype, device: str) -> None:
    problem = random_problem(2, 16, 12, dtype=dtype, device=device)
    plain = solve_and_differentiate(problem, grad)
    with torch.autocast(device, dtype=torch.bfloat16):
        under_autocast = solve_and_differentiate(problem, grad)
    for x, y in zip(under_autocast, plain, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("grad", MODES)
def test_checkpointing(grad: str, device: str) -> None:
    """A forward that torch runs again for the backward gives the same gradient."""
    cost = random_problem(2, 6, 5, device=device).cost.requires_grad_()

    def loss(cost: Tensor) -> Tensor:
        return combination(otface_cuda.sinkhorn(cost, EPS, grad=grad, return_plan=True), grad)

    (expected,) = torch.autograd.grad(loss(cost), cost)
    (actual,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, cost, use_reentrant=False), cost)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("grad", MODES)
def test_backward_twice_through_one_graph(grad: str, device: str) -> None:
    """The saved history is read, not used up."""
    cost = random_problem(2, 6, 5, device=device).cost.requires_grad_()
    loss = combination(otface_cuda.sinkhorn(cost, EPS, grad=grad, return_plan=True), grad)
    (first,) = torch.autograd.grad(loss, cost, retain_graph=True)
    (second,) = torch.autograd.grad(loss, cost)
    assert torch.equal(first, second)


@pytest.mark.parametrize("grad", MODES)
def test_input_changed_after_the_solve(grad: str, device: str) -> None:
    """Backward reads the cost again: torch's version counter must notice, rather than give a wrong gradient."""
    cost = random_problem(2, 6, 5, device=device).cost.requires_grad_()
    out = otface_cuda.sinkhorn(cost, EPS, grad=grad)
    with torch.no_grad():
        cost += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.value.sum().backward()


IMPORTED_BY_THE_FIRST_CALLS = """
import sys, torch
before = set(sys.modules)
import otface_cuda
ours = {name for name in sys.modules if name.split(".")[0] == "otface_cuda"}
print(len(set(sys.modules) - before - ours))
before = set(sys.modules)
points = torch.rand(4, 9, 8, requires_grad=True)
otface_cuda.sinkhorn_pairs(points, torch.tensor([[0, 1], [1, 2]]), 0.1).value.sum().backward()
labels = torch.tensor([0, 0, 1, 1])
maps, embeddings = (torch.rand(4, 8, *cells, requires_grad=True) for cells in ((3, 3), ()))
otface_cuda.OTFaceLoss(2, 8)(embeddings, maps, labels).loss.backward()
otface_cuda.mine_hard_triplets(embeddings, labels, max_triplets=5)
print(len(set(sys.modules) - before))
"""


def test_few_modules_are_imported() -> None:
    """torch's compiler is some 800 modules, and a second of waiting: neither the import nor a call may need it."""
    command = [sys.executable, "-c", IMPORTED_BY_THE_FIRST_CALLS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    by_import, by_calls = map(int, done.stdout.split())
    assert by_import <= 20
    assert by_calls <= 5


@pytest.mark.parametrize("name", ["eps", "tol"])
def test_numbers_that_change_do_not_compile_anew(name: str, fresh_compiler: None) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(otface_cuda.sinkhorn, backend=graphs, fullgraph=True)
    cost = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(4))
    for step in range(12):
        settings = {"eps": 0.3, "tol": 1e-3, "max_iter": 20, name: 0.1 + 0.05 * step}
        for x, y in zip(compiled(cost, **settings), otface_cuda.sinkhorn(cost, **settings), strict=True):
            assert (x is None and y is None) or torch.equal(x, y)
    assert graphs.frame_count <= 2
