"""Every CUDA kernel runs without a word from the sanitizers of addresses, undefined behaviour and threads, and uses
nothing that was never written.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from .simt.cases import FOUR_BLOCKS, STEPS, WAYS, cases, random_case, spread
from .simt.kernels import Arrays, run, run_driver

TIERS = ("registers", "shared", "stream")
SANITIZERS = ("address", "thread")
QUICK = 4  # so many cases of the stream tier are quick with the thread sanitizer


def check(variant: str, made: list[Arrays], parts: int = 1) -> list[str]:
    """Runs the cases, in several processes at a time, and returns the checksums of their results."""
    with ThreadPoolExecutor(parts) as pool:
        outcomes = list(pool.map(lambda part: run_driver(variant, made[part::parts]), range(parts)))
    for outcome in outcomes:
        assert (outcome.ok, outcome.report) == (True, "")
    sums = [""] * len(made)
    for part, outcome in enumerate(outcomes):
        sums[part::parts] = outcome.checksums
    return sums


@pytest.mark.parametrize("variant", SANITIZERS)
@pytest.mark.parametrize("tier", TIERS)
def test_silent(tier: str, variant: str) -> None:
    made = list(cases(tier, seed=1).values())
    check(variant, made[:QUICK] if (tier, variant) == ("stream", "thread") else made)


@pytest.mark.simt_full
@pytest.mark.parametrize("tier", TIERS)
def test_same_bits_in_every_build_and_order(tier: str) -> None:
    expected = check("plain", list(cases(tier).values()))
    for seed in (2, 3):
        made = list(cases(tier, seed).values())
        assert check("address", made, parts=2) == expected
    assert check("thread", list(cases(tier, seed=4).values()), parts=2) == expected


@pytest.mark.simt_full
@pytest.mark.parametrize("variant", SANITIZERS)
@pytest.mark.parametrize("way", WAYS)
def test_silent_around_the_edges(way: str, variant: str) -> None:
    check(variant, spread(way, seed=5), parts=2)


# Here, only what nobody has written is NaN or infinite: tiles of the register tier are full, since the padding of the
# cost is infinite.
FULL_TILES = {
    ("forward", np.float32): [(16, 16), (32, 32), (52, 52), (64, 64)],
    ("forward", np.float64): [(16, 16), (32, 32), (48, 48)],
    ("unrolled", np.float32): [(16, 16), (32, 32), (52, 56)],
    ("unrolled", np.float64): [(16, 16), (32, 32)],
}
OTHER_SIZES = [(1, 1), (37, 23), (17, 261)]


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("tier", TIERS)
def test_uses_nothing_that_was_not_written(tier: str, step: str, real: type) -> None:
    """Shared memory and workspace are full of signalling NaNs: the first operation on one ends the run."""
    if tier == "registers" and step not in ("forward", "unrolled"):
        pytest.skip("no such tier")
    made = []
    for n, m in FULL_TILES[step, real] if tier == "registers" else OTHER_SIZES:
        settings = {"batch": 2, "n": n, "m": m, "real": real, "tier": tier, "max_iter": 5, **FOUR_BLOCKS}
        before = run(random_case(steps=("forward",), **settings)) if step != "forward" else {}
        brought = {name: before[name] for name in ("potentials", "n_iter", "history", "rebuilt") if name in before}
        for poison_float in (0, 1) if real == np.float32 else (0,):
            case = random_case(steps=(step,), trap_invalid=1, poison_float=poison_float, **settings)
            made.append(case | brought)
    check("address", made)
