"""On a GPU: the caller's stream, no waiting, several streams at a time, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import otface_cuda

from .problems import random_problem

pytestmark = [pytest.mark.either_torch, pytest.mark.parametrize("device", ["cuda"], indirect=True)]

# One size for each tier on most GPUs, in float32: registers, shared memory, global memory.
SIZES = [(49, 49), (150, 130), (400, 300)]
GRADS = [None, "envelope", "unrolled", "implicit"]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
each_grad = pytest.mark.parametrize("grad", GRADS, ids=str)


def costs(count: int, size: tuple[int, int], device: str) -> list[Tensor]:
    return [random_problem(5, *size, seed=seed, dtype=torch.float32, device=device).cost for seed in range(count)]


def solve(cost: Tensor, grad: str | None) -> list[Tensor]:
    """All outputs, and, if asked for, the gradient in the cost."""
    leaf = cost.detach().requires_grad_(grad is not None)
    out = otface_cuda.sinkhorn(leaf, 0.2, max_iter=20, tol=1e-6, grad=grad or "envelope", return_plan=True)
    if grad is None:
        return list(out)
    of = out.value if grad == "envelope" else out.transport_cost
    return [*(x.detach() for x in out), *torch.autograd.grad(of.sum(), leaf)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Torch's own calls that wait for the GPU are errors."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def busy(device: str) -> None:
    """Some milliseconds of work on the current stream."""
    x = torch.rand(4096, 4096, device=device)
    for _ in range(10):
        x = x @ x
        x = x / x.amax()


def capture(work: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The work as a graph, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # what is done once, the first time, is no part of a graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


@each_grad
@each_size
def test_a_graph_replays_on_new_inputs(size: tuple[int, int], grad: str | None, device: str) -> None:
    first, *others = costs(4, size, device)
    expected = [solve(cost, grad) for cost in others]
    cost = first.clone()
    graph, results = capture(lambda: solve(cost, grad))
    for k in (0, 1, 2, 1):
        cost.copy_(others[k])
        graph.replay()
        assert_same_bits(results, expected[k])


def test_a_graph_of_points_and_pairs(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(6, 49, 16, generator=generator).to(device) for _ in range(3)]
    x = inputs[0].clone()

    def work() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = otface_cuda.sinkhorn_points(leaf[:3], leaf[3:], 0.5, max_iter=10, grad="unrolled")
        return [out.transport_cost.detach(), *torch.autograd.grad(out.transport_cost.sum(), leaf)]

    expected = []
    for given in inputs:
        x.copy_(given)
        expected.append(work())
    graph, results = capture(work)
    for given, known in zip(inputs, expected, strict=True):
        x.copy_(given)
        graph.replay()
        assert_same_bits(results, known)


@each_grad
@each_size
def test_the_host_does_not_wait(size: tuple[int, int], grad: str | None, device: str) -> None:
    (cost,) = costs(1, size, device)
    solve(cost, grad)
    with no_waiting():
        solve(cost, grad)


def test_the_host_does_not_wait_for_points_and_pairs(device: str) -> None:
    features = torch.rand(4, 49, 16, device=device, requires_grad=True)
    pairs = torch.tensor([[0, 1], [1, 2], [3, 0]], device=device)

    def work() -> None:
        out = otface_cuda.sinkhorn_points(features[:2], features[2:], 0.5, max_iter=5, grad="unrolled")
        more = otface_cuda.sinkhorn_pairs(features, pairs, 0.5, max_iter=5, grad="unrolled")
        (out.transport_cost.sum() + more.transport_cost.sum()).backward()

    work()  # the first time, libraries are loaded
    with no_waiting():
        work()


@each_grad
@each_size
def test_it_runs_on_the_stream_of_its_caller(size: tuple[int, int], grad: str | None, device: str) -> None:
    """The inputs are ready only after some milliseconds, on a stream that no other stream waits for."""
    (ready,) = costs(1, size, device)
    expected = solve(ready, grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cost = torch.zeros_like(ready)
        busy(device)
        cost.copy_(ready)
        results = solve(cost, grad)
    stream.synchronize()
    assert_same_bits(results, expected)


@each_grad
@each_size
def test_several_streams_at_a_time(size: tuple[int, int], grad: str | None, device: str) -> None:
    """The blocks of a launch for a large problem wait for one another: those of two launches must not keep each other
    from the GPU.
    """
    given = costs(4, size, device)
    expected = [solve(cost, grad) for cost in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    for _ in range(5):
        results = []
        for stream, cost in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                results.append(solve(cost, grad))
        torch.cuda.synchronize()
        for result, known in zip(results, expected, strict=True):
            assert_same_bits(result, known)


@each_size
def test_a_graph_beside_other_streams(size: tuple[int, int], device: str) -> None:
    one, other = costs(2, size, device)
    expected = [solve(one, "unrolled"), solve(other, "unrolled")]
    graph, results = capture(lambda: solve(one, "unrolled"))
    stream = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(stream):
            beside = solve(other, "unrolled")
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(results, expected[0])
        assert_same_bits(beside, expected[1])


@each_grad
@each_size
def test_the_same_bits_each_time(size: tuple[int, int], grad: str | None, device: str) -> None:
    (cost,) = costs(1, size, device)
    expected = solve(cost, grad)
    for _ in range(10):
        assert_same_bits(solve(cost, grad), expected)


@each_size
def test_a_device_that_is_not_the_current_one(size: tuple[int, int], device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (cost,) = costs(1, size, device)
    expected = [x.cpu() for x in solve(cost, "unrolled")]
    assert_same_bits([x.cpu() for x in solve(cost.to("cuda:1"), "unrolled")], expected)
    assert torch.cuda.current_device() == 0
