"""`torch.ops.otface.margin_*` keep torch's rules for operators, and the functions work under its transformations,
without a (B, C) tensor where none is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

import otface_cuda
from otface_cuda.margins import ArcFace, CombinedMargin, SphereFace

from .margin_problems import MarginProblem, gradients, random_margin_problem
from .problems import has_cuda_kernels
from .test_operators import Recorder

pytestmark = pytest.mark.either_torch

SETTINGS: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 16.0}
FUNCTIONS = ["cosine_margin_logits", "margin_softmax_loss"]
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"store_logits": False},
        {"label_smoothing": 0.1, "class_weight": torch.linspace(0.1, 2, 70, dtype=torch.float64), "chunk_bytes": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_function
def test_opcheck(function: str, dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    """Schemas say what is mutated and aliased, and the fake implementations give the true shapes, types and strides."""
    if function == "cosine_margin_logits" and options:
        pytest.skip("has no options")
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    recorder = Recorder()
    with recorder:
        gradients(
            getattr(otface_cuda, function),
            random_margin_problem(5, 70, 4, dtype=dtype, device=device),
            **SETTINGS,
            **options,
        )
    name = "logits" if function == "cosine_margin_logits" else "softmax"
    assert [op.name() for op, _ in recorder.calls] == [f"otface::margin_{name}_{x}" for x in ("forward", "backward")]
    for op, args in recorder.calls:
        torch.library.opcheck(op, args)
        if op.name().endswith("backward"):  # and what is asked for in part
            for wanted in ((True, False), (False, True)):
                torch.library.opcheck(op, (*args[:-2], *wanted))


def test_every_operator_is_checked() -> None:
    ours = {x.name for x in torch._C._jit_get_all_schemas() if x.name.startswith("otface::margin_")}
    assert ours == {f"otface::margin_{name}_{x}" for name in ("logits", "softmax") for x in ("forward", "backward")}


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """`fullgraph=True`: no graph break. "aot_eager" traces forward and backward, and runs torch's part as it is."""

    @every_function
    def test_forward_and_backward(self, function: str, device: str) -> None:
        problem = random_margin_problem(5, 70, 4, device=device)

        def solve(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return getattr(otface_cuda, function)(2 * x, weight, labels, **SETTINGS)

        compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
        for x, y in zip(gradients(compiled, problem), gradients(solve, problem), strict=True):
            assert torch.equal(x, y)

    def test_every_option(self, device: str) -> None:
        problem = random_margin_problem(5, 70, 4, dtype=torch.float32, device=device)
        u = torch.linspace(0.1, 2, 70, device=device)

        def solve(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return otface_cuda.margin_softmax_loss(
                x, weight, labels, margin=SphereFace(2.0), scale=8.0, reduction="sum", ignore_index=3,
                label_smoothing=0.2, class_weight=u, store_logits=True, chunk_bytes=1,
            )  # fmt: skip

        compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
        for x, y in zip(gradients(compiled, problem), gradients(solve, problem), strict=True):
            assert torch.equal(x, y)

    @every_function
    def test_dynamic_shapes(self, function: str, device: str) -> None:
        def solve(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return getattr(otface_cuda, function)(x, weight, labels, **SETTINGS)

        compiled = torch.compile(solve, fullgraph=True, backend="aot_eager", dynamic=True)
        gradients(compiled, random_margin_problem(5, 70, 4, device=device))
        with torch.compiler.set_stance("fail_on_recompile"):
            for shape in ((6, 90, 7), (9, 65, 3)):
                problem = random_margin_problem(*shape, device=device)
                for x, y in zip(gradients(compiled, problem), gradients(solve, problem), strict=True):
                    assert torch.equal(x, y)

    def test_module(self, device: str) -> None:
        problem = random_margin_problem(5, 70, 4, dtype=torch.float32, device=device)
        module = otface_cuda.MarginSoftmaxLoss(70, 4, device=device)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(problem.x, problem.labels), module(problem.x, problem.labels))

    @every_function
    def test_numbers_that_change(self, function: str, device: str) -> None:
        """One graph for the first, one for all others, and results that follow them."""
        problem = random_margin_problem(5, 70, 4, device=device)

        def solve(x: Tensor, weight: Tensor, labels: Tensor, numbers: tuple[float, ...]) -> Tensor:
            scale, m1, m2, m3, smoothing = numbers
            options = {"label_smoothing": smoothing} if function == "margin_softmax_loss" else {}
            margin = CombinedMargin(m1, m2, m3)
            return getattr(otface_cuda, function)(x, weight, labels, margin=margin, scale=scale, **options)

        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(solve, fullgraph=True, backend=graphs)
        for k in range(20):
            numbers = (10 + 0.3 * k, 1 + 0.01 * k, 0.02 * k + 0.1, 0.01 * k + 0.1, 0.02 * k + 0.01)
            for x, y in zip(
                gradients(compiled, problem, numbers=numbers), gradients(solve, problem, numbers=numbers), strict=True
            ):
                assert torch.equal(x, y)
        assert graphs.frame_count <= 2

    def test_a_wrong_label_is_nan_in_its_row(self, device: str) -> None:
        """Nobody looks at values while tracing: what comes of them then is what comes of them on a GPU."""
        problem = random_margin_problem(5, 70, 4, device=device)
        problem.labels[[1, 3]] = torch.tensor([70, -5], device=device)

        def losses(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = otface_cuda.cosine_margin_logits(x, weight, labels, **SETTINGS)
            return logits, otface_cuda.margin_softmax_loss(x, weight, labels, reduction="none", **SETTINGS)

        x = problem.x.clone().requires_grad_()
        logits, loss = torch.compile(losses, fullgraph=True, backend="aot_eager")(x, problem.weight, problem.labels)
        wrong = torch.tensor([False, True, False, True, False], device=device)
        assert torch.equal(loss.isnan(), wrong)
        assert torch.equal(logits.isnan(), wrong[:, None].expand(-1, 70))
        for out in (logits, loss):
            (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
            assert torch.equal(grad.isnan().any(1), wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_function
def test_autocast(function: str, dtype: torch.dtype, device: str) -> None:
    """On the CPU nothing changes. An embedding of the half type goes with weights in float32, in either order."""
    problem = random_margin_problem(5, 70, 16, dtype=dtype, device=device)
    plain = gradients(getattr(otface_cuda, function), problem, **SETTINGS)
    with torch.autocast(device, dtype=torch.bfloat16):
        under_autocast = gradients(getattr(otface_cuda, function), problem, **SETTINGS)
        mixed = gradients(getattr(otface_cuda, function), problem._replace(weight=problem.weight.float()), **SETTINGS)
        other = gradients(getattr(otface_cuda, function), problem._replace(x=problem.x.float()), **SETTINGS)
    for x, y in zip(under_autocast, plain, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y) or has_cuda_kernels(device)
    half = torch.finfo(torch.bfloat16).eps
    for out, dtypes in ((mixed, (dtype, torch.float32)), (other, (torch.float32, dtype))):
        assert out[0].dtype == torch.float32
        assert (out[1].dtype, out[2].dtype) == dtypes
        for x, y in zip(out, plain, strict=True):
            torch.testing.assert_close(x.float(), y.float(), rtol=2 * half, atol=2 * half * y.abs().max().item())


@every_function
def test_second_derivatives_are_refused(function: str, device: str) -> None:
    x, weight, labels = random_margin_problem(5, 7, 4, device=device)
    x.requires_grad_()
    out = getattr(otface_cuda, function)(x, weight, labels, **SETTINGS).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{function}: second derivatives are not computed"):
        torch.autograd.grad(grad.sum(), x)


@every_function
def test_input_changed_after_the_forward(function: str, device: str) -> None:
    """Backward reads the weights again: torch's version counter must notice, rather than give a wrong gradient."""
    x, weight, labels = random_margin_problem(5, 7, 4, device=device)
    weight.requires_grad_()
    out = getattr(otface_cuda, function)(x, weight, labels, **SETTINGS).sum()
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
@every_function
def test_one_gradient_alone(function: str, wanted: tuple[bool, bool], device: str) -> None:
    problem = random_margin_problem(5, 70, 4, device=device)
    everything = gradients(getattr(otface_cuda, function), problem, **SETTINGS)
    inputs = [v.clone().requires_grad_(want) for v, want in zip(problem[:2], wanted, strict=True)]
    out = getattr(otface_cuda, function)(*inputs, problem.labels, **SETTINGS)
    assert torch.equal(out, everything[0])
    assert out.requires_grad == any(wanted)
    if any(wanted):
        cotangent = torch.rand(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
        out.backward(cotangent.to(out))
        for x, want, expected in zip(inputs, wanted, everything[1:], strict=True):
            assert torch.equal(x.grad, expected) if want else x.grad is None


def allocations(function: Any, problem: MarginProblem, **options: Any) -> list[int]:
    """The bytes of every allocation of torch in forward and backward, and of every release, which are negative."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        x, weight = (v.requires_grad_() for v in problem[:2])
        function(x, weight, problem.labels, **SETTINGS, **options).sum().backward()
    return [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]


@pytest.mark.parametrize("fused", [True, False])
def test_no_large_tensor_is_allocated(fused: bool) -> None:
    """The loss of 200,000 classes: nothing as large as the logits, and 64 MB beside the gradient of the weights.

    The logits, which are that large, show that these would be noticed.
    """
    batch, classes, size = 256, 200_000, 128
    problem = random_margin_problem(batch, classes, size, dtype=torch.float32)
    function = otface_cuda.margin_softmax_loss if fused else otface_cuda.cosine_margin_logits
    sizes = allocations(function, problem)
    logits, gradient = 4 * batch * classes, 4 * classes * size
    assert max(sizes) >= gradient  # they are seen at all
    assert (max(sizes) < logits) == fused
    peak = torch.tensor(sizes).cumsum(0).max().item()
    assert (peak <= gradient + 64e6) == fused
