"""Random embeddings, classes and labels, every margin, and the tolerances of what is computed from them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otface_cuda.margins import ArcFace, CombinedMargin, CosFace, Margin, SphereFace

from .problems import output_dtype

MARGINS: list[Margin] = [
    ArcFace(0.5),
    ArcFace(0.9, beyond_pi="none"),
    ArcFace(0.5, easy_margin=True),
    ArcFace(0.0),
    CosFace(0.35),
    SphereFace(4.0),
    SphereFace(1.7),
    CombinedMargin(0.9, 0.4, 0.15),
    CombinedMargin(2.0, 0.4, 0.15),
]
STRAIGHT_THROUGH: list[Margin] = [
    ArcFace(0.5, grad="straight_through"),
    ArcFace(0.5, beyond_pi="none", grad="straight_through"),
    SphereFace(4.0, grad="straight_through"),
    CombinedMargin(0.9, 0.4, 0.15, grad="straight_through"),
]


class MarginProblem(NamedTuple):
    x: Tensor  # (B, d)
    weight: Tensor  # (C, d)
    labels: Tensor  # (B,)

    def to(self, device: str) -> MarginProblem:
        return MarginProblem(*(x.to(device) for x in self))


def random_margin_problem(
    batch: int,
    classes: int,
    size: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> MarginProblem:
    """Normal numbers, so that the angles lie about pi / 2; the labels repeat. They do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    return MarginProblem(x.to(dtype), weight.to(dtype), labels).to(device)


def logit_error(dtype: torch.dtype, size: int, scale: float) -> float:
    """What rounding may change in a logit.

    A product of `size` terms, relative to the two lengths, is off by u for each term in turn, which add up like their
    root; four more are for the two inverse norms, the two multiplications by them and the scale, as u each. Twice that,
    because roots are only what to expect. u is the unit roundoff of the arithmetic, plus that of the reference.
    """
    u = (torch.finfo(output_dtype(dtype)).eps + torch.finfo(torch.float64).eps) / 2
    return 2 * scale * (4 + math.sqrt(size)) * u


def gradient_rtol(dtype: torch.dtype, problem: MarginProblem, scale: float) -> float:
    """What rounding may change in a gradient, relative to its largest entry.

    A probability is exp(logit - lse): its relative error is that of the two. The sums over B, C and d add theirs like
    roots, and their terms are up to ten times the largest sum. The result is rounded to the dtype of the input.
    """
    (batch, size), classes = problem.x.shape, problem.weight.shape[0]
    u = (torch.finfo(output_dtype(dtype)).eps + torch.finfo(torch.float64).eps) / 2
    return (
        2 * logit_error(dtype, size, scale)
        + 10 * (math.sqrt(batch) + math.sqrt(classes) + math.sqrt(size)) * u
        + torch.finfo(dtype).eps
    )


def gradients(function: Any, problem: MarginProblem, seed: int = 3, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and its gradients in x and weight for random cotangents, the same for every dtype and device."""
    x, weight = (v.detach().clone().requires_grad_() for v in problem[:2])
    out = function(x, weight, problem.labels, **options)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.rand(out.shape, generator=generator, dtype=torch.float64) + 0.5
    return out.detach(), *torch.autograd.grad(out, (x, weight), cotangent.to(out))


def in_double(problem: MarginProblem) -> MarginProblem:
    x, weight, labels = problem.to("cpu")
    return MarginProblem(x.double(), weight.double(), labels)


def assert_close_gradients(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float) -> None:
    """Relative to the largest entry, because the terms of a gradient cancel."""
    for name, x, y in zip(("x", "weight"), actual, expected, strict=True):
        assert x.shape == y.shape
        atol = rtol * y.abs().max().item()
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
