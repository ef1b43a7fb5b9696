"""The CUDA kernels for near entries of cost matrices, run on the CPU by the host executor, compute what near.h says.

The references are its formulas: in float64 for what comes from differences, with the tolerance of a sum of d squares,
each of a few roundings; bit for bit for everything else.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from .simt import near
from .simt.kernels import Arrays, run, run_driver

COSINE, SQEUCLIDEAN, EUCLIDEAN = range(3)
REALS = [np.float32, np.float64]
SHAPES = [(1, 1, 1, 1), (3, 7, 5, 3), (2, 9, 33, 31), (2, 40, 37, 130), (1, 3, 1100, 5), (1, 4, 2, 300), (2, 5, 4, 0)]
every_real = pytest.mark.parametrize("real", REALS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_metric = pytest.mark.parametrize("metric", [COSINE, SQEUCLIDEAN, EUCLIDEAN])
distances = pytest.mark.parametrize("metric", [SQEUCLIDEAN, EUCLIDEAN])


class Problem(NamedTuple):
    """Costs as a product gives them, and which of them are near."""

    arrays: dict[str, Any]  # cost, grad, x, y, x_squares, y_squares
    differences: np.ndarray  # (B, n, m, d) in float64
    near: np.ndarray  # (B, n, m)


def problem(shape: tuple[int, int, int, int], metric: int, real: type, seed: int = 0) -> Problem:
    """A third of the points of y lies near one of x, at distances down to 0."""
    batch, rows, cols, size = shape
    random = np.random.default_rng((*shape, metric, seed))
    x, y = random.normal(size=(batch, rows, size)) + 2, random.normal(size=(batch, cols, size)) + 2
    for j in range(0, cols, 3):
        y[:, j] = x[:, j % rows] + random.normal(size=(batch, size)) * (0, 1e-5, 1e-2, 0.1)[j // 3 % 4]
    if metric == COSINE:
        x, y = (points / np.maximum(np.linalg.norm(points, axis=2, keepdims=True), 1e-30) for points in (x, y))
    x, y = x.astype(real), y.astype(real)
    squares: dict[str, Any] = {"x_squares": None, "y_squares": None}
    s = np.ones((batch, rows, cols), real)
    if metric == COSINE:
        cost = 1 - x @ y.transpose(0, 2, 1)
    else:
        centre = x.mean(1, keepdims=True)
        a, b = x - centre, y - centre
        squares = {"x_squares": (a * a).sum(2), "y_squares": (b * b).sum(2)}
        s = squares["x_squares"][:, :, None] + squares["y_squares"][:, None, :]
        cost = s - 2 * (a @ b.transpose(0, 2, 1))
    square = cost
    if metric == EUCLIDEAN:
        with np.errstate(invalid="ignore"):
            cost = np.sqrt(cost)
        square = cost * cost
    share = real((math.sqrt(size) + 4) / 1024)
    is_near = ~((square > s * share) & (square > np.finfo(real).tiny / np.finfo(real).eps))
    differences = x[:, :, None].astype(np.float64) - y[:, None].astype(np.float64)
    grad = random.normal(size=cost.shape).astype(real)
    return Problem({"cost": cost, "grad": grad, "x": x, "y": y, **squares}, differences, is_near)


def true_cost(differences: np.ndarray, metric: int) -> np.ndarray:
    square = (differences**2).sum(3)
    return np.sqrt(square) if metric == EUCLIDEAN else square / 2 if metric == COSINE else square


@every_real
@every_metric
@every_shape
def test_near_costs(shape: tuple[int, int, int, int], metric: int, real: type) -> None:
    p = problem(shape, metric, real)
    without_grad = {name: array for name, array in p.arrays.items() if name != "grad"}
    cost = run(near.make("near_costs", metric, without_grad))["cost"]
    np.testing.assert_array_equal(cost[~p.near], p.arrays["cost"][~p.near])
    expected = true_cost(p.differences, metric)
    # A difference, its square and the sum of a lane's squares are rounded, then five times that of the lanes.
    roundings = 4 + math.ceil(shape[3] / 32) + 5
    np.testing.assert_allclose(cost[p.near], expected[p.near], rtol=roundings * np.finfo(real).eps / 2)
    assert (cost[expected == 0] == 0).all() or shape[3] == 0


@every_real
@distances
@every_shape
def test_gradient(shape: tuple[int, int, int, int], metric: int, real: type) -> None:
    p = problem(shape, metric, real)
    p.arrays["grad"][:, 0] = 0
    cost = run(near.make("near_costs", metric, {k: v for k, v in p.arrays.items() if k != "grad"}))["cost"]
    given = p.arrays | {"cost": cost}
    weights = run(near.make("far_weights", metric, given))["weights"]
    with np.errstate(invalid="ignore", divide="ignore"):
        far = p.arrays["grad"] / (2 * cost) if metric == EUCLIDEAN else p.arrays["grad"]
        slope = np.where(cost == 0, 0, p.arrays["grad"] / cost if metric == EUCLIDEAN else 2 * p.arrays["grad"])
    # What comes from differences may be just above the bound, and is then not near to the gradient.
    still_near = weights == 0
    assert still_near[cost == 0].all()
    np.testing.assert_array_equal(weights[~p.near], far[~p.near])
    random = np.random.default_rng(7)
    far_x, far_y = (random.normal(size=p.arrays[name].shape).astype(real) for name in ("x", "y"))
    out = run(near.make("near_gradient", metric, given | {"far_x": far_x, "far_y": far_y}))
    terms = np.where(still_near, slope, 0).astype(np.float64)[..., None] * p.differences
    unit = np.finfo(real).eps / 2
    for name, start, part, count in (
        ("grad_x", far_x, terms.sum(2), shape[2]),
        ("grad_y", far_y, -terms.sum(1), shape[1]),
    ):
        # Each term has four roundings, and is added with one.
        size = np.abs(start) + np.abs(terms).sum(2 if name == "grad_x" else 1)
        assert (np.abs(out[name] - (start + part)) <= (count + 5) * unit * size).all()
        none = ~still_near.any(2 if name == "grad_x" else 1)
        np.testing.assert_array_equal(out[name][none], start[none])


@every_real
@every_metric
def test_out_of_range(metric: int, real: type) -> None:
    """Squares beyond the range of the type, in either direction; NaN stays where it is."""
    big, small = (1e30, 1e-30) if real == np.float32 else (1e200, 1e-200)
    if metric == COSINE:
        x = np.array([[[1, 0, 0], [np.nan, 0, 0]]], real)
        y = np.array([[[1, 0, 0], [1, small, 0], [0, 1, 0]]], real)
        expected = [[0, 0, 1], [np.nan] * 3]
        squares = None, None
    else:
        x = np.array([[[big, 0, 0], [0, 3 * small, 0], [np.nan, 0, 0], [np.inf, 0, 0]]], real)
        y = np.array([[[big, 0, 0], [-big, 0, 0], [0, 0, 4 * small], [0, 1, 0]]], real)
        expected = [[0, 2 * big, big, big], [big, big, 5 * small, 1], [np.nan] * 4, [np.inf] * 4]
        with np.errstate(over="ignore"):
            if metric == SQEUCLIDEAN:
                expected = np.square(np.array(expected, real))
            squares = (x * x).sum(2), (y * y).sum(2)
    cost = np.full((1, x.shape[1], y.shape[1]), np.nan, real)
    names = {"cost": cost, "x": x, "y": y, "x_squares": squares[0], "y_squares": squares[1]}
    found = run(near.make("near_costs", metric, names))["cost"][0]
    if metric == COSINE:  # an entry that is NaN is near
        expected[0][2] = 1
    np.testing.assert_allclose(found, np.array(expected, real), rtol=8 * np.finfo(real).eps)


def all_steps(seed: int) -> list[Arrays]:
    made = []
    for real in REALS:
        for metric in (COSINE, SQEUCLIDEAN, EUCLIDEAN):
            for shape in SHAPES[:4]:
                p = problem(shape, metric, real).arrays
                without_grad = {name: array for name, array in p.items() if name != "grad"}
                made.append(near.make("near_costs", metric, without_grad, seed))
                if metric != COSINE:
                    p["cost"] = np.nan_to_num(p["cost"])  # as near_costs would have given it
                    made.append(near.make("far_weights", metric, p, seed))
                    made.append(near.make("near_gradient", metric, p | {"far_x": p["x"], "far_y": p["y"]}, seed))
    return made


@pytest.mark.parametrize("variant", ["address", "thread"])
def test_silent(variant: str) -> None:
    outcome = run_driver(variant, all_steps(seed=1))
    assert (outcome.ok, outcome.report) == (True, "")
    assert outcome.checksums == run_driver(variant, all_steps(seed=2)).checksums
