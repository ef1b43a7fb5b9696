"""Every CPU kernel is compiled three times: the tests marked `instruction_set` run for each in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import otface_cuda

INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
# What the kernels of each set are compiled for.
FLAGS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq"},
}


def supported(isa: str) -> bool:
    if isa == "baseline":
        return True
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return False
    flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    return set(flags) >= FLAGS[isa]


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OTFACE_CPU_ISA": isa}
    command = [sys.executable, *arguments]
    root = Path(__file__).parents[1]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)


def test_the_best_one_is_chosen() -> None:
    if os.environ.get("OTFACE_CPU_ISA"):
        pytest.skip("the environment has chosen")
    assert otface_cuda.info().cpu_isa == [isa for isa in INSTRUCTION_SETS if supported(isa)][-1]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_suite_with(isa: str) -> None:
    if not supported(isa):
        pytest.skip(f"this processor has no {isa}")
    if os.environ.get("OTFACE_CPU_ISA"):
        pytest.skip("this is the inner run")
    if otface_cuda.info().cpu_isa == isa:
        pytest.skip("this is what the whole suite runs with")
    result = run(
        isa, "-m", "pytest", "-q", "-m", "instruction_set", "-k", "not cuda", "-p", "no:cacheprovider", "tests"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    chosen = run(isa, "-c", "import otface_cuda; print(otface_cuda.info().cpu_isa)")
    assert chosen.stdout.strip() == isa


@pytest.mark.parametrize("isa", ["sse9", *(isa for isa in INSTRUCTION_SETS if not supported(isa))])
def test_one_that_cannot_run_is_refused(isa: str) -> None:
    result = run(isa, "-c", "import otface_cuda")
    assert result.returncode != 0
    assert "OTFACE_CPU_ISA" in result.stderr
    assert isa in result.stderr
