"""The CUDA kernels of the margin operators, run on the CPU by the host executor, compute what params.h says.

The references are its formulas in float64, from inputs that are rounded to the type already. Tolerances are those of a
sum or a product of so many roundings of size `unit`; the kernels' exp2 counts for two more, its argument's rounding for
|argument| of them.
"""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import otface_cuda

from .simt import margin as simt
from .simt.build import ROOT
from .simt.kernels import run, run_driver
from .simt.margin import Arrays, Margin, bits, field, from_strided, make, matrix, real_of, round_to, rows, values

REALS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
SIZES = (1, 3, 31, 32, 33, 127, 129, 511, 512, 513, 1000, 1540)
IGNORED, OUT_OF_RANGE = -1.0, -2.0
LEAST_SINE = 2.0**-26
EVERY_REAL = pytest.mark.parametrize("dtype", REALS)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def products_of(real: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if real == torch.float64 else (torch.float32, *HALVES)


def same_bits(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def margin_reference(m: Margin, c: float) -> tuple[float, float]:
    """The margin and its slope, from the comments of formula.h."""
    c = min(1.0, max(-1.0, c))
    if m.easy and c <= 0:
        return c, 1.0
    theta = math.acos(c)
    phi = m.m1 * theta + m.m2
    if (m.m1 == 1 and m.m2 == 0) or (m.beyond_pi == 1 and phi > math.pi):
        return c - (m.m2 * math.sin(m.m2)) - m.m3, 1.0
    k = math.floor(phi / math.pi) if m.beyond_pi == 2 else 0
    slope = (-1) ** k * m.m1 * math.sin(phi) / max(math.sin(theta), LEAST_SINE)
    return (-1) ** k * math.cos(phi) - 2 * k - m.m3, 1.0 if m.straight_through else slope


# --- start

MARGINS = [
    Margin(m2=0.5, beyond_pi=1),
    Margin(m2=0.5, easy=True),
    Margin(m3=0.35),
    Margin(m1=4.0, beyond_pi=2),
    Margin(m1=0.9, m2=0.4, m3=0.15, straight_through=True),
]
TYPES = [  # of x, of the weight, and of the products
    (torch.float64, torch.float64, torch.float64),
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
]


def start_case(
    x: np.ndarray, weight: np.ndarray, labels: Any, types: tuple[torch.dtype, ...], margin: Margin = MARGINS[0],
    **more: Any,
) -> Arrays:  # fmt: skip
    gaps = {name: more.pop(name, 0) for name in ("gap", "offset")}
    options = {"scale": 64.0, "ignore_index": -100, "drop_ignored": True} | more
    return make(
        "start",
        torch.float64 if types[2] == torch.float64 else torch.float32,
        **matrix("x", x, types[0], **gaps),
        **matrix("weight", weight, types[1], **gaps),
        labels=np.array(labels, np.int64),
        margin=np.array([*margin], np.float64),
        product_dtype=types[2],
        **options,
    )


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("size", [1, 31, 32, 33, 127, 512])
def test_start(size: int, types: tuple[torch.dtype, ...]) -> None:
    random = np.random.default_rng(size)
    for number, margin in enumerate(MARGINS):
        batch, classes = 5 + number * 2, 11
        x = round_to(random.standard_normal((batch, size)) * np.exp(random.uniform(-9, 9, (batch, 1))), types[0])
        weight = round_to(0.01 * random.standard_normal((classes, size)), types[1])
        labels = random.integers(0, classes, batch)
        case = start_case(x, weight, labels, types, margin, gap=number, offset=number % 3)
        results = run(case)
        found = results["rows"]
        exponent = np.frexp(np.sqrt((x**2).sum(1)))[1]
        np.testing.assert_array_equal(field(found, "power"), 2.0**-exponent)
        scaled = round_to(x * 2.0 ** -exponent[:, None], types[2])
        np.testing.assert_array_equal(values(results["scaled_x"], types[2]), scaled)
        # Sums of `size` doubles
        error = (size + 8) * unit(torch.float64)
        length = np.sqrt((scaled**2).sum(1))
        np.testing.assert_allclose(field(found, "inverse_norm"), 1 / length, rtol=error)
        np.testing.assert_array_equal(field(found, "target"), labels)
        for name, value in (("most", -np.inf), ("sum", 0), ("weighted", 0)):
            assert (field(found, name) == value).all()
        w = weight[labels]
        cosines = (scaled * w).sum(1) / length / np.sqrt((w**2).sum(1))
        for k, cosine in enumerate(cosines):
            value, slope = margin_reference(margin, cosine)
            # acos and the slope lose 1 / sin(theta) of it, and that loses it once more
            amplified = 16 * margin.m1**2 * error / max(1 - cosine**2, error)
            if size > 1:  # else theta is 0 or pi, where the slope is that of the least sine
                assert abs(found[k, 2] - 64 * value) <= 64 * (amplified + error)
                assert abs(found[k, 3] - 64 * slope) <= 64 * (abs(slope) + 1) * amplified
            assert found[k, 8] == (math.copysign(1, cosine) if size == 1 and abs(slope) != 1 else 0)
            assert np.isfinite(found[k]).sum() == 8  # all but `most`
        assert results["any_rescaled"] == 0


@EVERY_REAL
def test_start_of_special_rows(dtype: torch.dtype) -> None:
    size, classes = 40, 3
    least = float(torch.finfo(dtype).tiny)
    random = np.random.default_rng(1)
    x, weight = random.standard_normal((12, size)), random.standard_normal((classes, size))
    weight[1] = 0
    weight[2] = 0
    weight[2, 5] = least / 2**20  # subnormal
    x[5] = 0
    x[6, 7] = np.nan
    x[7] = x[8] * least  # whose squares are no floats, and of doubles no doubles
    x[9] = weight[0]
    x[10] *= 1e36 if dtype == torch.float32 else 1e306
    x[11, 2] = np.inf
    x, weight = round_to(x, dtype), round_to(weight, dtype)
    labels = [0, -100, 3, -1, 1, 0, 0, 0, 0, 0, 2, 0]
    for drop in (True, False):
        results = run(start_case(x, weight, labels, (dtype,) * 3, drop_ignored=drop))
        found = results["rows"]
        np.testing.assert_array_equal(
            field(found, "target"), [IGNORED if k == -100 else k if 0 <= k < classes else OUT_OF_RANGE for k in labels]
        )
        assert (found[1, [2, 3]] == 0).all()
        assert (found[1, [0, 1]] == 0).all() == drop
        assert (results["scaled_x"][1] == 0).all() == drop
        assert np.isnan(found[2:4, 2:4]).all()
        right_angle = 64 * math.cos(math.pi / 2 + 0.5)
        np.testing.assert_allclose(found[[4, 5], 2], right_angle, rtol=1e-14)
        of_one_column = math.acos(x[10, 5] / np.linalg.norm(x[10] / x[10].max()) / x[10].max())
        np.testing.assert_allclose(found[10, 2], 64 * math.cos(of_one_column + 0.5), rtol=1e-12)
        assert found[5, 1] == 0
        assert (results["scaled_x"][5] == 0).all()
        assert np.isnan(found[[6, 11], 2]).all()
        length = np.sqrt((results["scaled_x"][[0, 7, 8, 9, 10]].astype(np.float64) ** 2).sum(1))
        assert ((length >= 0.5) & (length <= 1)).all()
        np.testing.assert_allclose(found[[0, 7, 8, 9, 10], 1] * length, 1, rtol=1e-13)
        # cos = 1: the slope is that of the least sine
        np.testing.assert_allclose(found[9, 2], 64 * math.cos(0.5), rtol=1e-14)
        np.testing.assert_allclose(found[9, 3], 64 * math.sin(0.5) / LEAST_SINE, rtol=1e-14)
        np.testing.assert_array_equal(np.nonzero(found[:, 8])[0], [9])
        assert np.isnan(found[11, 0])


def test_start_of_subnormal_rows() -> None:
    """Where 2^-e is no double, x' stays shorter than 1/2; of floats all powers are doubles."""
    x = np.array([[3.0, -4.0, 0.0], [0.0, 1.0, 1.0]])
    weight = np.array([[1.0, 0.0, 0.0]])
    for dtype, unit_of_x in ((torch.float64, 2.0**-1074), (torch.float32, 2.0**-149)):
        results = run(start_case(x * unit_of_x, weight, [0, 0], (dtype,) * 3, Margin()))
        found, scaled = results["rows"], results["scaled_x"].astype(np.float64)
        np.testing.assert_array_equal(scaled, x * unit_of_x * found[:, :1])
        np.testing.assert_array_equal(found[:, 0], [2.0**1022] * 2 if dtype == torch.float64 else [2.0**146, 2.0**148])
        np.testing.assert_allclose(found[:, 1] * np.linalg.norm(scaled, axis=1), 1, rtol=1e-14)
        np.testing.assert_allclose(found[:, 2], [64 * 0.6, 0], rtol=1e-14)


def test_double_goes_with_double_alone() -> None:
    x = np.ones((1, 2))
    for types in [(torch.float64, torch.float64, torch.float32), (torch.float32, torch.float64, torch.float32)]:
        with pytest.raises(RuntimeError, match="float64 goes with float64 alone"):
            run(start_case(x, x, [0], types))
    with pytest.raises(RuntimeError, match="float64 goes with float64 alone"):
        run(make("inverse_norms", torch.float64, **matrix("weight", x, torch.float16)))


# --- inverse norms


@pytest.mark.parametrize("dtype", [*REALS, *HALVES])
@pytest.mark.parametrize("size", SIZES)
def test_inverse_norms(size: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(size)
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    w = random.standard_normal((11, size))
    w[1] = 0
    w[2, -1] = np.nan
    w[3] = most / math.sqrt(size) / 3  # whose square is no double
    w[4] = 0
    w[4, -1] = least
    w[5] = 0
    w[5, -1] = torch.finfo(dtype).smallest_normal * unit(dtype)  # the least number that there is
    w = round_to(w, dtype)
    squares = {j: sum((Fraction(v) ** 2 for v in w[j]), Fraction(0)) for j in range(len(w)) if j != 2}
    most = {torch.float64: 800, torch.float16: 10}.get(dtype, 96)
    found = run(make("inverse_norms", dtype, **matrix("weight", w, dtype)))
    exponents, norms = found["exponents"], found["inverse_norms"]
    assert norms.dtype == real_of(dtype)
    assert np.isnan(norms[2])
    rtol = unit(torch.float32 if dtype != torch.float64 else dtype) + size * unit(torch.float64)
    for j, square in squares.items():
        # f 2^e with 1/2 <= f < 1
        e = 0 if square == 0 else (square.numerator.bit_length() - square.denominator.bit_length() + 2) // 2
        e -= square != 0 and square < Fraction(4) ** (e - 1)
        assert exponents[j] == (0 if abs(e) <= most else max(e, -1020))
        of_scaled = square / Fraction(4) ** int(exponents[j])
        np.testing.assert_allclose(norms[j], 0 if square == 0 else 1 / math.sqrt(of_scaled), rtol=rtol)
    assert found["any_rescaled"] == (exponents != 0).any()
    for gap, offset in ((16 - size % 8, 0), (3, 0), (0, 1)):  # wherever the rows lie
        same_bits(run(make("inverse_norms", dtype, **matrix("weight", w, dtype, gap, offset))), found)


# --- forward of a chunk


def random_products(batch: int, classes: int, dtype: torch.dtype, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng((batch, classes, seed))
    inverse_norms = np.exp(random.uniform(-2, 2, classes))
    cosines = random.uniform(-0.6, 0.6, (batch, classes))
    return round_to(cosines / inverse_norms / 1.25, dtype), round_to(inverse_norms, dtype)


def chunk_fields(batch: int, classes: int, scale: float, first: int = 0) -> dict[str, Any]:
    return {"batch": batch, "classes": classes, "scale": np.float64(scale), "first": first}


def forward_case(
    products: np.ndarray, norms: np.ndarray, of: np.ndarray, dtype: torch.dtype, scale: float = 30.0, first: int = 0,
    gap: int = 0, offset: int = 0, **more: Any,
) -> Arrays:  # fmt: skip
    real = real_of(dtype)
    return make(
        "forward_chunk",
        dtype,
        **chunk_fields(*products.shape, scale, first),
        **simt.strided("products", products, real, gap, offset),
        **simt.shifted("inverse_norms", norms, real, more.pop("norms_offset", 0)),
        rows=of,
        **more,
    )


def forward_reference(
    products: np.ndarray, norms: np.ndarray, of: np.ndarray, scale: float, first: int, u: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The cosines, and the rows from that chunk alone."""
    cosines = products * norms * field(of, "inverse_norm")[:, None]
    target = field(of, "target")[:, None] == first + np.arange(products.shape[1])
    cosines = np.where(target, -np.inf, cosines)
    result = of.copy()
    result[:, 4] = cosines.max(1)
    with np.errstate(invalid="ignore"):
        result[:, 5] = np.nan_to_num(np.exp(scale * (cosines - cosines.max(1, keepdims=True)))).sum(1)
    if u is not None:
        result[:, 6] = (np.where(target, 0, cosines) * u * scale).sum(1)
    return cosines, result


def close_rows(found: np.ndarray, expected: np.ndarray, dtype: torch.dtype, scale: float, terms: int) -> None:
    """The sums have `terms` terms: four in a row in Real, the rest in double. A term's cosine has two roundings, which
    its exponent magnifies by the scale.
    """
    error = unit(dtype)
    np.testing.assert_array_equal(found[:, [0, 1, 2, 3, 7]], expected[:, [0, 1, 2, 3, 7]])
    np.testing.assert_allclose(found[:, 4], expected[:, 4], atol=2 * error)
    np.testing.assert_allclose(found[:, 5], expected[:, 5], rtol=error * (6 * scale + 8))
    np.testing.assert_allclose(found[:, 6], expected[:, 6], atol=8 * error * scale * terms)


@EVERY_REAL
@pytest.mark.parametrize("classes", SIZES)
def test_forward_chunk(classes: int, dtype: torch.dtype) -> None:
    batch, first, scale = 9, 100, 30.0
    products, norms = random_products(batch, classes, dtype, 1)
    random = np.random.default_rng(classes)
    u = round_to(random.uniform(0, 2, classes), dtype)
    target = first + np.array([0, classes - 1, -1, classes, -first, classes // 2, 10**9, 0, -7])
    of = rows(batch, inverse_norm=1.25, target=target)
    for smoothing, weights, places in ((False, None, {}), (True, None, {"offset": 1}), (True, u, {"gap": 3})):
        more = {"smoothing": smoothing, "class_weight": None if weights is None else weights.astype(real_of(dtype))}
        case = forward_case(products, norms, of, dtype, scale, first, **places, **more)
        results = run(case)
        cosines, expected = forward_reference(
            products, norms, of, scale, first, (np.ones(classes) if weights is None else u) if smoothing else None
        )
        found = from_strided(results, case, "products", products.shape)
        np.testing.assert_allclose(found, cosines, atol=2 * unit(dtype))
        close_rows(results["rows"], expected, dtype, scale, classes)
        # Where the rows and norms lie, what is kept, and who else is there changes no bit.
        elsewhere = run(forward_case(products, norms, of, dtype, scale, first, offset=2, gap=5, norms_offset=1, **more))
        np.testing.assert_array_equal(elsewhere["rows"], results["rows"])
        case = forward_case(products[3:5], norms, of[3:5], dtype, scale, first, keep_cosines=False, **more)
        part = run(case)
        np.testing.assert_array_equal(part["rows"], results["rows"][3:5])
        np.testing.assert_array_equal(from_strided(part, case, "products", (2, classes)), products[3:5])


@EVERY_REAL
def test_chunks_one_after_another(dtype: torch.dtype) -> None:
    batch, classes, scale = 5, 1700, 64.0
    products, norms = random_products(batch, classes, dtype, 2)
    u = round_to(np.random.default_rng(3).uniform(0, 2, classes), dtype)
    start = rows(batch, inverse_norm=1.25, target=[0, 600, 601, 1699, 1000])
    _, expected = forward_reference(products, norms, start, scale, 0, u)
    for cuts in ([0, 1700], [0, 600, 601, 1200, 1700], [0, 1, 1700]):
        of = start
        for begin, end in itertools.pairwise(cuts):
            case = forward_case(
                products[:, begin:end], norms[begin:end], of, dtype, scale, begin, smoothing=True,
                class_weight=u[begin:end].astype(real_of(dtype)),
            )  # fmt: skip
            of = run(case)["rows"]
        close_rows(of, expected, dtype, scale, classes)


@EVERY_REAL
def test_a_spoilt_row_spoils_no_other(dtype: torch.dtype) -> None:
    products, norms = random_products(12, 600, dtype, 4)
    of = rows(12, inverse_norm=1.25, target=7)
    clean = run(forward_case(products, norms, of, dtype, smoothing=True))
    for spoilt in (np.nan, np.inf, -np.inf):
        products[4, 555] = spoilt
        results = run(forward_case(products, norms, of, dtype, smoothing=True))
        others = np.arange(12) != 4
        np.testing.assert_array_equal(results["rows"][others], clean["rows"][others])
        assert np.isnan(results["rows"][4, 5])


def test_rows_without_a_target_stay_as_they_are() -> None:
    products, norms = random_products(3, 40, torch.float32, 5)
    of = rows(3, target=[IGNORED, 3, OUT_OF_RANGE])
    case = forward_case(products, norms, of, torch.float32)
    results = run(case)
    np.testing.assert_array_equal(results["rows"][[0, 2]], of[[0, 2]])
    np.testing.assert_array_equal(from_strided(results, case, "products", (3, 40))[[0, 2]], products[[0, 2]])


# --- loss


def loss_fields(scale: float, smoothing: float, u: np.ndarray | None, classes: int, real: Any) -> dict[str, Any]:
    return {
        "scale": np.float64(scale),
        "label_smoothing": np.float64(smoothing),
        "class_weight": None if u is None else u.astype(real),
        "weight_sum": np.array([classes if u is None else u.sum()], np.float64),
        "num_classes": classes,
    }


@EVERY_REAL
def test_loss(dtype: torch.dtype) -> None:
    batch, classes, scale = 300, 50, 20.0
    random = np.random.default_rng(6)
    logits = scale * random.uniform(-1, 1, (batch, classes))
    logits[:100] *= 3
    labels = random.integers(0, classes, batch)
    chosen = np.arange(classes) == labels[:, None]
    others = np.where(chosen, -np.inf, logits)
    most = others.max(1)
    for smoothing in (0.0, 0.1):
        for u in (None, round_to(random.uniform(0, 2, classes), dtype)):
            weight = np.ones(classes) if u is None else u
            of = rows(
                batch,
                logit=logits[chosen],
                most=most / scale,
                sum=np.exp(others - most[:, None]).sum(1),
                weighted=(np.where(chosen, 0, logits) * weight).sum(1),
                target=labels,
            )
            of[7, 7], of[8, 7], of[9, 5] = IGNORED, OUT_OF_RANGE, np.nan
            of[8, 2:4] = np.nan
            fields = loss_fields(scale, smoothing, u, classes, real_of(dtype))
            case = make("loss", dtype, batch=batch, rows=of, **fields)
            found = run(case)["loss"]
            expected = torch.nn.functional.cross_entropy(
                torch.from_numpy(logits),
                torch.from_numpy(labels),
                weight=torch.from_numpy(weight),
                label_smoothing=smoothing,
                reduction="none",
            ).numpy()
            assert found[7] == 0
            assert np.isnan(found[8:10]).all()
            rest = [k for k in range(batch) if k not in (7, 8, 9)]
            # In double but for the last rounding; the reference itself loses the digits of a small loss.
            np.testing.assert_allclose(found[rest], expected[rest], rtol=unit(dtype), atol=1e-13 * 60)


def test_loss_without_others_and_near_zero() -> None:
    of = rows(3, logit=[5.0, 64.0, -700.0], most=[-np.inf, -1.0, 1.0], sum=[0.0, 3.0, 3.0], target=0)
    fields = loss_fields(64.0, 0.0, None, 1, np.float64)
    found = run(make("loss", torch.float64, batch=3, rows=of, **fields))["loss"]
    np.testing.assert_allclose(found, [0, 3 * math.exp(-128), 764 + math.log(3)], rtol=1e-13)


# --- backward of a chunk


def backward_case(
    products: np.ndarray, norms: np.ndarray, of: np.ndarray, grad: np.ndarray, dtype: torch.dtype, out: torch.dtype,
    settings: dict[str, Any], first: int = 0, gap: int = 0, offset: int = 0, **more: Any,
) -> Arrays:  # fmt: skip
    real = real_of(dtype)
    return make(
        "backward_chunk",
        dtype,
        **{**chunk_fields(*products.shape, 1.0, first), **settings},
        **simt.strided("products", products, real, gap, offset),
        **simt.shifted("inverse_norms", norms, real),
        grad_loss=grad.astype(real),
        rows=of,
        product_dtype=out,
        **more,
    )


def gradient_reference(
    cosines: np.ndarray, of: np.ndarray, u: np.ndarray, e: float, scale: float, grad: np.ndarray, norms: np.ndarray
) -> np.ndarray:
    """From the definition of the loss: dL / d logit_j = p_j sum(q) - q_j, then d logit / d cos."""
    classes = cosines.shape[1]
    target = field(of, "target")
    chosen = np.arange(classes) == target[:, None]
    logits = np.where(chosen, field(of, "logit")[:, None], scale * cosines)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    q = (1 - e) * chosen * u + e / classes * u
    slope = np.where(chosen, field(of, "slope")[:, None], scale)
    g = grad[:, None] * slope * (p * q.sum(1, keepdims=True) - q)
    return g * field(of, "inverse_norm")[:, None] * norms


@EVERY_REAL
@pytest.mark.parametrize("classes", [1, 3, 31, 33, 129, 512, 1000, 2050])
def test_backward_chunk(classes: int, dtype: torch.dtype) -> None:
    batch, scale = 9, 30.0
    products, norms = random_products(batch, classes, dtype, 7)
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, batch)
    of = rows(batch, inverse_norm=1.25, target=labels, logit=random.uniform(-9, 20, batch), slope=scale * 0.8)
    grad = round_to(random.standard_normal(batch), dtype)
    for e, u, gap in ((0.0, None, 0), (0.1, round_to(random.uniform(0, 2, classes), dtype), 1), (0.2, None, 4)):
        weight = np.ones(classes) if u is None else u
        cosines, after = forward_reference(products, norms, of, scale, 0, weight)
        after[3, 7], after[4, 7], after[6, 5] = IGNORED, OUT_OF_RANGE, np.nan
        after[4, 2:4] = np.nan
        grad[5] = 0
        raw = products * norms * 1.25
        expected = gradient_reference(raw, after, weight, e, scale, grad, norms)
        settings = loss_fields(scale, e, u, classes, real_of(dtype))
        for out in products_of(dtype):
            for are_cosines in (False, True):
                given = np.where(np.isinf(cosines), -np.inf, cosines) if are_cosines else products
                case = backward_case(given, norms, after, grad, dtype, out, settings, gap=gap, are_cosines=are_cosines)
                found = values(run(case)["out"], out)
                assert (found[[3, 5]] == 0).all()
                assert np.isnan(found[4]).all()
                assert np.isnan(found[6]).all()
                fine = [0, 1, 2, 7, 8]
                # Two roundings of the cosine, and of what the exponent is made of, by the scale; a few of the products.
                size = np.abs(grad)[:, None] * scale * (1 + weight) * 1.25 * norms
                atol = (size * unit(dtype) * (4 * scale + 10))[fine]
                if out in HALVES:
                    atol = atol + np.abs(expected[fine]) * unit(out) + torch.finfo(out).smallest_normal * unit(out)
                assert (np.abs(found[fine] - expected[fine]) <= atol).all()


@EVERY_REAL
def test_backward_in_place_and_by_parts(dtype: torch.dtype) -> None:
    """The same bits, whatever the chunk and the place."""
    batch, classes = 5, 600
    products, norms = random_products(batch, classes, dtype, 8)
    of = rows(batch, inverse_norm=1.25, target=[0, 599, 300, 299, 5], logit=3.0, slope=20.0)
    _, of = forward_reference(products, norms, of, 30.0, 0, None)
    grad = np.arange(1.0, 6)
    u = round_to(np.random.default_rng(1).uniform(0, 2, classes), dtype)
    settings = loss_fields(30.0, 0.1, u, classes, real_of(dtype))
    whole = run(backward_case(products, norms, of, grad, dtype, dtype, settings, gap=1))["out"]
    in_place = run(backward_case(products, norms, of, grad, dtype, dtype, settings, in_place=True))["products"]
    np.testing.assert_array_equal(in_place.reshape(whole.shape), whole)
    for begin, end in ((0, 300), (300, 600), (299, 301)):
        part = products[:, begin:end]
        found = run(backward_case(part, norms[begin:end], of, grad, dtype, dtype, settings, first=begin))["out"]
        np.testing.assert_array_equal(found, whole[:, begin:end])


# --- logits


@EVERY_REAL
@pytest.mark.parametrize("classes", [1, 31, 33, 129, 512, 2050])
def test_logits(classes: int, dtype: torch.dtype) -> None:
    batch, first, real = 10, 40, real_of(dtype)
    products, norms = random_products(batch, classes, dtype, 9)
    target = np.array([first, first + classes - 1, first - 1, IGNORED, OUT_OF_RANGE, 0, first, first, first, first])
    of = rows(batch, inverse_norm=1.25, target=target, logit=np.arange(10.0), slope=np.arange(10.0) + 0.5)
    chosen = first + np.arange(classes) == target[:, None]
    fields = {**chunk_fields(batch, classes, 64.0, first), "rows": of}
    for gap, offset in ((0, 0), (2, 1)):
        case = make(
            "logits", dtype, **fields, **simt.strided("products", products, real, gap, offset),
            **simt.shifted("inverse_norms", norms, real, offset),
        )  # fmt: skip
        found = from_strided(run(case), case, "products", products.shape)
        expected = np.where(chosen, field(of, "logit")[:, None], 64 * products * norms * 1.25)
        expected[4] = np.nan
        np.testing.assert_allclose(found, expected, rtol=3 * unit(dtype))
    grads = round_to(np.random.default_rng(classes).standard_normal((batch, classes)), dtype)
    expected = grads * np.where(chosen, field(of, "slope")[:, None], 64) * 1.25 * norms
    expected[4] = np.nan
    for layout in ("rows", "unaligned", "columns", "one number"):
        wide = np.full((batch, classes + 3), np.nan)
        wide[:, :classes] = grads
        grad, row_stride, col_stride = {
            "rows": (grads, classes, 1),
            "unaligned": (wide, classes + 3, 1),
            "columns": (grads.T, 1, batch),
            "one number": (np.ones(1), 0, 0),
        }[layout]
        scaled = expected / grads if layout == "one number" else expected
        for out in products_of(dtype):
            case = make(
                "logits_backward", dtype, **fields, **simt.shifted("inverse_norms", norms, real),
                grad_logits=grad.astype(real), row_stride=row_stride, col_stride=col_stride, product_dtype=out,
            )  # fmt: skip
            found = values(run(case)["out"], out)
            np.testing.assert_allclose(found, scaled, rtol=4 * unit(dtype) + unit(out), atol=torch.finfo(out).tiny)


# --- projection


@pytest.mark.parametrize("dtype", [*REALS, *HALVES])
@pytest.mark.parametrize("size", SIZES)
def test_project(size: int, dtype: torch.dtype) -> None:
    real = real_of(dtype)
    random = np.random.default_rng(size)
    count = 10
    of_real = torch.float64 if real == np.float64 else torch.float32
    v = round_to(random.standard_normal((count, size)), dtype)
    v[2] = 0
    g = round_to(random.standard_normal((count, size)) + 5 * v, of_real)
    with np.errstate(divide="ignore"):
        inverse = 1 / np.sqrt((v**2).sum(1))
    inverse[2] = 0
    inverse = round_to(inverse, of_real)
    expected = g - v * (v * g).sum(1, keepdims=True) * inverse[:, None] ** 2
    # Three roundings of v's share of g, which is at most |g|; the sum is in double.
    atol = 4 * unit(of_real) * np.sqrt((g**2).sum(1, keepdims=True))
    whole = None
    for gap, in_place in ((0, False), (1, True), (8, False)):
        case = make(
            "project", dtype, **matrix("v", v, dtype, gap), grad=g.astype(real), inverse_norms=inverse.astype(real),
            in_place=in_place,
        )  # fmt: skip
        found = run(case)["grad" if in_place else "out"]
        assert (np.abs(found - expected) <= atol).all()
        whole = found if whole is None else whole
        np.testing.assert_array_equal(found, whole)
    powers = np.array([1.0, 2.0**-90, 4.0, 0.5, 0, 2, 2, 2, 2, 2])
    of = rows(count, power=powers, inverse_norm=inverse)
    g[4, 0] = np.nan  # of a row that takes no part
    expected[4] = atol[4] = 0
    found = run(make("project", dtype, **matrix("v", v, dtype), grad=g.astype(real), rows=of))["out"]
    assert (np.abs(found - powers[:, None] * expected) <= powers[:, None] * atol).all()


@pytest.mark.parametrize("dtype", [*REALS, *HALVES])
def test_project_rescaled_classes(dtype: torch.dtype) -> None:
    """In terms of w' = w 2^-e, and then by 2^-e, which may take it out of Real, but makes no NaN of it."""
    real, size = real_of(dtype), 70
    of_real = torch.float64 if real == np.float64 else torch.float32
    random = np.random.default_rng(20)
    largest = math.frexp(torch.finfo(dtype).max)[1] - 2
    exponents = np.array([0, -largest, largest, -20, 9], np.int32)
    v = round_to(random.standard_normal((5, size)) / 2**3, dtype)
    stored = round_to(v * 2.0 ** exponents[:, None].astype(float), dtype)
    v = stored * 2.0 ** -exponents[:, None].astype(float)
    g = round_to(random.standard_normal((5, size)) * 2.0**-30, of_real)
    g[3] = 0
    inverse = round_to(1 / np.sqrt((v**2).sum(1)), of_real)
    expected = g - v * (v * g).sum(1, keepdims=True) * inverse[:, None] ** 2
    case = make(
        "project", dtype, **matrix("v", stored, dtype, 3), grad=g.astype(real), inverse_norms=inverse.astype(real),
        exponents=exponents,
    )  # fmt: skip
    found = run(case)["out"].astype(np.float64)
    atol = 4 * unit(of_real) * np.sqrt((g**2).sum(1, keepdims=True))
    power = 2.0 ** -exponents[:, None].astype(float)
    most, least = float(torch.finfo(of_real).max), float(torch.finfo(of_real).tiny)
    fits = np.abs(expected * power) < most / 2
    assert np.isfinite(found[fits]).all()
    assert not np.isnan(found).any()
    assert (np.abs(found - expected * power) <= atol * power + least)[fits].all()


# --- what is rare


def tangents(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u_w - c u_x and u_x - c u_w, in numbers that are long enough for neither to lose a digit of a double."""
    x, w = x.astype(np.longdouble), w.astype(np.longdouble)
    u_x, u_w = x / np.sqrt((x**2).sum()), w / np.sqrt((w**2).sum())
    c = (u_x * u_w).sum()
    return u_w - c * u_x, u_x - c * u_w


@pytest.mark.parametrize("types", TYPES[:5])  # an embedding in bfloat16 is seldom so near to a weight in float32
@pytest.mark.parametrize("sign", [1, -1])
def test_aligned_rows(sign: int, types: tuple[torch.dtype, ...]) -> None:
    """The angle and both gradients, of angles that are too small for a cosine."""
    size, classes, first = 33, 5, 1
    real = torch.float64 if types[2] == torch.float64 else torch.float32
    random = np.random.default_rng(21)
    weight = round_to(random.standard_normal((classes, size)), types[1])
    labels = np.array([1, 2, 3, 1, 0, 4])
    step = max(unit(t) for t in types) / 2
    x = weight[labels] * (1 + 0.05 * step**0.5 * random.standard_normal((len(labels), size))) * sign
    x = round_to(x, types[0])
    margin = Margin(m2=0.5)
    case = start_case(x, weight, labels, types, margin)
    found = run(case)
    scaled, of = values(found["scaled_x"], types[2]), found["rows"]
    np.testing.assert_array_equal(field(of, "aligned"), sign)
    own = random.standard_normal(len(labels))
    part = {
        **matrix("x", scaled, types[2]), **matrix("weight", weight[first:4], types[1]), "first": first, "rows": of,
        "own": own,
    }  # fmt: skip
    before = np.full((3, size), 0.5)
    grad_w = run(make("own_gradients_of_weight", real, **part, grad=before.astype(real_of(real))))["grad"]
    part |= matrix("weight", weight, types[1]) | {"first": 0}
    zeros = np.zeros(x.shape, real_of(real))
    grad_x = run(make("own_gradients_of_x", real, **part, grad=zeros))["grad"]
    expected_w = before.copy()
    for b, label in enumerate(labels):
        at_x, at_w = tangents(scaled[b], weight[label])
        sine = float(np.sqrt((at_x**2).sum()))
        theta = math.asin(sine) if sign > 0 else math.pi - math.asin(sine)
        # Unit vectors in double are right to some of its units, their difference to so many of the sine's.
        error = 8 * unit(torch.float64) / sine
        np.testing.assert_allclose(of[b, 2], 64 * math.cos(theta + 0.5), rtol=0, atol=64 * 8 * unit(torch.float64))
        np.testing.assert_allclose(
            of[b, 3], 64 * math.sin(theta + 0.5) / max(sine, LEAST_SINE), rtol=error + 8 * unit(torch.float64)
        )
        of_x = own[b] * at_x * of[b, 0] / np.linalg.norm(scaled[b])
        np.testing.assert_allclose(
            grad_x[b], of_x.astype(float), rtol=0, atol=(error + unit(real)) * float(np.abs(of_x).max())
        )
        if first <= label < 4:
            expected_w[label - first] += (own[b] * at_w / np.linalg.norm(weight[label])).astype(float)
    atol = 4 * unit(real) + 16 * unit(torch.float64) / step**0.5
    np.testing.assert_allclose(grad_w, expected_w, rtol=0, atol=atol)
    # Only what is aligned, and whose class is among these.
    of[:, 8] = 0
    np.testing.assert_array_equal(run(make("own_gradients_of_x", real, **part, grad=zeros))["grad"], 0)


@EVERY_REAL
def test_backward_of_aligned_rows(dtype: torch.dtype) -> None:
    """H of the target is 0 and its gradient stands apart; nothing else changes a bit."""
    batch, classes, scale, first = 6, 2100, 30.0, 7
    products, norms = random_products(batch, classes, dtype, 22)
    target = np.array([first, first + 2099, first + 5, first - 1, first + 9, first + 2050])
    of = rows(batch, inverse_norm=1.25, target=target, logit=3.0, slope=20.0)
    _, of = forward_reference(products, norms, of, scale, first, None)
    grad = np.arange(1.0, batch + 1)
    grad[4] = 0
    settings = loss_fields(scale, 0.0, None, classes + 20, real_of(dtype))
    aligned = of.copy()
    aligned[:, 8] = [1, -1, 0, 1, 1, 1]
    strides = {"row_stride": classes, "col_stride": 1, "product_dtype": dtype}
    of_chunk = chunk_fields(batch, classes, scale, first) | simt.shifted("inverse_norms", norms, real_of(dtype))
    of_chunk |= {"grad_logits": products.astype(real_of(dtype)), **strides}
    for plain, other in (
        [run(backward_case(products, norms, r, grad, dtype, dtype, settings, first=first)) for r in (of, aligned)],
        [run(make("logits_backward", dtype, **of_chunk, rows=r)) for r in (of, aligned)],
    ):
        expected = plain["out"].copy()
        for b in (0, 1, 4, 5):
            place = int(target[b]) - first
            of_cosine = expected[b, place] / (1.25 * norms[place])
            np.testing.assert_allclose(other["own"][b], of_cosine, rtol=4 * unit(dtype))
            expected[b, place] = 0
        np.testing.assert_array_equal(other["out"], expected)


@pytest.mark.parametrize("types", [(torch.float64,), (torch.float32,), (torch.float16,), (torch.bfloat16,)])
def test_rescaled_classes(types: tuple[torch.dtype]) -> None:
    """Their products and their part of the gradient are those of w 2^-e; nothing else changes a bit."""
    (dtype,) = types
    real = torch.float64 if dtype == torch.float64 else torch.float32
    batch, classes, size = 9, 70, 40
    random = np.random.default_rng(23)
    largest = math.frexp(torch.finfo(dtype).max)[1] - 3
    exponents = np.zeros(classes, np.int32)
    exponents[[0, 31, 32, 69]] = [largest, -largest, 11, -largest - 2]
    x, w = (round_to(random.standard_normal((n, size)) / 8, dtype) for n in (batch, classes))
    stored = round_to(w * 2.0 ** exponents[:, None].astype(float), dtype)
    w = stored * 2.0 ** -exponents[:, None].astype(float)
    chosen = exponents != 0
    products = round_to(random.standard_normal((batch, classes)), real)
    case = make(
        "rescaled_products", dtype, **matrix("x", x, dtype), **matrix("weight", stored, dtype, 3), exponents=exponents,
        **simt.strided("products", products, real_of(real), 2),
    )  # fmt: skip
    found = from_strided(run(case), case, "products", products.shape)
    np.testing.assert_array_equal(found[:, ~chosen], products[:, ~chosen])
    np.testing.assert_allclose(found[:, chosen], x @ w[chosen].T, rtol=0, atol=2 * unit(real) * size / 8)
    h = round_to(random.standard_normal((batch, classes)), dtype)
    before = round_to(random.standard_normal((batch, size)), real)
    for add, any_rescaled in itertools.product((True, False), (1, 0)):
        case = make(
            "rescaled_gradients", dtype, **matrix("weight", stored, dtype, 3), exponents=exponents, batch=batch,
            product_dtype=dtype, h=bits(h, dtype), grad_x=before.astype(real_of(real)), add=add,
            any_rescaled=any_rescaled,
        )  # fmt: skip
        results = run(case)
        expected = before * add + (h[:, chosen] @ w[chosen] if any_rescaled else 0)
        np.testing.assert_allclose(results["grad_x"], expected, rtol=0, atol=8 * unit(real) * 8)
        left = np.where(chosen & (any_rescaled == 1), 0, h)
        np.testing.assert_array_equal(values(results["h"], dtype), left)


# --- all together


def run_loss(
    x: np.ndarray, weight: np.ndarray, labels: np.ndarray, margin: Margin, dtype: torch.dtype, u: np.ndarray | None,
    e: float, grad: np.ndarray, scale: float, step: int, store: bool,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """As the operator does: numpy's products, chunks of `step` classes, and the kernels in between."""
    real, classes = real_of(dtype), len(weight)
    started = run(start_case(x, weight, labels, (dtype,) * 3, margin, scale=np.float64(scale)))
    scaled, of = started["scaled_x"], started["rows"]
    settings = loss_fields(scale, e, u, classes, real)
    kept = {}
    for first in range(0, classes, step):
        w = weight[first : first + step].astype(real)
        lengths = run(make("inverse_norms", dtype, **matrix("weight", w, dtype)))
        norms, exponents = lengths["inverse_norms"], lengths["exponents"]
        with np.errstate(all="ignore"):  # of rescaled classes, whose products come next
            products = scaled @ w.T
        case = make(
            "rescaled_products", dtype, **matrix("x", scaled, dtype), **matrix("weight", w, dtype), exponents=exponents,
            **simt.strided("products", np.nan_to_num(products), real),
        )  # fmt: skip
        products = from_strided(run(case), case, "products", products.shape)
        case = forward_case(
            products, norms, of, dtype, scale, first, smoothing=e != 0, keep_cosines=store,
            class_weight=None if u is None else u[first : first + step].astype(real),
        )  # fmt: skip
        results = run(case)
        of = results["rows"]
        kept[first] = (from_strided(results, case, "products", (len(x), len(w))), norms, exponents)
    loss = run(make("loss", dtype, batch=len(x), rows=of, **settings))["loss"]
    any_rescaled = any((exponents != 0).any() for _, _, exponents in kept.values())
    raw_x, own = np.zeros(x.shape, real), np.zeros(len(x))
    grad_weight = []
    for first, (products, norms, exponents) in kept.items():
        w = weight[first : first + step].astype(real)
        results = run(backward_case(products, norms, of, grad, dtype, dtype, settings, first=first, are_cosines=store))
        h, own = results["out"], results["own"]
        raw = make(
            "project", dtype, **matrix("v", w, dtype), grad=h.T @ scaled, inverse_norms=norms, exponents=exponents,
            in_place=True,
        )  # fmt: skip
        pairs = {**matrix("x", scaled, dtype), **matrix("weight", w, dtype), "first": first, "rows": of, "own": own}
        grad_weight.append(run(make("own_gradients_of_weight", dtype, **pairs, grad=run(raw)["grad"]))["grad"])
        case = make(
            "rescaled_gradients", dtype, **matrix("weight", w, dtype), exponents=exponents, batch=len(x),
            product_dtype=dtype, h=h, grad_x=raw_x, add=first > 0, any_rescaled=any_rescaled,
        )  # fmt: skip
        results = run(case)
        raw_x = results["grad_x"] + results["h"] @ w
    grad_x = run(make("project", dtype, **matrix("v", scaled, dtype), grad=raw_x, rows=of))["out"]
    pairs |= matrix("weight", weight, dtype) | {"first": 0}
    return loss, run(make("own_gradients_of_x", dtype, **pairs, grad=grad_x))["grad"], np.concatenate(grad_weight)


@EVERY_REAL
@pytest.mark.parametrize("e", [0.0, 0.1])
@pytest.mark.parametrize("margin", [Margin(m2=0.5, beyond_pi=1), Margin(m3=0.35)])
def test_loss_and_gradients_against_autograd(margin: Margin, e: float, dtype: torch.dtype) -> None:
    batch, classes, size, scale = 13, 90, 24, 16.0
    random = np.random.default_rng(10)
    x = round_to(random.standard_normal((batch, size)) * 7, dtype)
    weight = round_to(0.1 * random.standard_normal((classes, size)), dtype)
    labels = random.integers(0, classes, batch)
    labels[4] = -100
    u = round_to(random.uniform(0.2, 2, classes), dtype)
    grad = random.standard_normal(batch)
    tx, tw = (torch.from_numpy(a).requires_grad_() for a in (x, weight))
    cosines = torch.nn.functional.normalize(tx) @ torch.nn.functional.normalize(tw).T
    theta = torch.acos(cosines)
    other = torch.cos(theta + margin.m2) if margin.m2 else cosines - margin.m3
    if margin.m2:
        other = torch.where(theta + margin.m2 > math.pi, cosines - margin.m2 * math.sin(margin.m2), other)
    logits = scale * torch.where(torch.arange(classes) == torch.from_numpy(labels)[:, None], other, cosines)
    expected = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(labels), torch.from_numpy(u), label_smoothing=e, reduction="none"
    )
    gradients = torch.autograd.grad(expected, (tx, tw), torch.from_numpy(round_to(grad, dtype)))
    found = None
    for step, store in ((90, True), (90, False), (37, True)):
        before, found = found, run_loss(x, weight, labels, margin, dtype, u, e, grad, scale, step, store)
        # Products of `size` terms, magnified by the scale, of gradients that sum up to `classes` terms.
        error = unit(dtype) * scale * (size + 10)
        for ours, theirs in zip(found, (expected.detach(), *gradients), strict=True):
            atol = 2 * error * float(theirs.abs().max())
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=atol)
        assert (found[1][4] == 0).all()
        if before is not None and step == 90:
            np.testing.assert_allclose(found[1], before[1], atol=error)


@EVERY_REAL
@pytest.mark.parametrize("store", [True, False])
def test_rare_rows_against_the_cpu(store: bool, dtype: torch.dtype) -> None:
    """Long and short classes and embeddings, and rows that are aligned with their target, two of them with one."""
    batch, classes, size, scale = 9, 90, 24, 4.0
    random = np.random.default_rng(30)
    weight = random.integers(-3, 4, (classes, size)).astype(float)  # which keep their digits, however short
    x = random.standard_normal((batch, size))
    labels = random.integers(0, classes, batch)
    labels[2] = labels[0]
    x[[0, 1, 2]] = weight[labels[[0, 1, 2]]] * (1 + 1e-5 * random.standard_normal((3, size)))
    least = math.frexp(torch.finfo(dtype).smallest_normal * unit(dtype))[1] - 1
    powers = np.array([0, 0, least, 0, math.frexp(torch.finfo(dtype).max)[1] - 3, 120, -120])
    weight = np.ldexp(weight, powers[np.arange(classes) % 7][:, None])
    x = np.ldexp(x, np.array([0, 40, 0, -100, 100, 0, 0, 0, 0])[:, None])
    x, weight = round_to(x, dtype), round_to(weight, dtype)
    grad = round_to(random.standard_normal(batch), dtype)
    tx, tw = (torch.from_numpy(a).to(dtype).requires_grad_() for a in (x, weight))
    expected = otface_cuda.margin_softmax_loss(
        tx, tw, torch.from_numpy(labels), margin=otface_cuda.ArcFace(0.5), scale=scale, reduction="none"
    )
    gradients = torch.autograd.grad(expected, (tx, tw), torch.from_numpy(grad).to(dtype))
    found = run_loss(x, weight, labels, Margin(m2=0.5, beyond_pi=1), dtype, None, 0.0, grad, scale, 37, store)
    error = unit(dtype) * scale * (size + 10)
    for ours, theirs in zip(found, (expected.detach(), *gradients), strict=True):
        theirs = theirs.double().numpy()
        assert not np.isnan(ours).any()
        rows_of_both = (v.reshape(len(v), -1).astype(np.float64) for v in (ours, theirs))
        for one, other in zip(*rows_of_both, strict=True):
            if np.isfinite(other).all():
                np.testing.assert_allclose(one, other, rtol=0, atol=2 * error * np.abs(other).max() + 1e-44)


# --- what does not depend on the order of threads, and the sanitizers


def all_steps(seed: int = 0) -> list[Arrays]:
    """Every kernel in every type it is compiled for, at sizes that take all of its paths."""
    made = []
    for number, dtype in enumerate(REALS):
        real = real_of(dtype)
        random = np.random.default_rng(11)
        batch, classes, size = 10, 600 + number, 37
        x, weight = (round_to(random.standard_normal((n, size)), dtype) for n in (batch, classes))
        labels = random.integers(-1, classes, batch)
        labels[0] = -100
        products, norms = random_products(batch, classes, dtype, 12)
        of = rows(batch, inverse_norm=1.25, target=np.where(labels == -100, IGNORED, np.maximum(labels, 0)), slope=30.0)
        _, after = forward_reference(products, norms, of, 30.0, 0, None)
        u = random.uniform(0, 2, classes)
        settings = loss_fields(30.0, 0.1, u, classes, real)
        made.append(forward_case(products, norms, of, dtype, smoothing=True, class_weight=u.astype(real)))
        made.append(forward_case(products, norms, of, dtype, gap=8 - classes % 4))
        made.append(make("loss", dtype, batch=batch, rows=after, **settings))
        of_chunk = chunk_fields(batch, classes, 30.0) | {"rows": after} | simt.shifted("inverse_norms", norms, real)
        made.append(make("logits", dtype, **of_chunk, **simt.strided("products", products, real)))
        for out in products_of(dtype):
            made.append(start_case(x, weight, labels, (dtype, out, out), gap=1))
            made.append(make("inverse_norms", dtype, **matrix("weight", weight, out, gap=3)))
            made.append(make("inverse_norms", dtype, **matrix("weight", x[:3].repeat(16, axis=1), out)))
            v = x.repeat(16, axis=1)
            made.append(make("project", dtype, **matrix("v", v, out), grad=v.astype(real), rows=of))
            made.append(
                make("project", dtype, **matrix("v", x, out), grad=x.astype(real), inverse_norms=x[:, 0].astype(real))
            )
            exponents = np.where(np.arange(classes) % 50 == 3, 3, 0).astype(np.int32)
            made.append(
                make("project", dtype, **matrix("v", weight, out), grad=weight.astype(real),
                     inverse_norms=norms.astype(real), exponents=exponents)
            )  # fmt: skip
            made.append(
                make("rescaled_products", dtype, **matrix("x", x, out), **matrix("weight", weight, out),
                     exponents=exponents, **simt.strided("products", products, real))
            )  # fmt: skip
            for add in (False, True):
                made.append(
                    make("rescaled_gradients", dtype, **matrix("weight", weight, out), exponents=exponents, batch=batch,
                         product_dtype=out, h=bits(products, out), grad_x=x.astype(real), add=add)
                )  # fmt: skip
            aligned = rows(batch, target=np.array([5, 6] * 5), aligned=np.array([1, -1, 1, 1, 0] * 2))
            own = {**matrix("x", x, out), **matrix("weight", weight, out), "rows": aligned, "own": u[:batch].copy()}
            made.append(make("own_gradients_of_x", dtype, **own, grad=x.astype(real)))
            made.append(make("own_gradients_of_weight", dtype, **own, grad=weight.astype(real)))
            made.append(backward_case(products, norms, after, u[:batch], dtype, out, settings))
            strides = {"row_stride": classes, "col_stride": 1}
            grad = products.astype(real)
            made.append(make("logits_backward", dtype, **of_chunk, grad_logits=grad, **strides, product_dtype=out))
    return [case | {"seed": np.asarray(seed)} for case in made]


def test_same_bits_in_every_order() -> None:
    for first, *others in zip(*(all_steps(seed) for seed in range(4)), strict=True):
        expected = run(first)
        for k, other in enumerate(others):
            same_bits(run(other | {"poison_float": np.asarray(k % 2)}), expected)


@pytest.mark.parametrize("variant", ["address", "thread"])
def test_silent(variant: str) -> None:
    made = all_steps(seed=1)
    outcome = run_driver(variant, made)
    assert (outcome.ok, outcome.report) == (True, "")
    assert outcome.checksums == run_driver(variant, all_steps(seed=2)).checksums


def barriers_in_sources() -> set[str]:
    found = set()
    for path in sorted((ROOT / "csrc" / "margin").glob("*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.search(r"\b(sync\w*|any_in_block|gang_barrier)\(", line.split("//")[0]):
                found.add(f"{path.name}:{number}")
    return found


def test_every_missing_barrier_is_noticed() -> None:
    made = [case for case in all_steps() if bytes(case["margin_step"]) == b"backward_chunk"]
    intact = run_driver("thread", made)
    assert set(intact.barriers) == barriers_in_sources()
    for barrier in intact.barriers:
        outcome = run_driver("thread", made, barrier)
        assert "data race" in outcome.report
        assert "csrc/margin/" in outcome.report


@EVERY_REAL
def test_uses_nothing_that_was_not_written(dtype: torch.dtype) -> None:
    """Results, shared memory and workspace are full of signalling NaNs: the first operation on one ends the run."""
    made = [case for case in all_steps() if int(case["is_double"]) == (dtype == torch.float64)]
    outcome = run_driver("address", [case | {"trap_invalid": np.asarray(1)} for case in made])
    assert (outcome.ok, outcome.report) == (True, "")


def test_half_bits() -> None:
    """The helpers of these tests."""
    assert bits(np.array([1.0]), torch.bfloat16)[0] == 0x3F80
    assert values(bits(np.array([[0.1]]), torch.float16), torch.float16)[0, 0] == np.float16(0.1)
