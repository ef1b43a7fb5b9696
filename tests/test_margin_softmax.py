"""`cosine_margin_logits` and `margin_softmax_loss` against the float64 specification, finite differences,
F.cross_entropy and each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import otface_cuda
from otface_cuda.margin_reference import (
    LEAST_SINE,
    cosine_margin_logits_reference,
    margin_softmax_loss_reference,
)
from otface_cuda.margins import ArcFace, CombinedMargin, CosFace, Margin, SphereFace

from .margin_problems import (
    MARGINS,
    STRAIGHT_THROUGH,
    MarginProblem,
    assert_close_gradients,
    gradient_rtol,
    gradients,
    in_double,
    logit_error,
    random_margin_problem,
)
from .problems import DTYPES, has_cuda_kernels, output_dtype

SHAPES = [(1, 1, 2), (3, 1, 4), (5, 2, 3), (2, 2, 2), (9, 33, 17), (13, 203, 65), (64, 1030, 128)]
MANY = 203  # classes, which are several chunks at 64 a time
LEAST_CHUNK = {"chunk_bytes": 1}  # 64 classes

every_margin = pytest.mark.parametrize("margin", MARGINS + STRAIGHT_THROUGH, ids=repr)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def widened(rtol: float, dtype: torch.dtype, device: str) -> float:
    """On CUDA the products read half types: what goes into them in the backward is rounded to those."""
    return rtol + (4 * torch.finfo(dtype).eps if has_cuda_kernels(device) else 0)


def check_logits(problem: MarginProblem, margin: Margin, scale: float, device: str, **options: Any) -> None:
    dtype = problem.x.dtype
    expected = gradients(
        cosine_margin_logits_reference,
        in_double(problem),
        margin=margin,
        scale=scale,
        **options,
    )
    actual = gradients(otface_cuda.cosine_margin_logits, problem.to(device), margin=margin, scale=scale, **options)
    assert actual[0].dtype == output_dtype(dtype)
    atol = widened(logit_error(dtype, problem.x.shape[1], scale), dtype, device)
    # SphereFace goes down to 1 - 2 m1: what it rounds at the end is that much larger.
    torch.testing.assert_close(
        actual[0].double().cpu(), expected[0], rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=atol
    )
    assert_close_gradients(actual[1:], expected[1:], widened(gradient_rtol(dtype, problem, scale), dtype, device))


def check_loss(problem: MarginProblem, margin: Margin, scale: float, device: str, **options: Any) -> None:
    dtype = problem.x.dtype
    # By default such small problems would all be stored: here the logits are computed again unless a test says other.
    ours = {"store_logits": False}
    ours |= {name: options.pop(name) for name in ("store_logits", "chunk_bytes") if name in options}
    u = options.pop("class_weight", None)
    expected = gradients(
        margin_softmax_loss_reference,
        in_double(problem),
        margin=margin,
        scale=scale,
        class_weight=u,
        **options,
    )
    actual = gradients(
        otface_cuda.margin_softmax_loss,
        problem.to(device),
        margin=margin,
        scale=scale,
        class_weight=None if u is None else u.to(device),
        **options,
        **ours,
    )
    assert actual[0].dtype == output_dtype(dtype)
    assert [x.dtype for x in actual[1:]] == [dtype, dtype]
    # The difference of two logits, or of averages of them, times the weights; and the loss is rounded by itself. Of
    # "sum" the terms add up.
    count = len(problem.labels) if options.get("reduction") == "sum" else 1
    largest = 1 if u is None else max(1, u.max().item())
    atol = 2 * count * largest * widened(logit_error(dtype, problem.x.shape[1], scale), dtype, device)
    rtol = 8 * torch.finfo(output_dtype(dtype)).eps
    torch.testing.assert_close(actual[0].double().cpu(), expected[0], rtol=rtol, atol=atol)
    assert_close_gradients(actual[1:], expected[1:], widened(gradient_rtol(dtype, problem, scale), dtype, device))


# Against the specification


@pytest.mark.instruction_set
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    problem = random_margin_problem(*shape, dtype=dtype)
    for margin in (ArcFace(0.5), SphereFace(1.7)):
        check_logits(problem, margin, 16.0, device)
        check_loss(problem, margin, 16.0, device, reduction="none")


@every_dtype
@pytest.mark.parametrize("classes", [1, 2, 70])
def test_one_dimension(classes: int, dtype: torch.dtype, device: str) -> None:
    """Every cosine is 1 or -1, and no gradient is left, but for the rounding of zeros times the slope there."""
    problem = random_margin_problem(5, classes, 1, dtype=dtype)
    scale, margin = 16.0, SphereFace(3.0)
    settings = {"margin": margin, "scale": scale}
    expected = cosine_margin_logits_reference(*in_double(problem), **settings)
    logits, *grads = gradients(otface_cuda.cosine_margin_logits, problem.to(device), **settings)
    # A cosine is off by some units of float64, the angle by their root.
    atol = scale * margin.m * math.sqrt(32 * torch.finfo(torch.float64).eps) + 16 * logit_error(dtype, 1, scale)
    torch.testing.assert_close(logits.double().cpu(), expected, rtol=0, atol=atol)
    slope = scale * margin.m / LEAST_SINE
    for gradient, v in zip(grads, problem, strict=False):
        shortest = v.double().abs().min().item()
        assert gradient.double().abs().max() <= 16 * slope * torch.finfo(torch.float64).eps * 5 / shortest


@every_margin
@every_dtype
def test_margins(margin: Margin, dtype: torch.dtype, device: str) -> None:
    problem = random_margin_problem(12, 7, 5, dtype=dtype)
    check_logits(problem, margin, 8.0, device)
    check_loss(problem, margin, 8.0, device)


@pytest.mark.instruction_set
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("store_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_options(
    reduction: str, label_smoothing: float, weighted: bool, store_logits: bool, dtype: torch.dtype, device: str
) -> None:
    problem = random_margin_problem(11, MANY, 6, dtype=dtype)
    problem.labels[[0, 5, 10]] = -100
    u = torch.rand(MANY, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
    u[problem.labels[1]] = 0
    check_loss(
        problem,
        ArcFace(0.5),
        16.0,
        device,
        reduction=reduction,
        label_smoothing=label_smoothing,
        class_weight=u.to(output_dtype(dtype)) if weighted else None,
        store_logits=store_logits,
        **LEAST_CHUNK,
    )


@pytest.mark.instruction_set
@every_dtype
@pytest.mark.parametrize("scale", [0.1, 64.0, 1000.0])
@pytest.mark.parametrize("store_logits", [False, True])
def test_scales(scale: float, store_logits: bool, dtype: torch.dtype, device: str) -> None:
    problem = random_margin_problem(16, MANY, 64, dtype=dtype)
    check_logits(problem, CosFace(0.35), scale, device)
    check_loss(problem, CosFace(0.35), scale, device, reduction="none", store_logits=store_logits, **LEAST_CHUNK)


@pytest.mark.instruction_set
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_losses_keep_their_digits(dtype: torch.dtype, device: str) -> None:
    """Embeddings that are their class: the loss is some 1e-20 and its gradient too, which 1 - p would round to zero."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.eye(8, 16, dtype=torch.float64) + 0.01 * torch.randn(8, 16, generator=generator, dtype=torch.float64)
    x = weight + 0.1 * torch.randn(8, 16, generator=generator, dtype=torch.float64)
    problem = MarginProblem(x.to(dtype), weight.to(dtype), torch.arange(8))
    options = {"margin": CosFace(0.1), "scale": 64.0, "reduction": "none"}
    expected = gradients(margin_softmax_loss_reference, in_double(problem), **options)[0]
    loss, *grads = gradients(otface_cuda.margin_softmax_loss, problem.to(device), **options)
    # The specification itself forms lse - logit, and has 64 eps of float64 absolutely, no more.
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=0, atol=1e-12)
    x64, w64 = in_double(problem)[:2]
    logits = cosine_margin_logits_reference(x64, w64, problem.labels, margin=CosFace(0.1), scale=64.0)
    own = logits.diagonal()
    rest = logits.masked_fill(torch.eye(8, dtype=torch.bool), -math.inf).logsumexp(1)
    # exp(rest - own) is off by the errors of the logits, relatively.
    rtol = 4 * logit_error(dtype, 16, 64.0)
    torch.testing.assert_close(loss.double().cpu(), (rest - own).exp().log1p(), rtol=rtol, atol=0)
    assert (loss < 1e-15).all()
    assert all((g.abs().amax(1) > 0).all() for g in grads)


# Finite differences


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_gradcheck_of_the_logits(margin: Margin, classes: int, device: str) -> None:
    problem = random_margin_problem(4, classes, 3, seed=2, device=device)
    inputs = tuple(x.clone().requires_grad_() for x in problem[:2])

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return otface_cuda.cosine_margin_logits(x, weight, problem.labels, margin=margin, scale=2.0)

    # The noise of a difference is 1e-15 / 1e-6, its error (1e-6)^2 times a third derivative.
    torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("case", ["plain", "smoothing", "weights", "stored", "ignored", "one class", "two classes"])
def test_gradcheck_of_the_loss(margin: Margin, case: str, device: str) -> None:
    classes = {"one class": 1, "two classes": 2}.get(case, 5)
    problem = random_margin_problem(4, classes, 3, seed=2, device=device)
    options: dict[str, Any] = {}
    if case == "smoothing":
        options["label_smoothing"] = 0.3
    if case == "weights":
        u = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64, device=device)
        options |= {"class_weight": u, "label_smoothing": 0.1}
    if case == "stored":
        options["store_logits"] = True
    if case == "ignored":
        problem.labels[2] = -100
    inputs = tuple(x.clone().requires_grad_() for x in problem[:2])

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return otface_cuda.margin_softmax_loss(
            x, weight, problem.labels, margin=margin, scale=2.0, reduction="none", **options
        )

    torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


# What is special


@every_margin
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_cosines_of_one(sign: int, margin: Margin, dtype: torch.dtype, device: str) -> None:
    """Embeddings that are their class exactly, or its opposite."""
    weight = random_margin_problem(1, 6, 5, dtype=dtype).weight
    problem = MarginProblem(4 * sign * weight.clone(), weight, torch.arange(6))
    scale, m1 = 64.0, margin.kernel_form().m1
    expected = gradients(cosine_margin_logits_reference, in_double(problem), margin=margin, scale=scale)
    actual = gradients(otface_cuda.cosine_margin_logits, problem.to(device), margin=margin, scale=scale)
    # The cosine is within some units of float64 of 1, the angle within their root of 0.
    of_angle = scale * m1 * math.sqrt(32 * torch.finfo(torch.float64).eps)
    atol = of_angle + widened(logit_error(dtype, 5, scale), dtype, device)
    torch.testing.assert_close(actual[0].double().cpu(), expected[0], rtol=1e-6, atol=atol)
    # The slope is up to m1 / LEAST_SINE, and multiplies the rounding of d cos / dx, which is zero, in double.
    u = torch.finfo(torch.float64).eps
    rtol = widened(gradient_rtol(dtype, problem, scale), dtype, device) + 16 * scale * m1 * u / LEAST_SINE
    for x, y in zip(actual[1:], expected[1:], strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double().cpu(), y, rtol=0, atol=rtol * max(1, y.abs().max().item()))
    loss = gradients(otface_cuda.margin_softmax_loss, problem.to(device), margin=margin, scale=scale)
    assert all(x.isfinite().all() for x in loss)


@every_margin
@every_dtype
@pytest.mark.parametrize("store_logits", [False, True])
def test_zero_rows(margin: Margin, store_logits: bool, dtype: torch.dtype, device: str) -> None:
    """Cosine 0 with everything, gradient exactly 0: of x, of a target's weight, and of another's."""
    problem = random_margin_problem(6, 5, 4, dtype=dtype)
    problem.labels.copy_(torch.tensor([0, 1, 2, 3, 4, 1]))
    problem.x[[1, 4]] = 0
    problem.weight[[1, 2]] = 0
    check_logits(problem, margin, 8.0, device)
    check_loss(problem, margin, 8.0, device, reduction="none", label_smoothing=0.1, store_logits=store_logits)
    for function in (otface_cuda.cosine_margin_logits, otface_cuda.margin_softmax_loss):
        _, grad_x, grad_weight = gradients(function, problem.to(device), margin=margin, scale=8.0)
        assert (grad_x[[1, 4]] == 0).all()
        assert (grad_weight[[1, 2]] == 0).all()


@pytest.mark.parametrize("label", [-100, 2, 7, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("store_logits", [False, True])
def test_ignored_rows(label: int, store_logits: bool, device: str) -> None:
    """Their loss and gradient are exactly 0, also where they hold NaN, and the others are as without them."""
    problem = random_margin_problem(6, 5, 4, dtype=torch.float32)
    problem.labels.copy_(torch.tensor([label, 1, 0, label, 4, 3]))
    kept = problem.labels != label
    problem.x[0] = math.nan
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0, "ignore_index": label}
    loss = otface_cuda.margin_softmax_loss
    options = {"reduction": "none", "label_smoothing": 0.1, "store_logits": store_logits}
    losses, grad_x, _ = gradients(loss, problem.to(device), **settings, **options)
    assert (losses[~kept] == 0).all()
    assert (grad_x[~kept] == 0).all()
    for reduction in ("mean", "sum"):
        with_ignored = gradients(loss, problem.to(device), reduction=reduction, **settings)
        others = MarginProblem(problem.x[kept], problem.weight, problem.labels[kept])
        without = gradients(loss, others.to(device), reduction=reduction, **settings)
        # The product of more rows may add up in another order.
        for x, y in zip((*with_ignored[:1], with_ignored[1][kept], with_ignored[2]), without, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    problem.x[0] = 1
    plain = otface_cuda.cosine_margin_logits(*problem.to(device), **settings)
    none = otface_cuda.cosine_margin_logits(*problem.to(device), **(settings | {"margin": CosFace(0.0)}))
    assert torch.equal(plain[~kept], none[~kept])
    assert not torch.equal(plain[kept], none[kept])


def test_all_rows_ignored(device: str) -> None:
    problem = random_margin_problem(3, 5, 4, dtype=torch.float32, device=device)
    problem.labels.fill_(-100)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 8.0}
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        out, *_ = gradients(otface_cuda.margin_softmax_loss, problem, reduction=reduction, **settings)
        torch.testing.assert_close(out.item(), expected, equal_nan=True, rtol=0, atol=0)
    out, *grads = gradients(otface_cuda.margin_softmax_loss, problem, reduction="sum", **settings)
    assert all((x == 0).all() for x in grads)


# Against F.cross_entropy


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch", [0, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cross_entropy(
    batch: int, reduction: str, label_smoothing: float, weighted: bool, dtype: torch.dtype, device: str
) -> None:
    problem = random_margin_problem(batch, MANY, 16, dtype=dtype, device=device)
    problem.labels[3:6] = -100
    u = torch.linspace(0.1, 2, MANY, dtype=dtype, device=device) if weighted else None
    settings: dict[str, Any] = {"margin": CombinedMargin(1.0, 0.3, 0.2), "scale": 30.0}

    def by_logits(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = otface_cuda.cosine_margin_logits(x, weight, labels, **settings)
        return F.cross_entropy(logits, labels, u, reduction=reduction, label_smoothing=label_smoothing)

    def fused(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return otface_cuda.margin_softmax_loss(
            x, weight, labels, reduction=reduction, label_smoothing=label_smoothing, class_weight=u, **settings
        )

    actual, expected = gradients(fused, problem), gradients(by_logits, problem)
    assert actual[0].shape == expected[0].shape
    atol = 4 * max(batch, 1) * logit_error(dtype, 16, 30.0)
    torch.testing.assert_close(
        actual[0], expected[0], rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=atol, equal_nan=True
    )
    if batch:
        expected_64 = tuple(x.double().cpu() for x in expected[1:])
        assert_close_gradients(actual[1:], expected_64, 2 * gradient_rtol(dtype, problem, 30.0))
    else:
        assert (actual[2] == 0).all() or reduction == "mean"


# Chunks and stored logits


@pytest.mark.instruction_set
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [63, 64, 65, 128, 1000])
def test_chunks_and_stored_logits_change_rounding_only(classes: int, dtype: torch.dtype, device: str) -> None:
    problem = random_margin_problem(9, classes, 16, dtype=dtype, device=device)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 16.0, "reduction": "none", "label_smoothing": 0.1}
    loss = otface_cuda.margin_softmax_loss
    expected = gradients(loss, problem, **settings)
    expected_64 = tuple(x.double().cpu() for x in expected)
    for chunk_bytes in (1, 30_000, 1 << 40):
        for store_logits in (False, True):
            actual = gradients(loss, problem, chunk_bytes=chunk_bytes, store_logits=store_logits, **settings)
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=2 * logit_error(dtype, 16, 16.0))
            assert_close_gradients(actual[1:], expected_64[1:], gradient_rtol(dtype, problem, 16.0))


@pytest.mark.parametrize(
    ("classes", "store_logits", "stored"),
    [(786_432, None, True), (786_433, None, False), (786_433, True, True), (40, False, False)],
)
def test_what_is_stored(classes: int, store_logits: bool | None, stored: bool, device: str) -> None:
    """By default as many cosines as fit 48 MiB; and none if there will be no gradient."""
    problem = random_margin_problem(16, classes, 4, dtype=torch.float32, device=device)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 16.0, "store_logits": store_logits}
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        otface_cuda.margin_softmax_loss(problem.x, problem.weight, problem.labels, **settings)
        assert kept == []
        otface_cuda.margin_softmax_loss(problem.x.requires_grad_(), problem.weight, problem.labels, **settings)
    assert (16 * classes in kept) == stored


# Determinism


@pytest.mark.parametrize("store_logits", [False, True])
def test_repeated_to_the_bit(store_logits: bool, device: str) -> None:
    problem = random_margin_problem(33, 500, 48, dtype=torch.float32, device=device)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 30.0}
    for function, options in (
        (otface_cuda.cosine_margin_logits, {}),
        (otface_cuda.margin_softmax_loss, {"store_logits": store_logits, "label_smoothing": 0.1, **LEAST_CHUNK}),
    ):
        first = gradients(function, problem, **settings, **options)
        for _ in range(3):
            again = gradients(function, problem, **settings, **options)
            assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


def test_threads_change_no_bit(threads: Callable[[int], None]) -> None:
    """Of what is not the library's: small whole numbers have products without rounding, in whatever order."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-3, 4, (n, 16), generator=generator).float() for n in (37, 5000))
    labels = torch.randint(5000, (37,), generator=generator)
    settings: dict[str, Any] = {"margin": ArcFace(0.5), "scale": 30.0}
    results = []
    for count in (1, 2, 5):
        threads(count)
        logits = otface_cuda.cosine_margin_logits(x, weight, labels, **settings)
        losses = otface_cuda.margin_softmax_loss(
            x, weight, labels, reduction="none", label_smoothing=0.1, chunk_bytes=100_000, **settings
        )
        grads = gradients(otface_cuda.margin_softmax_loss, MarginProblem(x, weight, labels), **settings)
        results.append((logits, losses, *grads[1:]))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])
        for a, b in zip(other[2:], results[0][2:], strict=True):  # the library's products of rounded factors
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
