"""The same numbers as other packages have for the same names, each with its own convention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import otface_cuda
from otface_cuda.margins import ArcFace, CombinedMargin, CosFace, Margin, SphereFace

from .margin_problems import MarginProblem, gradients, random_margin_problem

B, C, D = 40, 7, 3
# float64 throughout: the formulas round in another order, and the angle comes from arccos here and there.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def angles(problem: MarginProblem) -> Tensor:
    x, weight, labels = problem
    return (F.normalize(x) @ F.normalize(weight).mT).gather(1, labels[:, None])[:, 0].acos()


@pytest.mark.parametrize("kind", ["arcface", "cosface", "sphereface"])
def test_pytorch_metric_learning(kind: str, device: str) -> None:
    """pytorch-metric-learning 2.9: margins of ArcFace in degrees, the parameter W is (d, C), the loss is the mean.

    ArcFace falls back to cos - m sin m beyond theta = pi - m. SphereFace multiplies its logits by |x| as well, which is
    1 here, so only the gradient of the weights is the same: that of x has |x| in it.
    """
    problem = random_margin_problem(B, C, D, device=device)
    x, weight, labels = problem._replace(x=F.normalize(problem.x)) if kind == "sphereface" else problem
    theirs: Any
    if kind == "arcface":
        theirs = losses.ArcFaceLoss(C, D, margin=math.degrees(0.5), scale=64)
        margin: Margin = ArcFace(0.5)
        assert (angles(problem) > math.pi - 0.5).any()
    elif kind == "cosface":
        theirs = losses.CosFaceLoss(C, D, margin=0.35, scale=64)
        margin = CosFace(0.35)
    else:
        theirs = losses.SphereFaceLoss(C, D, margin=4, scale=64)
        margin = SphereFace(4)
        assert len((4 * angles(problem) / math.pi).floor().unique()) >= 3
    theirs.W.data = weight.mT.clone()
    theirs_x = x.clone().requires_grad_()
    expected = theirs(theirs_x, labels)
    expected.backward()
    actual = gradients(
        lambda *args: otface_cuda.margin_softmax_loss(*args, margin=margin, scale=64.0, reduction="none").mean(),
        MarginProblem(x, weight, labels),
        seed=0,
    )
    factor = torch.rand((), generator=torch.Generator().manual_seed(0), dtype=torch.float64).item() + 0.5
    torch.testing.assert_close(actual[0], expected.detach(), **CLOSE)
    torch.testing.assert_close(actual[2] / factor, theirs.W.grad.mT, **CLOSE)
    if kind != "sphereface":
        torch.testing.assert_close(actual[1] / factor, theirs_x.grad, **CLOSE)


class InsightfaceTarget(torch.autograd.Function):
    """What is done to a target without gradient: the value changes, the slope stays 1."""

    @staticmethod
    def forward(ctx: Any, cos: Tensor, m2: float) -> Tensor:
        return (cos.acos() + m2).cos()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def insightface(x: Tensor, weight: Tensor, labels: Tensor, *, s: float, m1: float, m2: float, m3: float) -> Tensor:
    """CombinedMarginLoss(s, m1, m2, m3) of insightface, recognition/arcface_torch, on normalised vectors.

    cos(theta + m2) where m1 = 1 and m3 = 0, whatever theta is, with arccos and cos under no_grad; else cos - m3, and m1
    and m2 are ignored. The label -1 is for a row whose class is elsewhere: it has no margin. Every other entry goes
    through arccos and cos too, which changes rounding only.
    """
    cos = F.normalize(x) @ F.normalize(weight).mT
    rows = (labels != -1).nonzero()[:, 0]
    target = cos[rows, labels[rows]]
    target = InsightfaceTarget.apply(target, m2) if m1 == 1 and m3 == 0 else target - m3
    return s * cos.index_put((rows, labels[rows]), target)


@pytest.mark.parametrize(
    ("theirs", "margin"),
    [
        ((1.0, 0.5, 0.0), ArcFace(0.5, beyond_pi="none", grad="straight_through")),
        ((1.0, 0.5, 0.0), CombinedMargin(1.0, 0.5, 0.0, grad="straight_through")),
        ((1.0, 0.0, 0.4), CosFace(0.4)),
        ((1.3, 0.5, 0.4), CosFace(0.4)),  # ours with all three is in test_margins.py
    ],
    ids=str,
)
def test_insightface(theirs: tuple[float, float, float], margin: Margin, device: str) -> None:
    """The logits and the straight-through gradient; `ignore_index=-1` is what insightface means by the label -1."""
    problem = random_margin_problem(B, C, D, device=device)
    problem.labels[3] = -1
    m1, m2, m3 = theirs
    expected = gradients(insightface, problem, s=64.0, m1=m1, m2=m2, m3=m3)
    actual = gradients(otface_cuda.cosine_margin_logits, problem, margin=margin, scale=64.0, ignore_index=-1)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def otface_arcface(x: Tensor, kernel: Tensor, labels: Tensor, *, s: float, m: float) -> Tensor:
    """The head `ArcFace` of the official OTFace code: kernel (d, C), cos(theta + m) by the sum formula.

    Beyond theta = pi - m, which it sees from cos <= cos(pi - m), it falls back to cos - m sin(pi - m).
    """
    cos = (F.normalize(x) @ F.normalize(kernel, dim=0)).clamp(-1, 1)
    target = cos.gather(1, labels[:, None])
    with_margin = target * math.cos(m) - (1 - target.square()).sqrt() * math.sin(m)
    fallback = target - m * math.sin(math.pi - m)
    with_margin = torch.where(target - math.cos(math.pi - m) <= 0, fallback, with_margin)
    return s * cos.scatter(1, labels[:, None], with_margin)


def otface_amsoftmax(x: Tensor, kernel: Tensor, labels: Tensor, *, s: float, m: float) -> Tensor:
    """The head `AMsoftmax` of the official OTFace code: kernel (d, C), cos - m."""
    cos = (F.normalize(x) @ F.normalize(kernel, dim=0)).clamp(-1, 1)
    return s * (cos - m * F.one_hot(labels, kernel.shape[1]).to(cos))


@pytest.mark.parametrize("kind", ["arcface", "amsoftmax"])
def test_official_otface(kind: str, device: str) -> None:
    """With its own defaults: s = 64, m = 0.45, and s = 30, m = 0.35. The exact gradient, as torch finds it there."""
    problem = random_margin_problem(B, C, D, device=device)
    if kind == "arcface":
        head, margin, s, m = otface_arcface, ArcFace(0.45), 64.0, 0.45
        assert (angles(problem) > math.pi - 0.45).any()
    else:
        head, margin, s, m = otface_amsoftmax, CosFace(0.35), 30.0, 0.35
    expected = gradients(lambda x, weight, labels: head(x, weight.mT, labels, s=s, m=m), problem)
    actual = gradients(otface_cuda.cosine_margin_logits, problem, margin=margin, scale=s)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_linear(device: str) -> None:
    """Without a margin, the logits are those of torch's cosine_similarity times the scale."""
    x, weight, labels = random_margin_problem(B, C, D, device=device)
    logits = otface_cuda.cosine_margin_logits(x, weight, labels, margin=CosFace(0.0), scale=3.0)
    torch.testing.assert_close(logits, 3 * F.cosine_similarity(x[:, None], weight[None], dim=2), **CLOSE)
