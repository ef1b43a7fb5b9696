"""`mine_hard_triplets` against every (anchor, positive, negative) looked at in turn."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import otface_cuda
from otface_cuda import mine_hard_triplets, mining

from .otface_problems import hard_triplets, random_batch
from .problems import DTYPES
from .test_bad_input import Case, meta, refused, to
from .test_points_pairs import allocations

LABELS = {
    "people": [0, 0, 1, 1, 1, 2, 2, 3, 4, 0],
    "one person": [7] * 6,
    "all different": list(range(6)),
    "one pair": [0, 3, 0, 5],
    "none": [],
    "one": [1],
    "two of one": [1, 1],
    "two": [1, 2],
}


def problem(labels: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    batch = random_batch(LABELS[labels], seed=seed)
    return batch.embeddings, batch.labels


def as_list(triplets: Tensor) -> list[tuple[int, ...]]:
    assert triplets.dtype == torch.int64
    assert triplets.shape[1:] == (3,)
    return [tuple(row) for row in triplets.tolist()]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.2, 3.0, -3.0])
@pytest.mark.parametrize("labels", LABELS)
def test_against_every_triplet(labels: str, alpha: float, seed: int, device: str) -> None:
    """In float64, where no two of the random cosines are as close as their rounding."""
    embeddings, names = problem(labels, seed)
    found = mine_hard_triplets(embeddings.to(device), names.to(device), alpha)
    assert as_list(found) == hard_triplets(embeddings, names, alpha)
    assert found.device.type == device


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_lengths(dtype: torch.dtype, device: str) -> None:
    """The lengths say nothing, though their squares may leave the range of the dtype. A zero row has cosine 0."""
    embeddings, names = problem("people")
    embeddings = embeddings.to(dtype)
    embeddings[3] = 0
    expected = hard_triplets(embeddings, names, alpha=1e-3)  # no cosine of two is 0 here, but three of the zero row are
    factor = {torch.float64: 2.0**700, torch.float16: 2.0**10}.get(dtype, 2.0**100)
    for scaled in (embeddings, embeddings * factor, embeddings / factor):
        # Half types lose digits of small numbers, below their smallest normal one.
        if (scaled.abs()[scaled != 0] < torch.finfo(dtype).tiny).any():
            continue
        assert as_list(mine_hard_triplets(scaled.to(device), names.to(device), 1e-3)) == expected


def test_ties_are_not_hard(device: str) -> None:
    """Rows of +-1 / 2 have exact cosines: an equal one is not nearer, and just is with any alpha > 0."""
    embeddings = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, 1], [-1, -1, -1, -1], [1, 1, 1, 1]]) / 2
    names = torch.tensor([0, 0, 1, 2, 3])
    found = mine_hard_triplets(embeddings.to(device), names.to(device))
    assert as_list(found) == [(0, 1, 4)]
    found = mine_hard_triplets(embeddings.to(device), names.to(device), alpha=1e-6)
    assert as_list(found) == [(0, 1, 2), (0, 1, 4), (1, 0, 4)]


def hardness(embeddings: Tensor, triplets: list[tuple[int, ...]]) -> list[float]:
    unit = torch.nn.functional.normalize(embeddings)
    return [float(unit[a] @ unit[n] - unit[a] @ unit[p]) for a, p, n in triplets]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("labels", LABELS)
def test_as_many_as_asked_for(labels: str, alpha: float, device: str) -> None:
    """One, one fewer than there are, exactly these, one more, and many more."""
    embeddings, names = problem(labels)
    everyone = hard_triplets(embeddings, names, alpha)
    ordered = [t for _, t in sorted(zip(hardness(embeddings, everyone), everyone, strict=True), key=lambda x: -x[0])]
    for count in {1, max(1, len(everyone) - 1), max(1, len(everyone)), len(everyone) + 1, 3 * len(everyone) + 5}:
        found = as_list(mine_hard_triplets(embeddings.to(device), names.to(device), alpha, max_triplets=count))
        assert len(found) == count
        assert found[: len(ordered)] == ordered[:count]
        assert found[len(ordered) :] == [(-1, -1, -1)] * (count - len(ordered))


def test_equally_hard_ones_come_in_order() -> None:
    embeddings = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, 1], [-1, -1, -1, -1], [1, 1, 1, 1]]) / 2
    found = mine_hard_triplets(embeddings, torch.tensor([0, 0, 1, 2, 3]), alpha=1e-6, max_triplets=4)
    assert as_list(found) == [(0, 1, 4), (0, 1, 2), (1, 0, 4), (-1, -1, -1)]


def test_without_a_list_of_unknown_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator does on CUDA, some anchors at a time, finds the same."""
    embeddings, names = problem("people")
    expected = mine_hard_triplets(embeddings, names, 0.2, max_triplets=40)
    for chunk_bytes in (1, 3 * 10 * 10 * 4 * 8, 2**20):
        monkeypatch.setattr(mining, "CHUNK_BYTES", chunk_bytes)
        unit = torch.nn.functional.normalize(embeddings)
        found = mining.hardest_without_counting(unit, names, number(0.2), 40, None)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("ignore_index", [None, 1])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_a_kernel(
    dtype: torch.dtype, labels: str, ignore_index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done on CUDA finds the same, to the bit of how hard they are, whatever the chunk."""
    embeddings, names = problem(labels)
    unit = torch.nn.functional.normalize(embeddings).to(dtype)
    cosines = unit @ unit.T
    for alpha in (0.0, 0.1):
        expected = torch.ops.otface.hard_triplets(cosines, names, alpha, ignore_index)
        for chunk_bytes in (1, 500, 2**20):
            monkeypatch.setattr(mining, "CHUNK_BYTES", chunk_bytes)
            for x, y in zip(mining.hard_of_cosines(cosines, names, alpha, ignore_index), expected, strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("ignore_index", [0, 1, 7, 99])
@pytest.mark.parametrize("max_triplets", [None, 200])
def test_ignored_rows(max_triplets: int | None, ignore_index: int, device: str) -> None:
    """They are neither anchors nor positives nor negatives: the rest is as without them."""
    embeddings, names = problem("people")
    kept = (names != ignore_index).nonzero()[:, 0]
    expected = [tuple(kept[list(t)].tolist()) for t in hard_triplets(embeddings[kept], names[kept], 0.1)]
    found = mine_hard_triplets(
        embeddings.to(device), names.to(device), 0.1, max_triplets=max_triplets, ignore_index=ignore_index
    )
    assert sorted(t for t in as_list(found) if t != (-1, -1, -1)) == expected
    unit = torch.nn.functional.normalize(embeddings)
    found = mining.hardest_without_counting(unit, names, number(0.1), 200, ignore_index)
    assert sorted(t for t in as_list(found) if t != (-1, -1, -1)) == expected


def number(alpha: float) -> Tensor:
    """As the operators take it."""
    return torch.tensor(alpha, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_without_counting(dtype: torch.dtype) -> None:
    """An excess of exactly -alpha is not hard: neither 0 for alpha = 0 nor -1/2 for 1/2, in each way of mining."""
    embeddings = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, -1], [1, 1, 1, 1]], dtype=dtype) / 2
    names = torch.tensor([0, 0, 1, 2])  # cosines with the first two: 1/2 and 1, that of the positive is 1
    for alpha, expected in (
        (0.0, set()),
        (1e-3, {(0, 1, 3), (1, 0, 3)}),
        (0.5, {(0, 1, 3), (1, 0, 3)}),
        (0.5 + 1e-3, {(0, 1, 2), (0, 1, 3), (1, 0, 2), (1, 0, 3)}),
    ):
        for found in (
            mine_hard_triplets(embeddings, names, alpha),
            mine_hard_triplets(embeddings, names, alpha, max_triplets=9),
            mining.hardest_without_counting(embeddings, names, number(alpha), 9, None),
            mining.hard_of_cosines(embeddings @ embeddings.T, names, alpha, None)[0],
        ):
            assert {t for t in as_list(found) if t != (-1, -1, -1)} == expected


@pytest.mark.parametrize("max_triplets", [None, 10_000])
def test_memory_of_a_large_batch(max_triplets: int | None, tmp_path: Path, device: str) -> None:
    """2,048 images, four of a person, in less than 1 GB, where the comparisons of all three would be 34 GB.

    Random embeddings, of which half of the 12.6 million triplets are hard: the worst that training starts with.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2048, 128, generator=generator).to(device)
    labels = torch.arange(512).repeat_interleave(4).to(device)
    found, peak, _ = allocations(
        lambda: mine_hard_triplets(embeddings, labels, max_triplets=max_triplets), tmp_path / "trace.json", device
    )
    assert peak < 1e9
    assert len(found) == max_triplets or 6.0e6 < len(found) < 6.6e6


def test_poisoned_embeddings_are_in_no_triplet(device: str) -> None:
    """Nothing is nearer than NaN. The margin loss of such a row is NaN, so that it does not go unseen."""
    embeddings, names = problem("people")
    clean = [t for t in hard_triplets(embeddings, names) if 2 not in t]
    embeddings[2, 1] = math.nan
    assert as_list(mine_hard_triplets(embeddings.to(device), names.to(device))) == clean


def test_no_gradient_and_nothing_modified(device: str) -> None:
    embeddings, names = (x.to(device) for x in problem("people"))
    before = embeddings.clone(), names.clone()
    strided = embeddings.T.contiguous().T.requires_grad_()
    found = mine_hard_triplets(strided, names.to(torch.int16))
    assert not found.requires_grad
    assert torch.equal(found, mine_hard_triplets(embeddings, names))
    assert torch.equal(strided, before[0])
    assert torch.equal(names, before[1])


def test_under_autocast(device: str) -> None:
    """The cosines stay in float32."""
    embeddings, names = (x.to(device) for x in problem("people"))
    embeddings = embeddings.float()
    for count in (None, 50):
        plain = mine_hard_triplets(embeddings, names, max_triplets=count)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert torch.equal(mine_hard_triplets(embeddings, names, max_triplets=count), plain)


def test_opcheck(device: str) -> None:
    embeddings, names = (x.to(device) for x in problem("people"))
    unit = torch.nn.functional.normalize(embeddings)
    alpha = torch.tensor([0.1], dtype=torch.float64)
    for most, ignore_index in ((1, None), (500, 1)):
        torch.library.opcheck(torch.ops.otface.hardest_triplets, (unit, names, alpha, most, ignore_index))
    if device == "cpu":
        # As other operators whose size depends on the data, it is not traced but where the compiler is told to.
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.otface.hard_triplets, (unit @ unit.T, names, 0.1, 2), test_utils=tests)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(device: str) -> None:
    """As a whole with `max_triplets`; without it the graph breaks where the length is asked for."""
    embeddings, names = (x.to(device) for x in problem("people"))

    def mine(count: int | None) -> Callable[..., Tensor]:
        return lambda x, y: mine_hard_triplets(x, y, 0.1, max_triplets=count)

    compiled = torch.compile(mine(30), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(embeddings, names), mine(30)(embeddings, names))
    compiled = torch.compile(mine(None), backend="aot_eager")
    assert torch.equal(compiled(embeddings, names), mine(None)(embeddings, names))


N = 4
CASES: dict[str, dict[str, Case]] = {
    "embeddings": {
        "vector": Case(torch.rand(N), ValueError, "(4,)"),
        "maps": Case(torch.rand(N, 2, 2), ValueError, "(4, 2, 2)"),
        "int": Case(torch.ones(N, 3, dtype=torch.int64), TypeError, "int64"),
        "complex": Case(torch.ones(N, 3, dtype=torch.complex64), TypeError, "complex64"),
        "sparse": Case(torch.ones(N, 3).to_sparse(), TypeError, "dense"),
        "array": Case(np.ones((N, 3)), TypeError, "ndarray"),
        "none": Case(None, TypeError, "got None"),
    },
    "labels": {
        "too short": Case(torch.zeros(N - 1, dtype=torch.int64), ValueError, "(3,)"),
        "matrix": Case(torch.zeros(N, 1, dtype=torch.int64), ValueError, "(4, 1)"),
        "float": Case(torch.zeros(N), TypeError, "float32"),
        "bool": Case(torch.zeros(N, dtype=torch.bool), TypeError, "bool"),
        "list": Case([0] * N, TypeError, "list"),
        "none": Case(None, TypeError, "got None"),
        "other device": Case(meta(N, dtype=torch.int64), ValueError, "meta"),
    },
    "alpha": {
        "nan": Case(math.nan, ValueError, "got nan"),
        "inf": Case(math.inf, ValueError, "got inf"),
        "bool": Case(True, TypeError, "got True"),
        "string": Case("1", TypeError, "got '1'"),
        "tensor": Case(torch.tensor(0.0), TypeError, "float32 tensor"),
        "none": Case(None, TypeError, "got None"),
    },
    "ignore_index": {
        "float": Case(1.0, TypeError, "got 1.0"),
        "bool": Case(True, TypeError, "got True"),
    },
    "max_triplets": {
        "zero": Case(0, ValueError, "got 0"),
        "negative": Case(-1, ValueError, "got -1"),
        "float": Case(1.0, TypeError, "got 1.0"),
        "bool": Case(True, TypeError, "got True"),
        "string": Case("all", TypeError, "got 'all'"),
    },
}


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{kind}") for name, some in CASES.items() for kind, case in some.items()],
)
def test_refused(name: str, case: Case, device: str) -> None:
    arguments = {"embeddings": torch.rand(N, 3), "labels": torch.tensor([0, 0, 1, 1]), name: case.value}
    with refused(case.error, "mine_hard_triplets", name, case.came):
        mine_hard_triplets(**{key: to(value, device) for key, value in arguments.items()})


def test_every_argument_has_its_cases() -> None:
    assert CASES.keys() == inspect.signature(otface_cuda.mine_hard_triplets).parameters.keys()
