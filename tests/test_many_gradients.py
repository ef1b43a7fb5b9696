"""Many gradients in one call, by vmap (`is_grads_batched`, `jacobian(vectorize=True)`), are those of a loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.utils._pytree import tree_leaves

import otface_cuda
from otface_cuda import SinkhornOutput

from .problems import random_problem

MODES = ["envelope", "unrolled", "implicit"]
METRICS = ["cosine", "sqeuclidean", "euclidean"]
EPS, N_ITER = 0.5, 60
every_mode = pytest.mark.parametrize("grad", MODES)
every_metric = pytest.mark.parametrize("metric", METRICS)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def rand(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def differentiable(out: SinkhornOutput, grad: str) -> tuple[Tensor, ...]:
    if grad == "envelope":
        return (out.value,)
    outputs = out.value, out.transport_cost, out.f, out.g
    return outputs if out.plan is None else (*outputs, out.plan)


def check(function: Function, *inputs: Tensor) -> None:
    """Also where a graph of the gradients is wanted.

    Each is computed by itself, but for matrix products, which vmap may do at once: sums of at most 16 terms in another
    order.
    """
    expected = tree_leaves(jacobian(function, inputs))
    for create_graph in (False, True):
        actual = tree_leaves(jacobian(function, inputs, vectorize=True, create_graph=create_graph))
        for x, y in zip(actual, expected, strict=True):
            atol = 16 * torch.finfo(y.dtype).eps * y.abs().max().item()
            torch.testing.assert_close(x.detach(), y, rtol=0, atol=atol)
            assert (x != 0).any()


@every_mode
def test_sinkhorn(grad: str, device: str) -> None:
    problem = random_problem(2, 4, 5, device=device)

    def solve(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        out = otface_cuda.sinkhorn(cost, EPS, a, b, max_iter=N_ITER, grad=grad, return_plan=True)
        return differentiable(out, grad)

    check(solve, *problem)


@every_mode
def test_unbatched_with_lengths_of_another(grad: str, device: str) -> None:
    cost = rand(4, 5, device=device)
    lengths = {name: torch.tensor(3, device=device) for name in ("row_lengths", "col_lengths")}

    def solve(cost: Tensor) -> tuple[Tensor, ...]:
        return differentiable(otface_cuda.sinkhorn(cost, EPS, max_iter=N_ITER, grad=grad, **lengths), grad)

    check(solve, cost)


@every_metric
@every_mode
def test_points(grad: str, metric: str, device: str) -> None:
    def solve(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        out = otface_cuda.sinkhorn_points(x, y, EPS, metric=metric, max_iter=N_ITER, grad=grad)
        return differentiable(out, grad)

    check(solve, rand(2, 4, 3, device=device), rand(2, 5, 3, device=device, seed=1))


@every_metric
@every_mode
def test_pairs(grad: str, metric: str, device: str) -> None:
    pairs = torch.tensor([[0, 1], [2, 3], [0, 1]], device=device)

    def solve(features: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        out = otface_cuda.sinkhorn_pairs(features, pairs, EPS, a.softmax(-1), metric=metric, max_iter=N_ITER, grad=grad)
        return differentiable(out, grad)

    check(solve, rand(4, 5, 3, device=device), rand(3, 5, device=device, seed=1))


@every_mode
def test_batched_cotangents(grad: str, device: str) -> None:
    problem = random_problem(2, 4, 5, device=device)
    cost = problem.cost.requires_grad_()
    value = otface_cuda.sinkhorn(cost, EPS, problem.a, problem.b, max_iter=N_ITER, grad=grad).value
    incoming = rand(3, 2, device=device, seed=2)
    (actual,) = torch.autograd.grad(value, cost, incoming, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(value, cost, x, retain_graph=True)[0] for x in incoming]
    assert torch.equal(actual, torch.stack(expected))


@pytest.mark.filterwarnings("ignore::otface_cuda.ConvergenceWarning")
def test_an_implicit_gradient_that_is_not_found(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in its problem, as in a loop; the warning cannot be given."""
    monkeypatch.setenv("OTFACE_CHECK", "1")
    cost = rand(300, 4, 4, device=device)
    cost[:, :2, 2:] = cost[:, 2:, :2] = math.inf  # singular: see test_gradients.py
    cost = torch.cat([cost, rand(1, 4, 4, device=device)]).requires_grad_()
    f = otface_cuda.sinkhorn(cost, EPS, grad="implicit").f[:, 0].sum()
    (expected,) = torch.autograd.grad(f, cost, retain_graph=True)
    incoming = torch.ones(2, dtype=torch.float64, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (actual,) = torch.autograd.grad(f, cost, incoming, is_grads_batched=True)
    for x in actual:
        torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
    assert actual[:, :300].isnan().all()
    assert actual[:, 300].isfinite().all()


@pytest.mark.parametrize(
    "margin", [otface_cuda.ArcFace(0.3), otface_cuda.CosFace(0.3), otface_cuda.SphereFace(2)], ids=str
)
class TestMargins:
    LABELS = (0, 1, 2, 2)

    def test_logits(self, margin: otface_cuda.Margin, device: str) -> None:
        labels = torch.tensor(self.LABELS, device=device)

        def logits(x: Tensor, weight: Tensor) -> Tensor:
            return otface_cuda.cosine_margin_logits(x, weight, labels, margin=margin, scale=8.0)

        check(logits, rand(4, 3, device=device), rand(5, 3, device=device, seed=1))

    @pytest.mark.parametrize("store_logits", [False, True])
    def test_loss(self, margin: otface_cuda.Margin, store_logits: bool, device: str) -> None:
        labels = torch.tensor(self.LABELS, device=device)

        def loss(x: Tensor, weight: Tensor) -> Tensor:
            return otface_cuda.margin_softmax_loss(
                x, weight, labels, margin=margin, scale=8.0, reduction="none", store_logits=store_logits
            )

        check(loss, rand(4, 3, device=device), rand(5, 3, device=device, seed=1))


@every_metric
def test_otface_loss(metric: str, device: str) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    head = otface_cuda.OTFaceLoss(3, 3, metric=metric, device=device, dtype=torch.float64)

    def losses(embeddings: Tensor, maps: Tensor) -> Tensor:
        out = head(embeddings, maps, labels)
        assert out.n_active > 0
        return out.margin_loss + torch.stack([out.ot_loss, -out.ot_loss])

    check(losses, rand(6, 3, device=device) - 0.5, rand(6, 4, 2, 2, device=device, seed=1))
