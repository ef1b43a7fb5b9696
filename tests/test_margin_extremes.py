"""The margin functions at lengths and angles where products and cosines have nothing to say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda.margins import ArcFace, CombinedMargin, CosFace, Margin, SphereFace

from .margin_problems import gradient_rtol, gradients, logit_error
from .problems import output_dtype

C = 70  # two chunks, at 64 classes a time
FUNCTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "logits": (otface_cuda.cosine_margin_logits, {}),
    "loss": (otface_cuda.margin_softmax_loss, {"reduction": "none", "store_logits": False}),
    "loss, stored": (otface_cuda.margin_softmax_loss, {"reduction": "none", "label_smoothing": 0.1}),
    "loss, chunks": (otface_cuda.margin_softmax_loss, {"reduction": "none", "store_logits": False, "chunk_bytes": 1}),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS)


# Lengths


def exponents(dtype: torch.dtype) -> list[int]:
    """Of two, from the least number of the dtype to the largest one, for numbers up to three."""
    info = torch.finfo(dtype)
    least, most = math.frexp(info.smallest_normal * info.eps)[1] - 1, math.frexp(info.max)[1] - 2
    return sorted(
        {least, least + 1, least // 2, -10, 0, 10, most // 2, most - 1, most}
        | {least + 26, -20, 20} & set(range(least, most))
    )


@pytest.mark.instruction_set
@every_function
@pytest.mark.parametrize("scaled", ["x", "weight", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_length(dtype: torch.dtype, scaled: str, function: str, device: str) -> None:
    """Rows of small whole numbers times powers of two, which keep their directions down to the least number there is.

    Side by side: no length disturbs another. A gradient is that of the whole numbers, over the power, if that is a
    number.
    """
    call, options = FUNCTIONS[function]
    generator = torch.Generator().manual_seed(5)
    batch, size = 26, 6
    x = torch.randint(-3, 4, (batch, size), generator=generator).to(dtype)
    weight = torch.randint(-3, 4, (C, size), generator=generator).to(dtype)
    x[:, 0] = weight[:, 1] = 1  # no row is zero
    labels = torch.randint(C, (batch,), generator=generator)
    settings = {"margin": ArcFace(0.5), "scale": 8.0, **options}
    problem = Problem(x, weight, labels)
    powers = exponents(dtype)
    of_x = torch.tensor([powers[b % len(powers)] if scaled != "weight" else 0 for b in range(batch)])
    of_weight = torch.tensor([powers[j * 5 % len(powers)] if scaled != "x" else 0 for j in range(C)])
    expected = gradients(call, problem.to(device), **settings)
    actual = gradients(call, problem.times(of_x, of_weight).to(device), **settings)
    # Rounded at other places: what a logit is off by is magnified by nothing but the scale.
    atol = 2 * logit_error(dtype, size, 8.0) * (1 if function == "logits" else 2)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=atol)
    rtol = 2 * gradient_rtol(dtype, problem, 8.0)
    for ours, theirs, power in zip(actual[1:], expected[1:], (of_x, of_weight), strict=True):
        ours, theirs = ours.double().cpu(), theirs.double().cpu()
        factor = 2.0 ** -power[:, None].double()
        assert not ours.isnan().any()
        fits = (theirs.abs() * factor < torch.finfo(dtype).max / 2) & ours.isfinite()
        assert (fits | (theirs.abs() * factor > torch.finfo(dtype).max / 2)).all()
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        error = (ours - theirs * factor).abs() - factor * rtol * theirs.abs().max()
        assert (error <= least)[fits].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_short_classes_have_a_gradient_in_x(dtype: torch.dtype) -> None:
    """Which is that of any other length: 1e-37 and less, of float64 1e-320."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(10, 16, generator=generator, dtype=dtype)
    labels = torch.tensor([0, 3, 3, 9])
    for short in (1e-37, 1e-40) if dtype == torch.float32 else (1e-305, 1e-312):
        rounded = (weight * short).double() / short if dtype == torch.float32 else weight * short
        outcomes = []
        for w in (weight * short, rounded.to(dtype) if dtype == torch.float32 else rounded * 2.0**1000):
            loss = otface_cuda.margin_softmax_loss(x, w, labels, margin=ArcFace(0.5), scale=64.0)
            outcomes.append((loss.detach(), *torch.autograd.grad(loss, x)))
        # Whatever rounding w to so few digits costs is in both.
        error = 64 * 32 * torch.finfo(dtype).eps
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=error, atol=error * b.abs().max().item())


class Problem:
    """As a MarginProblem, by whose fields `gradients` goes; some of its rows times powers of two."""

    def __init__(self, x: Tensor, weight: Tensor, labels: Tensor) -> None:
        self.x, self.weight, self.labels = x, weight, labels

    def __getitem__(self, index: slice) -> tuple[Tensor, ...]:
        return (self.x, self.weight, self.labels)[index]

    def to(self, device: str) -> Problem:
        return Problem(*(t.to(device) for t in self[:3]))

    def times(self, of_x: Tensor, of_weight: Tensor) -> Problem:
        return Problem(shifted(self.x, of_x), shifted(self.weight, of_weight), self.labels)


def shifted(v: Tensor, power: Tensor) -> Tensor:
    """V times powers of two that need not be numbers of its dtype."""
    return torch.from_numpy(np.ldexp(v.double().numpy(), power[:, None].numpy())).to(v.dtype)


# Angles


def reference(
    x: np.ndarray, weight: np.ndarray, label: int, margin: Margin, scale: float
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Of one row, in numbers longer than double: the loss, the own angle's sine, and the gradients of x and weight."""
    x, weight = x.astype(np.longdouble), weight.astype(np.longdouble)
    length_x, length_w = np.sqrt((x**2).sum()), np.sqrt((weight**2).sum(1))
    u_x, u_w = x / length_x, weight / length_w[:, None]
    cosines = u_w @ u_x
    sign = np.sign(cosines[label])
    chord = np.sqrt(((u_x - sign * u_w[label]) ** 2).sum())
    small = 2 * np.arcsin(chord / 2)
    pi = np.longdouble("3.14159265358979323846264338327950288")
    theta = small if sign > 0 else pi - small
    sine = np.sin(small)
    m1, m2, m3, beyond_pi, _, straight_through = margin.kernel_form()
    phi = m1 * theta + m2
    k = np.floor(phi / pi) if beyond_pi == 2 else 0
    value = (-1) ** k * np.cos(phi) - 2 * k - m3
    slope = (-1) ** k * m1 * np.sin(phi) / sine
    if beyond_pi == 1 and phi > pi:
        value, slope = cosines[label] - m2 * np.sin(np.longdouble(m2)) - m3, 1
    logits = scale * cosines
    logits[label] = scale * value
    p = np.exp(logits - logits.max())
    p /= p.sum()
    of_cosine = scale * p
    of_cosine[label] = scale * (1 if straight_through else slope) * -(p.sum() - p[label])
    at_x, at_w = u_w - cosines[:, None] * u_x, u_x - cosines[:, None] * u_w
    c = sign * (1 - chord**2 / 2)
    at_x[label], at_w[label] = u_w[label] - c * u_x, u_x - c * u_w[label]
    grad_x = (of_cosine[:, None] * at_x).sum(0) / length_x
    grad_w = of_cosine[:, None] * at_w / length_w[:, None]
    others = 1 - p[label] if p[label] < 0.5 else p.sum() - p[label]
    loss = -np.log1p(-others) if others < 0.5 else -np.log(p[label])
    return float(loss), float(sine), grad_x.astype(float), grad_w.astype(float)


SMALL = [3e-8, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 4e-4, 1e-3, 1e-2]
MARGINS: list[Margin] = [
    ArcFace(0.5),
    ArcFace(0.5, beyond_pi="none"),
    ArcFace(0.5, beyond_pi="none", grad="straight_through"),
    CosFace(0.35),
    SphereFace(1.7),
    CombinedMargin(0.9, 0.4, 0.15),
]


@pytest.mark.instruction_set
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_angles(dtype: torch.dtype, sign: int, margin: Margin, device: str) -> None:
    """The loss and both gradients, at any angle near 0 and near pi that vectors of the dtype have."""
    generator = torch.Generator().manual_seed(7)
    classes, size, scale = 5, 9, 4.0
    weight = torch.randn(classes, size, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.arange(len(SMALL)) % 3
    own = weight[labels].double()
    across = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    across -= own * (own * across).sum(1, keepdim=True) / own.square().sum(1, keepdim=True)
    across *= torch.tensor(SMALL, dtype=torch.float64)[:, None] * own.norm(dim=1, keepdim=True)
    x = (sign * 3 * (own + across / across.norm(dim=1, keepdim=True) * across.norm(dim=1, keepdim=True))).to(dtype)
    refs = [
        reference(v.double().numpy(), weight.double().numpy(), int(k), margin, scale)
        for v, k in zip(x, labels, strict=True)
    ]
    for alone in range(len(SMALL)):
        rows = [alone]
        inputs = [v.clone().to(device).requires_grad_() for v in (x[rows], weight)]
        loss = otface_cuda.margin_softmax_loss(
            *inputs, labels[rows].to(device), margin=margin, scale=scale, reduction="none"
        )
        grads = [g.double().cpu().numpy() for g in torch.autograd.grad(loss.sum(), inputs)]
        value, sine, grad_x, grad_w = refs[alone]
        check_angle(dtype, sine, (loss.item(), *grads), (value, grad_x[None], grad_w))
    inputs = [v.clone().to(device).requires_grad_() for v in (x, weight)]
    loss = otface_cuda.margin_softmax_loss(*inputs, labels.to(device), margin=margin, scale=scale, reduction="sum")
    (grad_w,) = torch.autograd.grad(loss, inputs[1])  # several rows are aligned with one class
    expected = sum(r[3] for r in refs)
    sizes = sum(np.abs(r[3]).max() * tolerance(dtype, r[1]) for r in refs)
    np.testing.assert_allclose(grad_w.double().cpu().numpy(), expected, rtol=0, atol=sizes)


def tolerance(dtype: torch.dtype, sine: float) -> float:
    """Relative to the largest entry of a gradient.

    In double the unit vectors are right to some units U of it, and so their difference to U / sine of itself. Where
    the cosine is good enough, it leaves up to u / sine of the gradient in products of unit roundoff u, and U / sine^2
    of the slope; 16 of each for the sums over size and classes. That is up to the root of u, where it begins.
    """
    u, double = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
    near = max(math.sqrt(u), double**0.25)
    return 64 * u + 16 * (double / sine if sine < near else u / sine + double / sine**2)


def check_angle(dtype: torch.dtype, sine: float, actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    u, double = torch.finfo(output_dtype(dtype)).eps, torch.finfo(torch.float64).eps
    # An angle from its cosine is off by U / sine, times the scale and 1.7 at most.
    assert actual[0] == pytest.approx(expected[0], rel=64 * u, abs=16 * 4 * double / max(sine, double**0.25))
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance(dtype, sine) * np.abs(theirs).max())
