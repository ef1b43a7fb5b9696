"""The margins as objects, and their float64 specification by itself: against the formulas, F.cross_entropy and finite
differences.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from otface_cuda.margin_reference import (
    cosine_margin_logits_reference,
    margin_reference,
    margin_softmax_loss_reference,
)
from otface_cuda.margins import ArcFace, CombinedMargin, CosFace, KernelMargin, Margin, SphereFace

from .margin_problems import MARGINS, STRAIGHT_THROUGH, random_margin_problem

every_margin = pytest.mark.parametrize("margin", MARGINS + STRAIGHT_THROUGH, ids=repr)


# The objects


@every_margin
def test_are_values(margin: Margin) -> None:
    for same in (pickle.loads(pickle.dumps(margin)), copy.deepcopy(margin), eval(repr(margin))):
        assert same == margin
        assert hash(same) == hash(margin)
    assert sum(margin == other for other in MARGINS + STRAIGHT_THROUGH) == 1
    with pytest.raises(AttributeError):
        margin.grad = "exact"  # type: ignore[attr-defined]


def test_kernel_forms() -> None:
    """The numbers of struct Margin in csrc/margin/params.h; beyond_pi is its enum BeyondPi."""
    assert ArcFace().kernel_form() == KernelMargin(1.0, 0.5, 0.0, 1, False, False)
    assert ArcFace(0.2, beyond_pi="none", easy_margin=True).kernel_form() == KernelMargin(1.0, 0.2, 0.0, 0, True, False)
    assert CosFace().kernel_form() == KernelMargin(1.0, 0.0, 0.35, 0, False, False)
    assert SphereFace(grad="straight_through").kernel_form() == KernelMargin(4.0, 0.0, 0.0, 2, False, True)
    assert CombinedMargin(0.9, 0.4, 0.15).kernel_form() == KernelMargin(0.9, 0.4, 0.15, 0, False, False)
    with pytest.raises(TypeError, match="abstract class Margin"):
        Margin()


@pytest.mark.parametrize("number", [1, np.float32(1), np.int64(1), Fraction(1)], ids=lambda x: type(x).__name__)
def test_any_type_of_number_becomes_a_float(number: Any) -> None:
    for margin in (ArcFace(number), CosFace(number), SphereFace(number)):
        assert type(margin.m) is float
        assert margin == type(margin)(1.0)
    assert CombinedMargin(number, number, number) == CombinedMargin(1.0, 1.0, 1.0)


NOT_NUMBERS = [True, None, "0.5", 1j, torch.tensor(0.5), [0.5]]
FIELDS = [(ArcFace, "m"), (CosFace, "m"), (SphereFace, "m")] + [(CombinedMargin, f"m{k}") for k in (1, 2, 3)]


@pytest.mark.parametrize(("kind", "name"), FIELDS)
@pytest.mark.parametrize("wrong", NOT_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(kind: type[Margin], name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: `{name}` must be .*, got "):
        kind(**{name: wrong})


@pytest.mark.parametrize(("kind", "name"), FIELDS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -0.1])
def test_a_number_out_of_range_is_refused(kind: type[Margin], name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: `{name}` must be .*, got {wrong}$"):
        kind(**{name: wrong})


@pytest.mark.parametrize(
    "make",
    [
        lambda: ArcFace(math.nextafter(math.pi, 4)),
        lambda: CombinedMargin(m2=math.nextafter(math.pi, 4)),
        lambda: SphereFace(math.nextafter(1, 0)),
        lambda: CombinedMargin(m1=0),
    ],
)
def test_just_out_of_range(make: Callable[[], Margin]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()
    for margin in (ArcFace(math.pi), ArcFace(0), CosFace(0), CosFace(7), SphereFace(1), CombinedMargin(5e-324)):
        assert isinstance(margin, Margin)


@pytest.mark.parametrize("kind", [ArcFace, SphereFace, CombinedMargin])
def test_grad_is_checked(kind: Callable[..., Margin]) -> None:
    for wrong in ("Exact", None, True, 0):
        with pytest.raises(ValueError, match="`grad` must be 'exact' or 'straight_through', got"):
            kind(grad=wrong)


def test_other_options_are_checked() -> None:
    with pytest.raises(ValueError, match="ArcFace: `beyond_pi` must be 'monotone' or 'none', got 'fallback'"):
        ArcFace(beyond_pi="fallback")
    for wrong in (1, None, "yes"):
        with pytest.raises(TypeError, match="ArcFace: `easy_margin` must be True or False, got"):
            ArcFace(easy_margin=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        ArcFace(0.5, "none")  # type: ignore[misc]


# The specification

ANGLES = torch.linspace(0, math.pi, 1001, dtype=torch.float64)


def papers_formula(margin: Margin, theta: float) -> float:
    """Scalar and by cases, in the terms of each paper."""
    if isinstance(margin, CosFace):
        return math.cos(theta) - margin.m
    if isinstance(margin, SphereFace):
        k = math.floor(margin.m * theta / math.pi)
        return (-1) ** k * math.cos(margin.m * theta) - 2 * k
    if isinstance(margin, CombinedMargin):
        return math.cos(margin.m1 * theta + margin.m2) - margin.m3
    assert isinstance(margin, ArcFace)
    if margin.easy_margin and math.cos(theta) <= 0:
        return math.cos(theta)
    if margin.beyond_pi == "monotone" and theta + margin.m > math.pi:
        return math.cos(theta) - margin.m * math.sin(math.pi - margin.m)
    return math.cos(theta + margin.m)


@every_margin
def test_values(margin: Margin) -> None:
    """At a thousand angles but the ends, where arccos(cos(theta)) has half the digits: eps / sin(theta) elsewhere."""
    theta = ANGLES[1:-1] + 1e-5  # of the angles of the grid some are where a formula jumps
    theta = theta[theta < math.pi]
    expected = torch.tensor([papers_formula(margin, t) for t in theta.tolist()], dtype=torch.float64)
    # m1 <= 4, the smallest sine 3e-3: 4 * 1e-16 / 3e-3, and the value itself is at most 9.
    torch.testing.assert_close(margin_reference(theta.cos(), margin), expected, rtol=0, atol=1e-12)


@every_margin
def test_ends(margin: Margin) -> None:
    """|cos| = 1 and beyond: the value of the nearer end, and a finite gradient."""
    cos = torch.tensor([1.0, -1.0, 1 + 1e-9, -1 - 1e-9], dtype=torch.float64, requires_grad=True)
    out = margin_reference(cos, margin)
    ends = [papers_formula(margin, 0.0), papers_formula(margin, math.pi)]
    torch.testing.assert_close(out.tolist(), 2 * ends, rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(out.sum(), cos)
    assert slope.isfinite().all()
    assert slope.abs().max() <= max(margin.kernel_form().m1 / math.sqrt(torch.finfo(torch.float64).eps), 1)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_slope_is_the_derivative(margin: Margin) -> None:
    cos = (ANGLES[50:-50:7] + 1e-4).cos().requires_grad_()
    # Of a central difference the noise is 1e-15 / 1e-6; the error is (1e-6)^2 times the third derivative, which is up
    # to 15 m1 / sin(theta)^5, 5e6 for these angles.
    torch.autograd.gradcheck(lambda c: margin_reference(c, margin), cos, eps=1e-6, atol=1e-5, rtol=0)


@pytest.mark.parametrize("margin", STRAIGHT_THROUGH, ids=repr)
def test_straight_through_has_slope_one(margin: Margin) -> None:
    cos = ANGLES.cos().requires_grad_()
    out = margin_reference(cos, margin)
    (slope,) = torch.autograd.grad(out.sum(), cos)
    assert (slope == 1).all()
    exact = type(margin)(**{name: x for name, x in vars(margin).items() if name != "grad"})
    assert torch.equal(out, margin_reference(cos, exact))


@pytest.mark.parametrize("margin", [ArcFace(0.5), CosFace(0.35), SphereFace(4.0), SphereFace(2.5)], ids=repr)
def test_falls_everywhere(margin: Margin) -> None:
    assert (margin_reference(ANGLES.cos(), margin).diff() < 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_cross_entropy_of_the_logits(reduction: str, label_smoothing: float, weighted: bool) -> None:
    problem = random_margin_problem(7, 5, 3)
    problem.labels[[1, 4]] = -100
    u = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64) if weighted else None
    options = {"margin": ArcFace(0.5), "scale": 8.0}
    results = []
    for fused in (True, False):
        x, w = (v.clone().requires_grad_() for v in problem[:2])
        if fused:
            loss = margin_softmax_loss_reference(
                x, w, problem.labels, reduction=reduction, label_smoothing=label_smoothing, class_weight=u, **options
            )
        else:
            logits = cosine_margin_logits_reference(x, w, problem.labels, **options)
            loss = F.cross_entropy(logits, problem.labels, u, reduction=reduction, label_smoothing=label_smoothing)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (x, w))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)  # some hundred roundings of float64


def test_zero_rows_and_wrong_labels() -> None:
    problem = random_margin_problem(4, 5, 3)
    x, weight = problem.x, problem.weight
    x[1] = 0
    weight[2] = 0
    labels = torch.tensor([2, 3, -100, 5])
    x.requires_grad_()
    weight.requires_grad_()
    logits = cosine_margin_logits_reference(x, weight, labels, margin=CosFace(0.25), scale=8.0)
    assert logits[1].tolist() == [0, 0, 0, -2, 0]
    assert logits[0, 2] == -2
    assert logits[2, 2] == 0
    assert logits[3].isnan().all()
    grad_x, grad_weight = torch.autograd.grad(logits[:3].sum(), (x, weight))
    assert (grad_x[1] == 0).all()
    assert (grad_weight[2] == 0).all()
    assert grad_x[[0, 2]].abs().min() > 0


@pytest.mark.parametrize("length", [1e-200, 1e200])
def test_lengths_do_not_matter(length: float) -> None:
    x, weight, labels = random_margin_problem(4, 5, 3)
    options: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
    expected = cosine_margin_logits_reference(x, weight, labels, **options)
    scaled: Tensor = cosine_margin_logits_reference(length * x, length * weight, labels, **options)
    torch.testing.assert_close(scaled, expected, rtol=1e-13, atol=1e-13)
