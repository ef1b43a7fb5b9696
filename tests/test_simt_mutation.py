"""Every barrier of every CUDA kernel is needed: without it the thread sanitizer, the executor or the results tell.

One that nobody misses is either too much, and goes, or the cases lack the path that needs it (simt/cases.py).
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from .simt.build import ROOT
from .simt.cases import cases
from .simt.kernels import Outcome, run_driver

TIERS = ("registers", "shared", "stream")
SOURCES = sorted((ROOT / "csrc" / "sinkhorn").glob("*.cuh"))
BARRIER = re.compile(r"\b(sync\w*|any_in_block|gang_barrier)\(")
LIMIT = 300.0  # seconds; without a barrier a kernel may never end


def barriers_in_sources() -> set[str]:
    """FILE:LINE of each, but for those that hand their caller's place on and are told apart by it."""
    found = set()
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            code = line.split("//")[0]
            if BARRIER.search(code) and "OTFACE_DEVICE" not in code and "where)" not in code:
                found.add(f"{path.name}:{number}")
    return found


def noticed_by(outcome: Outcome, intact: Outcome) -> str:
    """How a run without a barrier differs from one with it; empty if it does not."""
    if "data race" in outcome.report:
        accesses = re.findall(
            r"^  (?:Previous )?(?:atomic )?(?:read|write)(.*?)\n\n", outcome.report, re.M | re.S | re.I
        )
        places = [re.search(r"csrc/sinkhorn/(\S+:\d+)", access) for access in accesses[:2]]
        return "data race: " + ", ".join(place[1] if place else "?" for place in places)
    if "SIGNAL" in outcome.report:
        return "crash"
    if not outcome.ok:
        return "report: " + outcome.report.strip().splitlines()[0][:100]
    return "other results" if outcome.checksums != intact.checksums else ""


def without_each(tier: str, every: int = 1) -> dict[str, str]:
    """How it was noticed that each barrier of a tier, or one of so many, was missing."""
    made = list(cases(tier, seed=1).values())
    intact = run_driver("thread", made)
    assert (intact.ok, intact.report) == (True, "")

    def try_without(barrier: str) -> str:
        return noticed_by(run_driver("thread", made, barrier, timeout=LIMIT), intact)

    barriers = sorted(intact.barriers, key=lambda name: (name.split(":")[0], int(name.split(":")[1])))[::every]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(barriers, pool.map(try_without, barriers), strict=True))


def table(noticed: dict[str, dict[str, str]]) -> str:
    rows = [(tier, barrier, how or "NOTHING") for tier, found in noticed.items() for barrier, how in found.items()]
    return "\n".join(f"{tier:9}  without {barrier:23} {how}" for tier, barrier, how in rows)


def test_a_missing_barrier_is_noticed() -> None:
    """A few of the quickest tier: the others run as test_every_missing_barrier_is_noticed."""
    noticed = without_each("registers", every=5)
    assert len(noticed) > 2
    assert all(noticed.values()), table({"registers": noticed})


@pytest.mark.simt_full
def test_every_missing_barrier_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    noticed = {tier: without_each(tier) for tier in TIERS}
    with capsys.disabled():
        print(f"\n{table(noticed)}")
    assert {barrier for found in noticed.values() for barrier in found} == barriers_in_sources()
    assert all(how for found in noticed.values() for how in found.values())
