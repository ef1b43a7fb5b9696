"""Wrong arguments are refused by name, a poisoned problem stays alone, and extreme input gives right numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda import _checks
from otface_cuda.reference import cost_matrix, sinkhorn_reference

from .problems import DTYPES, has_cuda_kernels, output_dtype, random_problem, tolerance

MODES = ["envelope", "unrolled", "implicit"]
B, N, M, D = 3, 4, 5, 2
FEATURES = 6
FUNCTIONS = ["sinkhorn", "sinkhorn_points", "sinkhorn_pairs"]
SINGLE_SOLVERS = FUNCTIONS[:2]  # those with lengths, init and return_plan


@pytest.fixture(autouse=True)
def check_values_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTFACE_CHECK", "1")


def valid_arguments(function: str) -> dict[str, Any]:
    """Arguments that are right, of which each case spoils one."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if function == "sinkhorn":
        return {"cost": rand(B, N, M), "eps": 0.1}
    if function == "sinkhorn_points":
        return {"x": rand(B, N, D), "y": rand(B, M, D), "eps": 0.1}
    return {"features": rand(FEATURES, N, D), "pairs": torch.tensor([[0, 1], [2, 3], [5, 4]]), "eps": 0.1}


def number_of_weights(function: str, name: str) -> int:
    return M if name == "b" and function != "sinkhorn_pairs" else N


def to(x: Any, device: str) -> Any:
    return x.to(device) if isinstance(x, Tensor) and x.device.type == "cpu" else x


@contextmanager
def refused(error: type[Exception], function: str, name: str, came: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The message is `function: `name` must be ..., got what came`."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert caught.type is error
    assert message.startswith(f"{function}: ")
    assert f"`{name}`" in message
    assert came in message


class Case(NamedTuple):
    value: Any
    error: type[Exception]
    came: str  # what the message says of the value


def check_refused(function: str, name: str, case: Case, device: str, **others: Any) -> None:
    arguments = valid_arguments(function) | others | {name: case.value}
    arguments = {key: to(x, device) for key, x in arguments.items()}
    with refused(case.error, function, name, case.came):
        getattr(otface_cuda, function)(**arguments)


def cases(**named: Any) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("case", [pytest.param(Case(*case), id=name) for name, case in named.items()])


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="meta")


every_function = pytest.mark.parametrize("function", FUNCTIONS)
single_solver = pytest.mark.parametrize("function", SINGLE_SOLVERS)


# Settings


@every_function
@cases(
    zero=(0.0, ValueError, "got 0.0"),
    integer_zero=(0, ValueError, "got 0"),
    negative=(-1.0, ValueError, "got -1.0"),
    nan=(math.nan, ValueError, "got nan"),
    inf=(math.inf, ValueError, "got inf"),
    string=("0.1", TypeError, "got '0.1'"),
    bool=(True, TypeError, "got True"),
    none=(None, TypeError, "got None"),
    complex=(1j, TypeError, "complex"),
    list=([0.1, 0.1, 0.1], TypeError, "list"),
    array=(np.full(B, 0.1), TypeError, "ndarray"),
    too_few=(torch.full((B - 1,), 0.1), ValueError, "(2,)"),
    too_many_dimensions=(torch.full((B, 1), 0.1), ValueError, "(3, 1)"),
    bool_tensor=(torch.ones(B, dtype=torch.bool), TypeError, "bool"),
    complex_tensor=(torch.ones(B, dtype=torch.complex64), TypeError, "complex64"),
    zero_for_one=(torch.tensor([0.1, 0.0, 0.1]), ValueError, "got 0.0 for problem 1"),
    negative_for_one=(torch.tensor([0.1, 0.1, -2.0]), ValueError, "got -2.0 for problem 2"),
    nan_for_one=(torch.tensor([math.nan, 0.1, 0.1]), ValueError, "got nan for problem 0"),
    inf_for_one=(torch.tensor([0.1, math.inf, 0.1]), ValueError, "got inf for problem 1"),
    scalar_tensor=(torch.tensor(-1.0), ValueError, "got -1.0"),
    requires_grad=(torch.full((B,), 0.1, requires_grad=True), ValueError, "require grad"),
    scalar_requires_grad=(torch.tensor(0.1, requires_grad=True), ValueError, "require grad"),
    other_device=(meta(B), ValueError, "meta"),
    scalar_on_other_device=(meta(), ValueError, "meta"),
)
def test_eps(function: str, case: Case, device: str) -> None:
    check_refused(function, "eps", case, device)


@every_function
@cases(
    negative=(-1e-3, ValueError, "got -0.001"),
    nan=(math.nan, ValueError, "got nan"),
    inf=(math.inf, ValueError, "got inf"),
    string=("0", TypeError, "got '0'"),
    bool=(False, TypeError, "got False"),
    none=(None, TypeError, "got None"),
    too_many=(torch.zeros(B + 1), ValueError, "(4,)"),
    bool_tensor=(torch.zeros(B, dtype=torch.bool), TypeError, "bool"),
    complex_tensor=(torch.zeros(B, dtype=torch.complex128), TypeError, "complex128"),
    negative_for_one=(torch.tensor([0.0, -1.0, 0.0]), ValueError, "got -1.0 for problem 1"),
    nan_for_one=(torch.tensor([0.0, 0.0, math.nan]), ValueError, "got nan for problem 2"),
    requires_grad=(torch.zeros(B, requires_grad=True), ValueError, "require grad"),
    other_device=(meta(B), ValueError, "meta"),
)
def test_tol(function: str, case: Case, device: str) -> None:
    check_refused(function, "tol", case, device)


@every_function
@pytest.mark.parametrize("name", ["max_iter", "check_every"])
@cases(
    zero=(0, ValueError, "got 0"),
    negative=(-3, ValueError, "got -3"),
    float=(10.0, TypeError, "got 10.0"),
    bool=(True, TypeError, "got True"),
    string=("10", TypeError, "got '10'"),
    none=(None, TypeError, "got None"),
    tensor=(torch.tensor(10), TypeError, "int64 tensor"),
)
def test_counts(function: str, name: str, case: Case, device: str) -> None:
    check_refused(function, name, case, device)


@every_function
@cases(
    unknown=("exact", ValueError, "got 'exact'"),
    other_case=("Envelope", ValueError, "got 'Envelope'"),
    none=(None, ValueError, "got None"),
    bool=(True, ValueError, "got True"),
)
def test_grad(function: str, case: Case, device: str) -> None:
    check_refused(function, "grad", case, device)


@pytest.mark.parametrize("function", ["sinkhorn_points", "sinkhorn_pairs"])
@cases(
    unknown=("manhattan", ValueError, "got 'manhattan'"),
    other_case=("Cosine", ValueError, "got 'Cosine'"),
    none=(None, ValueError, "got None"),
    callable=(torch.cdist, ValueError, "builtin_function_or_method"),
)
def test_metric(function: str, case: Case, device: str) -> None:
    if case.value is torch.cdist:
        case = case._replace(came=type(torch.cdist).__name__)
    check_refused(function, "metric", case, device)


@single_solver
@cases(
    int=(1, TypeError, "got 1"),
    none=(None, TypeError, "got None"),
    string=("yes", TypeError, "got 'yes'"),
    tensor=(torch.tensor(True), TypeError, "bool tensor"),
)
def test_return_plan(function: str, case: Case, device: str) -> None:
    check_refused(function, "return_plan", case, device)


@cases(
    zero=(0, ValueError, "got 0"),
    negative=(-1, ValueError, "got -1"),
    float=(1e6, TypeError, "got 1000000.0"),
    bool=(True, TypeError, "got True"),
    string=("1", TypeError, "got '1'"),
)
def test_chunk_bytes(case: Case, device: str) -> None:
    check_refused("sinkhorn_pairs", "chunk_bytes", case, device)


@every_function
def test_unknown_keyword(function: str) -> None:
    with pytest.raises(TypeError, match=rf"{function}\(\) got an unexpected keyword argument 'epsilon'"):
        getattr(otface_cuda, function)(**valid_arguments(function), epsilon=0.1)


# Data


@cases(
    vector=(torch.rand(N), ValueError, "(4,)"),
    scalar=(torch.tensor(1.0), ValueError, "()"),
    four_dimensions=(torch.rand(1, B, N, M), ValueError, "(1, 3, 4, 5)"),
    no_rows=(torch.rand(B, 0, M), ValueError, "(3, 0, 5)"),
    no_columns=(torch.rand(B, N, 0), ValueError, "(3, 4, 0)"),
    empty_batch_without_rows=(torch.rand(0, 0, M), ValueError, "(0, 0, 5)"),
    int=(torch.ones(B, N, M, dtype=torch.int64), TypeError, "int64"),
    bool=(torch.ones(B, N, M, dtype=torch.bool), TypeError, "bool"),
    complex=(torch.ones(B, N, M, dtype=torch.complex64), TypeError, "complex64"),
    float8=(torch.ones(B, N, M).to(torch.float8_e4m3fn), TypeError, "float8"),
    sparse=(torch.ones(B, N, M).to_sparse(), TypeError, "dense"),
    array=(np.ones((B, N, M)), TypeError, "ndarray"),
    list=([[0.0, 1.0], [1.0, 0.0]], TypeError, "list"),
    none=(None, TypeError, "got None"),
    other_device=(meta(B, N, M), ValueError, "meta"),
)
def test_cost(case: Case, device: str) -> None:
    check_refused("sinkhorn", "cost", case, device)


@pytest.mark.parametrize("name", ["x", "y"])
@cases(
    vector=(torch.rand(D), ValueError, "(2,)"),
    four_dimensions=(torch.rand(1, B, N, D), ValueError, "(1, 3, 4, 2)"),
    no_points=(torch.rand(B, 0, D), ValueError, "(3, 0, 2)"),
    int=(torch.ones(B, N, D, dtype=torch.int32), TypeError, "int32"),
    bool=(torch.ones(B, N, D, dtype=torch.bool), TypeError, "bool"),
    complex=(torch.ones(B, N, D, dtype=torch.complex128), TypeError, "complex128"),
    sparse=(torch.ones(B, N, D).to_sparse(), TypeError, "dense"),
    array=(np.ones((B, N, D)), TypeError, "ndarray"),
)
def test_points(name: str, case: Case, device: str) -> None:
    check_refused("sinkhorn_points", name, case, device)


@cases(
    other_rank=(torch.rand(M, D), ValueError, "(5, 2)"),
    other_batch=(torch.rand(B + 1, M, D), ValueError, "(4, 5, 2)"),
    batch_of_one=(torch.rand(1, M, D), ValueError, "(1, 5, 2)"),
    other_dimension=(torch.rand(B, M, D + 1), ValueError, "(3, 5, 3)"),
    other_dtype=(torch.rand(B, M, D, dtype=torch.float64), TypeError, "float64"),
    other_device=(meta(B, M, D), ValueError, "meta"),
)
def test_y_that_does_not_go_with_x(case: Case, device: str) -> None:
    check_refused("sinkhorn_points", "y", case, device)


def test_points_on_a_device_without_kernels() -> None:
    arguments = valid_arguments("sinkhorn_points")
    arguments["x"], arguments["y"] = arguments["x"].to("meta"), arguments["y"].to("meta")
    with refused(ValueError, "sinkhorn_points", "x", "meta"):
        otface_cuda.sinkhorn_points(**arguments)


@cases(
    matrix=(torch.rand(N, D), ValueError, "(4, 2)"),
    feature_map=(torch.rand(FEATURES, D, 2, 2), ValueError, "(6, 2, 2, 2)"),
    no_points=(torch.rand(FEATURES, 0, D), ValueError, "(6, 0, 2)"),
    int=(torch.ones(FEATURES, N, D, dtype=torch.uint8), TypeError, "uint8"),
    bool=(torch.ones(FEATURES, N, D, dtype=torch.bool), TypeError, "bool"),
    complex=(torch.ones(FEATURES, N, D, dtype=torch.complex64), TypeError, "complex64"),
    sparse=(torch.ones(FEATURES, N, D).to_sparse(), TypeError, "dense"),
    array=(np.ones((FEATURES, N, D)), TypeError, "ndarray"),
)
def test_features(case: Case, device: str) -> None:
    check_refused("sinkhorn_pairs", "features", case, device)


def test_features_on_a_device_without_kernels() -> None:
    arguments = valid_arguments("sinkhorn_pairs")
    arguments["features"], arguments["pairs"] = arguments["features"].to("meta"), arguments["pairs"].to("meta")
    with refused(ValueError, "sinkhorn_pairs", "features", "meta"):
        otface_cuda.sinkhorn_pairs(**arguments)


@cases(
    vector=(torch.tensor([0, 1]), ValueError, "(2,)"),
    triplets=(torch.tensor([[0, 1, 2]]), ValueError, "(1, 3)"),
    two_rows=(torch.zeros(2, 7, dtype=torch.int64), ValueError, "(2, 7)"),
    three_dimensions=(torch.zeros(1, 3, 2, dtype=torch.int64), ValueError, "(1, 3, 2)"),
    negative=(torch.tensor([[0, 1], [-1, 2]]), ValueError, "got -1 in pair 1"),
    too_large=(torch.tensor([[0, 1], [1, 2], [3, FEATURES]]), ValueError, "got 6 in pair 2"),
    float=(torch.tensor([[0.0, 1.0]]), TypeError, "float32"),
    bool=(torch.tensor([[False, True]]), TypeError, "bool"),
    complex=(torch.zeros(1, 2, dtype=torch.complex64), TypeError, "complex64"),
    list=([[0, 1]], TypeError, "list"),
    none=(None, TypeError, "got None"),
    other_device=(meta(3, 2, dtype=torch.int64), ValueError, "meta"),
)
def test_pairs(case: Case, device: str) -> None:
    check_refused("sinkhorn_pairs", "pairs", case, device)


def changed(weights: Tensor, value: float) -> Tensor:
    """With `value` at entry 1, of the last problem where each has its own."""
    weights.view(-1, weights.shape[-1])[-1, 1] = value
    return weights


WEIGHTS = {
    "list": lambda s: Case([1 / s] * s, TypeError, "list"),
    "array": lambda s: Case(np.full(s, 1 / s), TypeError, "ndarray"),
    "string": lambda s: Case("uniform", TypeError, "got 'uniform'"),
    "int": lambda s: Case(torch.ones(B, s, dtype=torch.int64), TypeError, "int64"),
    "bool": lambda s: Case(torch.ones(B, s, dtype=torch.bool), TypeError, "bool"),
    "complex": lambda s: Case(torch.ones(B, s, dtype=torch.complex64), TypeError, "complex64"),
    "sparse": lambda s: Case(torch.ones(B, s).to_sparse(), TypeError, "dense"),
    "scalar": lambda s: Case(torch.tensor(1.0), ValueError, "()"),
    "too long": lambda s: Case(torch.ones(s + 1), ValueError, f"({s + 1},)"),
    "too long for all": lambda s: Case(torch.ones(B, s + 1), ValueError, f"(3, {s + 1})"),
    "other batch": lambda s: Case(torch.ones(B + 1, s), ValueError, f"(4, {s})"),
    "batch of one": lambda s: Case(torch.ones(1, s), ValueError, f"(1, {s})"),
    "three dimensions": lambda s: Case(torch.ones(B, s, 1), ValueError, f"(3, {s}, 1)"),
    "negative": lambda s: Case(changed(torch.ones(B, s), -0.25), ValueError, "got -0.25 at entry 1 of problem 2"),
    "nan": lambda s: Case(changed(torch.ones(B, s), math.nan), ValueError, "got nan at entry 1 of problem 2"),
    "inf": lambda s: Case(changed(torch.ones(B, s), math.inf), ValueError, "got inf at entry 1 of problem 2"),
    "-inf": lambda s: Case(changed(torch.ones(B, s), -math.inf), ValueError, "got -inf at entry 1 of problem 2"),
    "shared negative": lambda s: Case(changed(torch.ones(s), -1.0), ValueError, "got -1.0 at entry 1 of problem 0"),
    "zero sum": lambda s: Case(torch.tensor([[1.0], [0], [1]]).expand(B, s), ValueError, "got 0 for problem 1"),
    "shared zero sum": lambda s: Case(torch.zeros(s), ValueError, "got 0 for problem 0"),
    "other device": lambda s: Case(meta(B, s), ValueError, "meta"),
}


@every_function
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(function: str, name: str, case: str, device: str) -> None:
    check_refused(function, name, WEIGHTS[case](number_of_weights(function, name)), device)


def test_batch_of_weights_for_one_problem(device: str) -> None:
    cost = torch.rand(N, M, device=device)
    with refused(ValueError, "sinkhorn", "a", "(1, 4)"):
        otface_cuda.sinkhorn(cost, 0.1, torch.ones(1, N, device=device))


@every_function
@pytest.mark.parametrize(("a_shared", "b_shared"), [(False, False), (True, False), (False, True), (True, True)])
def test_unequal_masses(function: str, a_shared: bool, b_shared: bool, device: str) -> None:
    """From the last problem on, where one of the weights is the problem's own."""
    weights = {}
    for name, shared in (("a", a_shared), ("b", b_shared)):
        size = number_of_weights(function, name)
        weights[name] = torch.full((size,) if shared else (B, size), 1 / size)
    weights["b" if a_shared else "a"].view(-1, weights["b" if a_shared else "a"].shape[-1])[-1] *= 3
    sums = "got 1 and 3" if a_shared else "got 3 and 1"
    arguments = {name: to(x, device) for name, x in (valid_arguments(function) | weights).items()}
    with refused(ValueError, function, "a", sums) as caught:
        getattr(otface_cuda, function)(**arguments)
    assert f"for problem {0 if a_shared and b_shared else B - 1}" in str(caught.value)


def rounding_of_masses(*dtypes: torch.dtype) -> float:
    """The documented rule: 2 eps of the coarsest dtype, float64 counted as float32, and half the digits of float32."""
    float32 = torch.finfo(torch.float32).eps
    return 2 * max(float32, *(torch.finfo(dtype).eps for dtype in dtypes)) + math.sqrt(float32)


@pytest.mark.parametrize("b_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cost_dtype", [torch.float64, torch.float32], ids=str)
def test_how_equal_masses_must_be(
    cost_dtype: torch.dtype, a_dtype: torch.dtype, b_dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError where values are looked at, NaN where they are not."""
    cost = torch.rand(2, 2, device=device).to(cost_dtype)
    allowed = rounding_of_masses(a_dtype, b_dtype)
    inside, outside = allowed / 2, 2 * allowed  # as a weight of its own, which every dtype can hold
    a = torch.tensor([0.0, 1.0], dtype=a_dtype, device=device)
    within, beyond = (torch.tensor([x, 1.0], dtype=b_dtype, device=device) for x in (inside, outside))
    for looks in (True, False):
        monkeypatch.setattr(_checks, "checks_data", lambda x, looks=looks: looks)
        for given in ((a, within), (within.to(a_dtype), a.to(b_dtype))):
            assert otface_cuda.sinkhorn(cost, 1.0, *given).value.isfinite()
        if looks:
            with refused(ValueError, "sinkhorn", "b", "got 1 and"):
                otface_cuda.sinkhorn(cost, 1.0, a, beyond)
        else:
            out = otface_cuda.sinkhorn(cost, 1.0, a, beyond)
            assert out.value.isnan()
            assert not out.converged


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES[:2], ids=str)
def test_weights_normalised_in_any_dtype(dtype: torch.dtype, to: torch.dtype, device: str) -> None:
    """And then given as they are, or, from float32, converted."""
    generator = torch.Generator().manual_seed(0)
    for n, m in [(2, 3), (49, 49), (200, 30), (1000, 1001)]:
        raw = [torch.rand(5, size, generator=generator).to(dtype) + 0.01 for size in (n, m)]
        for a, b in (
            [x / x.sum(1, keepdim=True) for x in raw],
            [x.softmax(1) for x in raw],
            [torch.full((size,), 1 / size, dtype=dtype) for size in (n, m)],
        ):
            if dtype == torch.float32:
                a, b = a.to(to), b.to(to)
            cost = torch.rand(5, n, m, generator=generator).to(to)
            out = otface_cuda.sinkhorn(cost.to(device), 0.5, a.to(device), b.to(device), max_iter=3)
            assert out.value.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "difference"), [(torch.bfloat16, 0.05), (torch.float16, 0.015), (torch.float32, 1e-3)]
)
@every_function
def test_a_forgotten_normalisation_is_not_rounding(
    function: str, dtype: torch.dtype, difference: float, device: str
) -> None:
    sizes = [number_of_weights(function, name) for name in ("a", "b")]
    a, b = (torch.full((size,), 1 / size).to(dtype) for size in sizes)
    arguments = valid_arguments(function) | {"a": a, "b": (b.float() * (1 + difference)).to(dtype)}
    with pytest.raises(ValueError, match="must have equal sums"):
        getattr(otface_cuda, function)(**{name: to(x, device) for name, x in arguments.items()})


def test_a_difference_of_masses_that_is_taken_stays_in_the_error(device: str) -> None:
    """The columns of the plan sum to b, its rows cannot sum to a: nothing is scaled."""
    a = torch.tensor([0.5, 0.5], dtype=torch.float64, device=device)
    b = a * (1 + 2**-12)
    cost = torch.rand(2, 2, dtype=torch.float64, device=device)
    out = otface_cuda.sinkhorn(cost, 0.5, a, b, max_iter=200, tol=1e-5, return_plan=True)
    torch.testing.assert_close(out.plan.sum(0), b, rtol=1e-14, atol=0)
    torch.testing.assert_close(out.error.item(), 2.0**-12, rtol=1e-6, atol=0)
    assert not out.converged


@single_solver
@pytest.mark.parametrize("name", ["row_lengths", "col_lengths"])
@pytest.mark.parametrize(
    "case",
    {
        "zero": lambda s: Case(torch.tensor([1, 0, 1]), ValueError, "got 0 for problem 1"),
        "negative": lambda s: Case(torch.tensor([1, 1, -2]), ValueError, "got -2 for problem 2"),
        "too large": lambda s: Case(torch.tensor([s + 1, s, s]), ValueError, f"got {s + 1} for problem 0"),
        "float": lambda s: Case(torch.ones(B), TypeError, "float32"),
        "bool": lambda s: Case(torch.ones(B, dtype=torch.bool), TypeError, "bool"),
        "complex": lambda s: Case(torch.ones(B, dtype=torch.complex64), TypeError, "complex64"),
        "int": lambda s: Case(s, TypeError, f"got {s}"),
        "list": lambda s: Case([s, s, s], TypeError, "list"),
        "scalar": lambda s: Case(torch.tensor(s), ValueError, "()"),
        "too few": lambda s: Case(torch.ones(B - 1, dtype=torch.int64), ValueError, "(2,)"),
        "two dimensions": lambda s: Case(torch.ones(B, 1, dtype=torch.int64), ValueError, "(3, 1)"),
        "other device": lambda s: Case(meta(B, dtype=torch.int64), ValueError, "meta"),
    }.items(),
    ids=lambda item: item[0],
)
def test_lengths(function: str, name: str, case: tuple[str, Any], device: str) -> None:
    check_refused(function, name, case[1](N if name == "row_lengths" else M), device)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_any_integers_are_lengths_and_indices(dtype: torch.dtype, device: str) -> None:
    """Also where the number of rows or of features is more than the dtype holds."""
    cost = torch.rand(2, 300, M, device=device)
    lengths = torch.tensor([4, 100], device=device)
    out = otface_cuda.sinkhorn(cost, 0.1, row_lengths=lengths.to(dtype))
    assert torch.equal(out.f, otface_cuda.sinkhorn(cost, 0.1, row_lengths=lengths).f)
    features = torch.rand(300, N, D, device=device)
    pairs = torch.tensor([[0, 100], [7, 7]], device=device)
    out = otface_cuda.sinkhorn_pairs(features, pairs.to(dtype), 0.1)
    assert torch.equal(out.f, otface_cuda.sinkhorn_pairs(features, pairs, 0.1).f)


@single_solver
@cases(
    list=([None, torch.zeros(B, M)], TypeError, "list"),
    one=((torch.zeros(B, M),), TypeError, "tuple"),
    three=((None, torch.zeros(B, M), None), TypeError, "tuple"),
    tensor=(torch.zeros(B, M), TypeError, "float32 tensor"),
    string=("warm", TypeError, "got 'warm'"),
    without_g=((torch.zeros(B, N), None), TypeError, "got None"),
    array=((None, np.zeros((B, M))), TypeError, "ndarray"),
    int=((None, torch.zeros(B, M, dtype=torch.int64)), TypeError, "int64"),
    complex=((None, torch.zeros(B, M, dtype=torch.complex64)), TypeError, "complex64"),
    sparse=((None, torch.zeros(B, M).to_sparse()), TypeError, "dense"),
    f_for_g=((None, torch.zeros(B, N)), ValueError, "(3, 4)"),
    other_batch=((None, torch.zeros(B - 1, M)), ValueError, "(2, 5)"),
    unbatched=((None, torch.zeros(M)), ValueError, "(5,)"),
    other_device=((None, meta(B, M)), ValueError, "meta"),
)
def test_init(function: str, case: Case, device: str) -> None:
    if isinstance(case.value, tuple):
        case = case._replace(value=tuple(to(x, device) for x in case.value))
    check_refused(function, "init", case, device)


def test_init_from_the_solution_of_other_problems(device: str) -> None:
    cost = torch.rand(B, N, M, device=device)
    with refused(ValueError, "sinkhorn", "init", "(2, 5)"):
        otface_cuda.sinkhorn(cost, 0.1, init=otface_cuda.sinkhorn(cost[:2], 0.1))


# Nothing to do


def backward_of_everything(out: otface_cuda.SinkhornOutput, mode: str) -> None:
    """Some weighted sum of all outputs that have a gradient in this mode."""
    names = ["value"] if mode == "envelope" else ["value", "transport_cost", "f", "g", "plan"]
    outputs = [getattr(out, name) for name in names if getattr(out, name) is not None]
    weights = [0.5 + torch.arange(x.numel(), device=x.device).reshape(x.shape) for x in outputs]
    loss = sum((weight * x).sum() for weight, x in zip(weights, outputs, strict=True))
    loss.backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(mode: str, dtype: torch.dtype, device: str) -> None:
    cost = torch.empty(0, N, M, dtype=dtype, device=device, requires_grad=True)
    a = torch.full((N,), 1 / N, device=device, requires_grad=True)
    b = torch.empty(0, M, device=device, requires_grad=True)
    nothing = torch.empty(0, device=device)
    options = {
        "tol": nothing,
        "row_lengths": nothing.long(),
        "col_lengths": nothing.long(),
        "init": (None, torch.empty(0, M, device=device)),
    }
    out = otface_cuda.sinkhorn(cost, nothing, a, b, grad=mode, return_plan=True, **options)
    assert [tuple(x.shape) for x in out] == [(0,), (0,), (0, N), (0, M), (0, N, M), (0,), (0,), (0,)]
    assert [x.dtype for x in out] == [output_dtype(dtype)] * 6 + [torch.int64, torch.bool]
    backward_of_everything(out, mode)
    assert cost.grad.shape == (0, N, M)
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert b.grad.shape == (0, M)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_of_points(mode: str, device: str) -> None:
    x = torch.empty(0, N, D, device=device, requires_grad=True)
    y = torch.empty(0, M, D, device=device, requires_grad=True)
    out = otface_cuda.sinkhorn_points(x, y, 0.1, grad=mode, return_plan=True)
    assert [tuple(t.shape) for t in out] == [(0,), (0,), (0, N), (0, M), (0, N, M), (0,), (0,), (0,)]
    backward_of_everything(out, mode)
    assert x.grad.shape == x.shape
    assert y.grad.shape == y.shape


@pytest.mark.parametrize("features", [0, FEATURES])
@pytest.mark.parametrize("mode", MODES)
def test_no_pairs(mode: str, features: int, device: str) -> None:
    points = torch.rand(features, N, D, device=device, requires_grad=True)
    a = torch.full((N,), 1 / N, device=device, requires_grad=True)
    b = torch.empty(0, N, device=device, requires_grad=True)
    pairs = torch.empty(0, 2, dtype=torch.int64, device=device)
    out = otface_cuda.sinkhorn_pairs(points, pairs, 0.1, a, b, grad=mode)
    assert out.plan is None
    assert [tuple(x.shape) for x in out if x is not None] == [(0,), (0,), (0, N), (0, N), (0,), (0,), (0,)]
    backward_of_everything(out, mode)
    assert torch.equal(points.grad, torch.zeros_like(points))
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert b.grad.shape == (0, N)


def test_pairs_of_no_features(device: str) -> None:
    """There is no range of indices to name."""
    pairs = torch.zeros(2, 2, dtype=torch.int64, device=device)
    with refused(ValueError, "sinkhorn_pairs", "pairs", "got ") as caught:
        otface_cuda.sinkhorn_pairs(torch.empty(0, N, D, device=device), pairs, 0.1)
    assert "-1" not in str(caught.value)


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean", "euclidean"])
def test_points_of_dimension_zero(metric: str, device: str) -> None:
    """They coincide, and their cosine is that of zero vectors: the cost is the constant of `cost_matrix`."""
    x = torch.empty(B, N, 0, device=device, requires_grad=True)
    y = torch.empty(B, M, 0, device=device)
    out = otface_cuda.sinkhorn_points(x, y, 0.1, metric=metric)
    expected = cost_matrix(x.detach(), y, metric)[0, 0, 0]
    assert expected == (1.0 if metric == "cosine" else 0.0)
    # A constant cost is solved by the first update, a weighted mean of at most 5 equal terms: a few roundings.
    torch.testing.assert_close(out.value, expected.expand(B), rtol=0, atol=4e-7)
    out.value.sum().backward()
    assert x.grad.shape == x.shape
    pairs = torch.tensor([[0, 1], [2, 2]], device=device)
    out = otface_cuda.sinkhorn_pairs(x, pairs, 0.1, metric=metric)
    torch.testing.assert_close(out.value, expected.expand(2), rtol=0, atol=4e-7)


# Derivatives that there are none of


def differentiable_arguments(function: str, device: str) -> tuple[dict[str, Any], list[str]]:
    arguments = {name: to(x, device) for name, x in valid_arguments(function).items()}
    return arguments, [name for name in ("cost", "x", "features") if name in arguments]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on the first use of jvp
@every_function
@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_is_refused(function: str, mode: str, device: str) -> None:
    """No tangent would look like a derivative of zero."""
    arguments, (name,) = differentiable_arguments(function, device)

    def value(x: Tensor) -> Tensor:
        return getattr(otface_cuda, function)(**arguments | {name: x}, grad=mode).value

    x = arguments[name]
    with pytest.raises(RuntimeError, match=r"forward|jvp"):
        torch.func.jvp(value, (x,), (torch.ones_like(x),))


@every_function
@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_is_refused(function: str, mode: str, device: str) -> None:
    """Also where the first one is only a part of what is differentiated, as a penalty on a gradient is."""
    arguments, (name,) = differentiable_arguments(function, device)
    x = arguments[name].requires_grad_()
    out = getattr(otface_cuda, function)(**arguments, grad=mode)
    (gradient,) = torch.autograd.grad(out.value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        (out.value.sum() + gradient.square().sum()).backward()


# One poisoned problem


def poison_nan(cost: Tensor) -> None:
    cost[3, 2] = math.nan


def poison_minus_inf(cost: Tensor) -> None:
    cost[-1, -1] = -math.inf


def poison_row(cost: Tensor) -> None:
    cost[5, :] = math.inf


def poison_column(cost: Tensor) -> None:
    cost[:, -1] = math.inf


def poison_everything(cost: Tensor) -> None:
    cost.fill_(math.nan)


POISONS = [poison_nan, poison_minus_inf, poison_row, poison_column, poison_everything]


def solve_and_differentiate(
    cost: Tensor, a: Tensor, b: Tensor, mode: str, **options: Any
) -> tuple[otface_cuda.SinkhornOutput, list[Tensor]]:
    inputs = [x.clone().requires_grad_() for x in (cost, a, b)]
    out = otface_cuda.sinkhorn(inputs[0], 0.2, *inputs[1:], grad=mode, return_plan=True, **options)
    backward_of_everything(out, mode)
    return out, [x.grad for x in inputs]


# The implicit gradient of a problem that has no solution is NaN, and says so.
ignore_unsolved = pytest.mark.filterwarnings("ignore:.*adjoint system.*:RuntimeWarning")


@pytest.mark.instruction_set
@ignore_unsolved
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poisoned_problem_stays_alone(
    dtype: torch.dtype, poison: Callable[[Tensor], None], mode: str, device: str
) -> None:
    # More than two problems, because a thread works on two at a time; large enough for a tail in every vector length.
    problem = random_problem(7, 11, 19, seed=1, dtype=dtype, device=device)
    clean, clean_gradients = solve_and_differentiate(*problem, mode, max_iter=200)
    for k in (0, 3, 6):
        cost = problem.cost.clone()
        poison(cost[k])
        out, gradients = solve_and_differentiate(cost, problem.a, problem.b, mode, max_iter=200)
        others = torch.arange(7, device=device) != k
        for name, x in out._asdict().items():
            assert torch.equal(x[others], getattr(clean, name)[others]), name
            assert not x.is_floating_point() or x[k].isnan().all(), name
        assert out.n_iter[k] == 0
        assert not out.converged[k]
        for gradient, expected in zip(gradients, clean_gradients, strict=True):
            assert torch.equal(gradient[others], expected[others])
            assert expected.isfinite().all()
            assert gradient[k].isnan().all()


@pytest.mark.instruction_set
@ignore_unsolved
@pytest.mark.parametrize("mode", MODES)
def test_poisoned_problem_with_padding(mode: str, device: str) -> None:
    """NaN in the valid part only; the padding still gets zeros, in the results and in the gradients."""
    problem = random_problem(3, 11, 19, seed=2, dtype=torch.float32, device=device)
    problem.cost[1, 0, 0] = math.nan
    rows, cols = torch.tensor([11, 6, 7], device=device), torch.tensor([19, 8, 1], device=device)
    a, b = (1 / rows[:, None]).expand(3, 11), (1 / cols[:, None]).expand(3, 19)
    out, gradients = solve_and_differentiate(problem.cost, a, b, mode, row_lengths=rows, col_lengths=cols)
    assert out.f[1, :6].isnan().all()
    assert (out.f[1, 6:] == 0).all()
    assert out.g[1, :8].isnan().all()
    assert (out.g[1, 8:] == 0).all()
    valid = (torch.arange(11, device=device) < 6)[:, None] & (torch.arange(19, device=device) < 8)
    assert out.plan[1, valid].isnan().all()
    assert (out.plan[1, ~valid] == 0).all()
    assert gradients[0][1, valid].isnan().all()
    assert (gradients[0][1, ~valid] == 0).all()
    assert (gradients[1][1, 6:] == 0).all()
    assert (gradients[2][1, 8:] == 0).all()
    for k in (0, 2):
        assert all(x[k].isfinite().all() for x in [*out, *gradients])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_poisoned_warm_start(value: float, device: str) -> None:
    problem = random_problem(3, 6, 9, seed=3, dtype=torch.float32, device=device)
    g = torch.zeros(3, 9, device=device)
    clean = problem.solve(0.1, init=(None, g))
    g[1, 4] = value
    out = problem.solve(0.1, init=(None, g))
    assert out.value.isnan().tolist() == [False, True, False]
    assert out.n_iter.tolist() == [100, 0, 100]
    assert torch.equal(out.f[::2], clean.f[::2])
    assert torch.equal(out.g[::2], clean.g[::2])


def test_poisoned_points(device: str) -> None:
    arguments = {k: to(x, device) for k, x in valid_arguments("sinkhorn_points").items()}
    for metric in ("cosine", "sqeuclidean", "euclidean"):
        x, y = (arguments[name].clone().requires_grad_() for name in ("x", "y"))
        otface_cuda.sinkhorn_points(x, y, 0.1, metric=metric).value.sum().backward()
        for value in (math.nan, math.inf):
            bad = arguments["x"].clone()
            bad[1, 2, 0] = value
            bad.requires_grad_()
            other = arguments["y"].clone().requires_grad_()
            out = otface_cuda.sinkhorn_points(bad, other, 0.1, metric=metric)
            assert out.value.isnan().tolist() == [False, True, False]
            out.value.sum().backward()
            assert torch.equal(bad.grad[::2], x.grad[::2])
            assert torch.equal(other.grad[::2], y.grad[::2])


WRONG_VALUES = {
    "eps zero": {"eps": torch.tensor([0.25, 0.0, 0.25])},
    "eps negative": {"eps": torch.tensor([0.25, -1.0, 0.25])},
    "eps nan": {"eps": torch.tensor([0.25, math.nan, 0.25])},
    "eps inf": {"eps": torch.tensor([0.25, math.inf, 0.25])},
    "a negative": {"a": [0.5, -0.5, 0.5, 0.5]},
    "a nan": {"a": [0.5, math.nan, 0.25, 0.25]},
    "a inf": {"a": [0.5, math.inf, 0.25, 0.25]},
    "a zero": {"a": [0.0, 0.0, 0.0, 0.0]},
    "b negative": {"b": [0.5, -0.5, 0.5, 0.25, 0.25]},
    "b nan": {"b": [0.5, math.nan, 0.5, 0.25, 0.25]},
    "b zero": {"b": [0.0, 0.0, 0.0, 0.0, 0.0]},
    "a too heavy": {"a": [0.25, 0.25, 0.25, 0.26]},
    "b too light": {"b": [0.2, 0.2, 0.2, 0.2, 0.19]},
    "row length zero": {"row_lengths": torch.tensor([4, 0, 4])},
    "row length negative": {"row_lengths": torch.tensor([4, -(2**40), 4])},
    "row length large": {"row_lengths": torch.tensor([4, 2**40, 4])},
    "column length zero": {"col_lengths": torch.tensor([5, 0, 5])},
    "column length large": {"col_lengths": torch.tensor([5, 6, 5])},
}


class TestValuesThatNobodyChecks:
    """On a GPU, and in a compiled graph, values are not looked at: a wrong one spoils its own problem, no other."""

    @pytest.fixture(autouse=True)
    def no_checks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_checks, "checks_data", lambda x: False)

    @ignore_unsolved
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("wrong", WRONG_VALUES)
    def test_sinkhorn(self, wrong: str, mode: str, device: str) -> None:
        def solve(changes: dict[str, Any]) -> tuple[otface_cuda.SinkhornOutput, list[Tensor]]:
            cost = valid_arguments("sinkhorn")["cost"].to(device)
            a, b = torch.full((B, N), 1 / N), torch.full((B, M), 1 / M)
            changes = dict(changes)
            for name, weights in (("a", a), ("b", b)):
                if name in changes:
                    weights[1] = torch.tensor(changes.pop(name))
            inputs = [x.to(device).requires_grad_() for x in (cost, a, b)]
            options = {"eps": 0.25, "max_iter": 100} | {name: x.to(device) for name, x in changes.items()}
            out = otface_cuda.sinkhorn(inputs[0], a=inputs[1], b=inputs[2], grad=mode, return_plan=True, **options)
            backward_of_everything(out, mode)
            return out, [x.grad for x in inputs]

        clean, clean_gradients = solve({})
        out, gradients = solve(WRONG_VALUES[wrong])
        for name, x in out._asdict().items():
            assert torch.equal(x[::2], getattr(clean, name)[::2]), name
            assert not x.is_floating_point() or x[1].isnan().all(), name
        assert not out.converged[1]
        for gradient, expected in zip(gradients, clean_gradients, strict=True):
            assert torch.equal(gradient[::2], expected[::2])
            assert gradient[1].isnan().any()

    @ignore_unsolved
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("bad_pair", [(-1, 0), (0, FEATURES), (2**40, -(2**40))], ids=str)
    def test_pairs(self, bad_pair: tuple[int, int], mode: str, device: str) -> None:
        features = valid_arguments("sinkhorn_pairs")["features"].to(device)

        def solve(pairs: list[tuple[int, int]]) -> tuple[otface_cuda.SinkhornOutput, Tensor]:
            x = features.clone().requires_grad_()
            out = otface_cuda.sinkhorn_pairs(x, torch.tensor(pairs, device=device), 0.2, grad=mode)
            out.value.sum().backward()
            return out, x.grad

        clean, clean_gradient = solve([(1, 2), (3, 4)])
        out, gradient = solve([(1, 2), bad_pair, (3, 4)])
        assert out.value.isnan().tolist() == [False, True, False]
        assert out.f[1].isnan().all()
        assert out.g[1].isnan().all()
        assert not out.converged[1]
        # The chunk that holds the bad pair is longer by one, which torch's matrix products may notice by a rounding.
        torch.testing.assert_close(out.value[::2], clean.value, rtol=0, atol=1e-6)
        # A pair that does not exist has no part in the gradient of a feature.
        torch.testing.assert_close(gradient, clean_gradient, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("mode", MODES)
    def test_pair_of_unequal_masses(self, mode: str, device: str) -> None:
        features = valid_arguments("sinkhorn_pairs")["features"].to(device).requires_grad_()
        a = torch.full((B, N), 1 / N, device=device)
        a[1, 0] *= 1.1
        a.requires_grad_()
        pairs = torch.tensor([(0, 1), (2, 3), (4, 5)], device=device)
        out = otface_cuda.sinkhorn_pairs(features, pairs, 0.2, a, torch.full((N,), 1 / N, device=device), grad=mode)
        assert out.value.isnan().tolist() == [False, True, False]
        assert not out.converged[1]
        out.value.sum().backward()
        for x, bad in ((features.grad, [2, 3]), (a.grad, [1])):
            assert x.flatten(1).isnan().any(1).nonzero().flatten().tolist() == bad

    @pytest.mark.usefixtures("fresh_compiler")
    def test_unequal_masses_in_a_compiled_graph(self, device: str) -> None:
        cost = valid_arguments("sinkhorn")["cost"].to(device)
        a, b = torch.full((B, N), 1 / N, device=device), torch.full((B, M), 1 / M, device=device)
        a[1] *= 1.01
        solve = torch.compile(otface_cuda.sinkhorn, fullgraph=True, backend="aot_eager")
        out = solve(cost, 0.5, a, b)
        assert out.value.isnan().tolist() == [False, True, False]


# Inputs are never modified


@pytest.mark.parametrize("mode", MODES)
@every_function
def test_inputs_are_not_modified(function: str, mode: str, device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    arguments = valid_arguments(function) | {
        "eps": torch.tensor([0.2, 0.3, 0.4]),
        "tol": torch.tensor([0.0, 1e-3, 1e-6]),
    }
    for name in ("a", "b"):
        weights = torch.rand(B, number_of_weights(function, name), generator=generator) + 0.5
        arguments[name] = weights / weights.sum(1, keepdim=True)
    if function in SINGLE_SOLVERS:
        arguments |= {"row_lengths": torch.full((B,), N), "col_lengths": torch.full((B,), M), "return_plan": True}
        arguments["init"] = (torch.zeros(B, N).to(device), torch.rand(B, M, generator=generator).to(device))
    arguments = {name: to(x, device) for name, x in arguments.items()}
    for name in ("cost", "x", "y", "features", "a", "b"):
        if name in arguments:
            arguments[name].requires_grad_()
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)] + list(arguments.get("init", ()))
    before = [(x.detach().clone(), x._version) for x in tensors]

    out = getattr(otface_cuda, function)(**arguments, grad=mode)
    names = ["value"] if mode == "envelope" else ["value", "transport_cost", "f", "g"]
    outputs = [getattr(out, name) for name in names]
    results = [x.detach().clone() for x in outputs]
    incoming = [torch.rand(x.shape, generator=generator).to(device) for x in outputs]
    incoming_before = [x.clone() for x in incoming]
    torch.autograd.backward(outputs, incoming)

    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    for x, value in zip([*outputs, *incoming], [*results, *incoming_before], strict=True):
        assert torch.equal(x, value)


# Unusual layouts


@pytest.mark.parametrize("mode", MODES)
def test_every_argument_may_be_strided_or_expanded(mode: str, device: str) -> None:
    """Strides of the cost, the weights, the settings and the incoming gradients change no bit, forward and backward."""
    generator = torch.Generator().manual_seed(5)
    problem = random_problem(3, 6, 10, seed=5, dtype=torch.float32, device=device)
    layouts: list[tuple[Tensor, Tensor]] = [
        (problem.cost[:1].expand(3, 6, 10), problem.cost[:1].repeat(3, 1, 1)),
        (problem.a[:1].expand(3, 6), problem.a[:1].repeat(3, 1)),
        (problem.b.mT.contiguous().mT, problem.b),
    ]
    settings = {
        "eps": torch.tensor(0.3).expand(3),
        "tol": torch.tensor([1e-3, 9.0, 1e-4, 9.0, 1e-5, 9.0])[::2],
        "row_lengths": torch.tensor(6).expand(3),
        "col_lengths": torch.tensor([[10, 0], [10, 0], [10, 0]])[:, 0],
    }
    settings = {name: x.to(device) for name, x in settings.items()}
    g = torch.rand(10, 3, generator=generator).to(device).mT
    incoming = torch.rand(10, 6, 3, generator=generator).to(device).permute(2, 1, 0)

    def solve(inputs: list[Tensor], g: Tensor, incoming: Tensor, settings: dict[str, Tensor]) -> list[Tensor]:
        cost, a, b = leaves = [x.detach().requires_grad_() for x in inputs]
        out = otface_cuda.sinkhorn(cost, a=a, b=b, init=(None, g), grad=mode, return_plan=True, **settings)
        outputs = [out.value] if mode == "envelope" else [out.value, out.plan]
        torch.autograd.backward(outputs, [incoming[:, 0, 0], incoming][: len(outputs)])
        return [*out, *(x.grad for x in leaves)]

    strided = solve([x for x, _ in layouts], g, incoming, settings)
    packed = {name: x.contiguous() for name, x in settings.items()}
    plain = solve([x for _, x in layouts], g.contiguous(), incoming.contiguous(), packed)
    for x, y in zip(strided, plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.instruction_set
def test_reads_nothing_outside_a_cost(device: str) -> None:
    """A matrix that ends with its memory, and one between NaN, for sizes around the length of a vector."""
    for m in range(1, 36):
        for n in (1, 2, 5):
            cost = torch.rand(n, m, generator=torch.Generator().manual_seed(m))
            frame = torch.full((n + 2, m + 2), math.nan)
            frame[1:-1, 1:-1] = cost
            inside, alone = frame.to(device)[1:-1, 1:-1], cost.to(device)
            for x, y in zip(otface_cuda.sinkhorn(inside, 0.1), otface_cuda.sinkhorn(alone, 0.1), strict=True):
                assert x is None or (torch.equal(x, y) and x.isfinite().all())


# Extreme sizes and numbers


@pytest.mark.instruction_set
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element(dtype: torch.dtype, mode: str, device: str) -> None:
    """The only plan is 1: value and transport_cost are the cost, f and g each half of it, and all derivatives known."""
    cost = torch.tensor([[[0.75]], [[-3.0]]], dtype=dtype, device=device, requires_grad=True)
    out = otface_cuda.sinkhorn(cost, torch.tensor([0.1, 7.0], device=device), grad=mode, return_plan=True)
    # One exponential and one logarithm, in units of eps = 7.
    atol = 8 * 7 * torch.finfo(output_dtype(dtype)).eps
    half = cost.detach()[:, :, 0].to(out.f.dtype) / 2
    one, zero = torch.ones_like(out.plan), torch.zeros_like(out.error)
    for x, expected in zip(out[:6], [2 * half[:, 0], 2 * half[:, 0], half, half, one, zero], strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=atol)
    (out.value * torch.tensor([1.0, 2.0], device=device)).sum().backward()
    torch.testing.assert_close(cost.grad.flatten().tolist(), [1.0, 2.0], rtol=0, atol=atol)


@pytest.mark.instruction_set
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "eps"), [(1e30, 0.1), (1e30, 1e-30), (1.0, 1e-30), (-1e30, 0.1), (1e30, 1e29)])
def test_huge_cost_and_tiny_eps(scale: float, eps: float, dtype: torch.dtype, device: str) -> None:
    problem = random_problem(3, 9, 14, seed=7, device=device)
    problem = problem._replace(cost=(scale * problem.cost).to(dtype))
    out = problem.solve(eps, max_iter=30, return_plan=True)
    ref = problem.reference(eps, max_iter=30, return_plan=True)
    # The minimum passes on the errors of potentials of the size of the cost; the plan is only determined to a relative
    # error of that over eps, which is no digit at all except for the last case.
    tol = tolerance(dtype, eps, 9, 14, 30, span=abs(scale), device=device)
    for name, potentials in (("f", 1), ("g", 1), ("value", 2)):
        x, expected = getattr(out, name).double().cpu(), getattr(ref, name)
        torch.testing.assert_close(x, expected, rtol=0, atol=potentials * tol.potential)
    assert all(x.isfinite().all() for x in out)
    # But its columns are exact: each is divided by its own sum of 9 terms. On CUDA the plan is made from the potentials
    # in float64, which have no digit to spare but in the last case.
    u = torch.finfo(output_dtype(dtype)).eps
    if not has_cuda_kernels(device) or eps == 1e29:
        torch.testing.assert_close(out.plan.sum(1), problem.b.to(out.plan.dtype), rtol=32 * u, atol=0)
    if eps == 1e29:
        torch.testing.assert_close(out.plan.double().cpu(), ref.plan, rtol=tol.plan, atol=0)


@pytest.mark.parametrize("mode", MODES)
@ignore_unsolved
def test_gradients_at_a_tiny_eps_touch_no_other_problem(mode: str, device: str) -> None:
    """Where eps is 1e-30 of the cost no gradient but the envelope's has a digit left, and that one stays finite."""
    problem = random_problem(2, 9, 14, seed=7, dtype=torch.float32, device=device)
    eps = torch.tensor([1e-30, 0.5], device=device)
    inputs = [x.clone().requires_grad_() for x in problem]
    otface_cuda.sinkhorn(inputs[0], eps, *inputs[1:], grad=mode, max_iter=200).value.sum().backward()
    alone = [x[1:].clone().requires_grad_() for x in problem]
    otface_cuda.sinkhorn(alone[0], 0.5, *alone[1:], grad=mode, max_iter=200).value.sum().backward()
    for x, expected in zip(inputs, alone, strict=True):
        assert torch.equal(x.grad[1:], expected.grad)
        assert expected.grad.isfinite().all()
        assert mode != "envelope" or x.grad.isfinite().all()


@pytest.mark.instruction_set
@pytest.mark.parametrize(("dtype", "weight"), [(torch.float32, 1e-40), (torch.float64, 5e-320)])
def test_denormal_weights(dtype: torch.dtype, weight: float, device: str) -> None:
    cost = random_problem(3, 4, 5, seed=8, dtype=dtype).cost
    a, b = torch.full((4,), 5 * weight, dtype=dtype), torch.full((5,), 4 * weight, dtype=dtype)
    ref = sinkhorn_reference(cost, 0.1, a, b, max_iter=20)
    out = otface_cuda.sinkhorn(cost.to(device), 0.1, a.to(device), b.to(device), max_iter=20)
    if has_cuda_kernels(
        device
    ):  # the fast exponential and quotient of a GPU know no such numbers: no solution rather than a wrong one
        assert out.value.isnan().all()
        assert not out.converged.any()
        return
    # A sum of denormal numbers has the absolute precision of the smallest one; `rough` is that of a few, relative to
    # a weight. A potential is eps times a logarithm of such sums, and of size eps |log mass|.
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    rough = 16 * smallest / weight
    span = 1 + 0.1 * abs(math.log(20 * weight))
    potential = tolerance(dtype, 0.1, 4, 5, 20, span, device).potential + 0.1 * rough
    torch.testing.assert_close(out.f.double().cpu(), ref.f, rtol=0, atol=potential)
    torch.testing.assert_close(out.g.double().cpu(), ref.g, rtol=0, atol=potential)
    mass = 20 * weight
    torch.testing.assert_close(
        out.value.double().cpu(), ref.value, rtol=rough, atol=2 * mass * potential + 16 * smallest
    )


@pytest.mark.instruction_set
def test_denormal_weight_among_normal_ones(device: str) -> None:
    cost = random_problem(2, 4, 5, seed=9, dtype=torch.float32).cost
    a = torch.tensor([0.5, 1e-40, 0.25, 0.25])
    out = otface_cuda.sinkhorn(cost.to(device), 0.1, a.to(device), return_plan=True, max_iter=20)
    ref = sinkhorn_reference(cost, 0.1, a, return_plan=True, max_iter=20)
    tol = tolerance(torch.float32, 0.1, 4, 5, 20, device=device)
    torch.testing.assert_close(out.f.double().cpu(), ref.f, rtol=0, atol=tol.potential)
    torch.testing.assert_close(out.g.double().cpu(), ref.g, rtol=0, atol=tol.potential)
    # An entry of the plan below the smallest normal float may be flushed.
    torch.testing.assert_close(out.plan.double().cpu(), ref.plan, rtol=tol.plan, atol=torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_hundred_thousand_tiny_problems(dtype: torch.dtype, device: str) -> None:
    """[[0, c], [c, 0]] has the plan p = 1 / (1 + exp(-c / eps)) / 2 on its diagonal, after a single iteration."""
    batch, eps = 100_000, 0.25
    c = torch.linspace(0, 4, batch, dtype=dtype)
    cost = torch.zeros(batch, 2, 2, dtype=dtype)
    cost[:, 0, 1] = cost[:, 1, 0] = c
    cost = cost.to(device).requires_grad_()
    out = otface_cuda.sinkhorn(cost, eps, max_iter=5, return_plan=True)
    diagonal = torch.sigmoid(c.double() / eps) / 2
    expected = torch.stack([diagonal, 0.5 - diagonal, 0.5 - diagonal, diagonal], 1).reshape(batch, 2, 2)
    # Both sides of 1/2 - p are computed from an exponent of up to 16.
    u = torch.finfo(dtype).eps
    torch.testing.assert_close(out.plan.double().cpu(), expected, rtol=64 * u, atol=2**-53)
    # value = -eps log mean exp(-c / eps) of a row.
    value = -eps * torch.logsumexp(torch.stack([torch.zeros_like(c), -c]).double() / eps, 0) + eps * math.log(2)
    torch.testing.assert_close(out.value.double().cpu(), value, rtol=0, atol=8 * u)
    out.value.sum().backward()
    torch.testing.assert_close(cost.grad, out.plan.detach(), rtol=64 * u, atol=0)


def test_more_problems_than_threads_and_fewer(threads: Callable[[int], None]) -> None:
    """No deadlock and no lost problem for any ratio of the two."""
    problem = random_problem(9, 3, 4, seed=10)
    expected = problem.solve(0.1)
    for count in (1, 2, 3, 8, 16):
        threads(count)
        for batch in (1, 2, 8, 9):
            out = otface_cuda.sinkhorn(problem.cost[:batch], 0.1, problem.a[:batch], problem.b[:batch])
            assert torch.equal(out.f, expected.f[:batch])
