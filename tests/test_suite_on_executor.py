"""The tests of the Python functions once more, with the CUDA kernels: on the host executor, in a process of its own.

What is large, and what is about threads and instruction sets, is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .problems import CPU_IS_EXECUTOR
from .simt import near

ROOT = Path(__file__).parents[1]
LEFT_OUT = ["cuda", "threads", "isa", "large", "hundred", "760", "900", "1000", "4000"]
SLOW = ["gradcheck", "implicit_is", "singular", "no_convergence"]


def run(*files: str, tier: str = "any", leave_out: list[str] = LEFT_OUT) -> dict[str, int]:
    """Runs the tests of these files, and returns how often each kernel ran, by its tier."""
    if CPU_IS_EXECUTOR:
        pytest.skip("this is the inner run")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-k", " and ".join(f"not {word}" for word in leave_out)),
            *(f"tests/test_{file}.py" for file in files),
        ],
        env={**os.environ, "OTFACE_TEST_EXECUTOR": tier},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^on the host executor: (.+): (\d+) times$", done.stdout, re.MULTILINE)
    return {what: int(count) for what, count in lines}


STEPS = ["forward", "unrolled", "implicit"]


def test_results_and_gradients() -> None:
    runs = run("against_reference", "gradients", leave_out=LEFT_OUT + SLOW)
    assert runs.keys() == {f"{step}, {tier}" for step in STEPS[:2] for tier in ("registers", "shared")} | {
        "envelope, rows",
        "implicit, shared",
    }


def test_near_points() -> None:
    runs = run("near_points")
    assert {f"{step}, warps" for step in near.STEPS} < runs.keys()


@pytest.mark.simt_full
@pytest.mark.parametrize("tier", ["shared", "stream"])
def test_small_problems_in_the_larger_tiers(tier: str) -> None:
    runs = run("against_reference", "gradients", tier=tier, leave_out=LEFT_OUT + SLOW)
    assert runs.keys() == {f"{step}, {tier}" for step in STEPS} | {"envelope, rows"}


@pytest.mark.simt_full
def test_everything_else() -> None:
    assert "forward, stream" in run("bad_input", "against_pot", "modules", "operators", "points_pairs", "properties")
    assert run("gradients", leave_out=LEFT_OUT)["implicit, shared"] > 1000


@pytest.mark.simt_full
def test_every_kernel() -> None:
    assert len(run("every_kernel")) == 9
