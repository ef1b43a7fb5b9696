"""Every drop-in replacement under torch.compile: in one graph, or with a graph that ends where the data decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from otface_cuda.compat import insightface, layers, metric_learning, otface, pot

pytestmark = pytest.mark.usefixtures("fresh_compiler")
Call = Callable[..., tuple[Tensor, ...]]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(*shape: int) -> Tensor:
    return F.softmax(rand(*shape, seed=5), dim=-1)


M, A, B = rand(2, 4, 5), weights(2, 4), weights(2, 5)
X, Y = rand(3, 6, 2), rand(3, 7, 2, seed=1)
EMBEDDINGS, LABELS = rand(6, 3) - 0.5, torch.tensor([0, 0, 1, 1, 2, 2])
COSINES = 2 * rand(6, 4) - 1
MAPS = rand(6, 4, 3, 3)


def solve_batch(**options: Any) -> Call:
    def call(M: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        result = pot.solve_batch(M, 0.3, a, b, 15, **options)
        return result.value, result.value_linear, result.plan, *result.potentials

    return call


def pot_sinkhorn(function: str, method: str, threshold: float, **options: Any) -> Call:
    def call(M: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        out = getattr(pot, function)(a[0], b[0], M[0], 0.3, method, 15, threshold, warn=False, **options)
        return (out[0], out[1]["u"]) if options else (out,)

    return call


def of(loss: Any, *more: Any) -> Call:
    """A module of one differentiable input, and of labels where it takes them."""

    def call(x: Tensor) -> tuple[Tensor, ...]:
        out = loss(x, *more)
        return tuple(v for v in out if isinstance(v, Tensor)) if isinstance(out, tuple) else (out,)

    return call


def with_transport(head: Any) -> Call:
    return lambda x, maps: of(head, maps, LABELS, 0)(x)


def metric_loss(name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    return getattr(metric_learning, name)(num_classes=4, embedding_size=3, **options).double()


def head(kind: Any) -> Any:
    torch.manual_seed(1)
    return kind(3, 4).double()


def partial_fc(margin_loss: Any) -> Any:
    torch.manual_seed(1)
    return insightface.PartialFC_V2(margin_loss, 3, 4).double()


# Name: the call, its inputs, and whether it is one graph.
CASES: dict[str, tuple[Call, tuple[Tensor, ...], bool]] = {
    **{
        f"solve_batch, {grad}, tol {tol:g}": (solve_batch(grad=grad, tol=tol), (M, A, B), tol == 0)
        for grad in ("envelope", "autodiff", "last_step", "detach")
        for tol in (0.0, 1e-3)
    },
    "solve_batch, kl": (solve_batch(tol=0.0, reg_type="kl", method="sinkhorn"), (M, A, B), True),
    "solve_sample_batch": (lambda x, y: (pot.solve_sample_batch(x, y, 0.3, tol=0.0).value,), (X, Y), True),
    **{
        f"dist_batch, {metric}": (lambda x, y, m=metric: (pot.dist_batch(x, y, m),), (X, Y), True)
        for metric in ("sqeuclidean", "euclidean", "minkowski", "kl")
    },
    "dist_batch, of one": (lambda x: (pot.dist_batch(x),), (X,), True),
    "dist_batch, p = 3": (lambda x, y: (pot.dist_batch(x, y, "minkowski", 3),), (X, Y), True),
    "loss_linear_batch": (lambda M, T: (pot.loss_linear_batch(M, T),), (M, M.exp()), True),
    "loss_linear_samples_batch": (lambda x: (pot.loss_linear_samples_batch(x, x, x @ x.mT),), (X,), True),
    **{
        f"{function}, {method}, stopThr {threshold:g}": (
            pot_sinkhorn(function, method, threshold),
            (M, A, B),
            threshold == 0,
        )
        for function in ("sinkhorn", "sinkhorn2")
        for method in ("sinkhorn", "sinkhorn_log")
        for threshold in (0.0, 1e-3)
    },
    "sinkhorn, log": (pot_sinkhorn("sinkhorn", "sinkhorn", 1e-3, log=True), (M, A, B), False),
    "SinkhornDistance": (lambda x, y: layers.SinkhornDistance(0.1, 20, "mean")(x, y), (X, Y), False),
    "SinkhornDistance, thresh 0": (lambda x, y: layers.SinkhornDistance(0.1, 20, thresh=0.0)(x, y), (X, Y), True),
    "SinkhornDistanceCost": (lambda C: layers.SinkhornDistanceCost(0.1, 20)(C)[:2], (M,), False),
    "CombinedMarginLoss": (of(insightface.CombinedMarginLoss(64, 1.0, 0.5, 0.0), LABELS), (COSINES,), True),
    "CombinedMarginLoss, filtered": (
        of(insightface.CombinedMarginLoss(64, 1.0, 0.0, 0.4, 0.3), LABELS[:, None]),
        (COSINES,),
        True,
    ),
    "insightface's ArcFace": (of(insightface.ArcFace(), LABELS), (COSINES,), True),
    "insightface's CosFace": (of(insightface.CosFace(), LABELS), (COSINES,), True),
    "PartialFC_V2": (of(partial_fc(insightface.ArcFace()), LABELS), (EMBEDDINGS,), True),
    "PartialFC_V2, a function": (of(partial_fc(lambda logits, labels: 8 * logits), LABELS), (EMBEDDINGS,), True),
    **{
        name: (of(metric_loss(name), LABELS), (EMBEDDINGS,), True)
        for name in ("ArcFaceLoss", "CosFaceLoss", "SphereFaceLoss", "SubCenterArcFaceLoss")
    },
    "ArcFaceLoss, get_logits": (lambda x: (metric_loss("ArcFaceLoss").get_logits(x),), (EMBEDDINGS,), False),
    "ArcFaceLoss, collect_stats": (of(metric_loss("ArcFaceLoss", collect_stats=True), LABELS), (EMBEDDINGS,), False),
    **{
        f"the official {kind.__name__}": (of(head(kind), LABELS), (EMBEDDINGS,), True)
        for kind in (otface.ArcFace, otface.AMsoftmax)
    },
    **{
        kind.__name__: (with_transport(head(kind)), (EMBEDDINGS, MAPS), False)
        for kind in (otface.OTFace_Arcface, otface.OTFace_AMsoftmax)
    },
}


def results(call: Call, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the gradients of a combination of those that have one."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = call(*leaves)
    total = sum(
        (x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in outputs if x.requires_grad
    )
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if isinstance(total, Tensor) else []
    return [*(x.detach() for x in outputs), *(x for x in gradients if x is not None)]


@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str) -> None:
    call, inputs, whole = CASES[case]
    expected = results(call, inputs)
    found = results(torch.compile(call, fullgraph=whole, backend="aot_eager"), inputs)
    assert len(found) == len(expected)
    for x, e in zip(found, expected, strict=True):
        # The same operators; torch may take the derivative of its own in another order.
        torch.testing.assert_close(x, e, rtol=1e-12, atol=1e-13)
