"""The host executor reports what is wrong in a kernel, with the line, and nothing else."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest

from .simt.build import HERE, Build
from .simt.kernels import run_sanitized

SOURCE = HERE / "wrong_kernels.cpp"
EVERY_BUILD = ("plain", "address", "thread")

# Which build must report the kernel.
SEEN_BY = {
    # races
    "missing_barrier": ("thread",),
    "missing_barrier_after_read": ("thread",),
    "missing_warp_barrier": ("thread",),
    "warp_barrier_between_warps": ("thread",),
    "race_of_blocks": ("thread",),
    "missing_gang_barrier": ("thread",),
    # collectives and barriers that not all reach
    "exit_before_shuffle": EVERY_BUILD,
    "exit_before_barrier": EVERY_BUILD,
    "partial_mask": EVERY_BUILD,
    "parted_collective": EVERY_BUILD,
    "vote_of_some": EVERY_BUILD,
    "parted_barrier": EVERY_BUILD,
    "wrong_source_lane": EVERY_BUILD,
    "collective_of_half_a_warp": EVERY_BUILD,
    "gang_deadlock": EVERY_BUILD,
    "used_counter": EVERY_BUILD,
    "gang_of_ordinary_launch": EVERY_BUILD,
    # memory
    "misaligned_pack": EVERY_BUILD,
    "shared_out_of_bounds": ("address",),
    "global_out_of_bounds": ("address",),
    "uninitialised_index": ("address",),
    "uninitialised_float": ("address", "thread"),
    "uninitialised_double": ("address", "thread"),
}


@functools.cache
def executable(source: str, variant: str) -> Path:
    return Build().executable([HERE / source], variant)


def run_kernel(variant: str, name: str, version: str, *seeds: int) -> subprocess.CompletedProcess[str]:
    return run_sanitized([str(executable(SOURCE.name, variant)), name, version, *map(str, seeds)])


def lines_to_report(name: str) -> list[int]:
    text = SOURCE.read_text().splitlines()
    return [k for k, line in enumerate(text, 1) if re.search(rf"// report {name}$", line)]


def lines_of_report(report: str) -> set[int]:
    return {int(line) for line in re.findall(rf"{SOURCE.name}:(\d+)", report)}


def test_every_kernel_is_listed() -> None:
    names = set(re.findall(r"\{KERNEL\((\w+)\)", SOURCE.read_text()))
    assert names == set(SEEN_BY)
    assert all(lines_to_report(name) for name in names)


@pytest.mark.parametrize("name", SEEN_BY)
def test_wrong_kernel_is_reported_with_its_line(name: str) -> None:
    for variant in SEEN_BY[name]:
        for seed in (1, 2):
            done = run_kernel(variant, name, "wrong", seed)
            assert done.returncode != 0, f"{variant} build, seed {seed}"
            assert lines_of_report(done.stderr) >= set(lines_to_report(name)), done.stderr


@pytest.mark.parametrize("variant", EVERY_BUILD)
@pytest.mark.parametrize("name", SEEN_BY)
def test_right_kernel_passes_silently(name: str, variant: str) -> None:
    done = run_kernel(variant, name, "right", *range(8))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["missing_barrier", "missing_barrier_after_read", "missing_warp_barrier"])
def test_barrier_can_be_left_out(name: str) -> None:
    """As the test of the tests of the kernels does with every barrier."""
    text = SOURCE.read_text().splitlines()
    first, *_, last = lines_to_report(name)
    line = next(k for k in range(first, last) if "constexpr (right)" in text[k - 1])
    done = run_kernel("thread", name, f"{SOURCE.name}:{line}", 1)
    assert done.returncode != 0
    assert lines_of_report(done.stderr) >= set(lines_to_report(name))


@pytest.mark.parametrize("variant", EVERY_BUILD)
def test_collectives_limits_and_order(variant: str) -> None:
    without_races = ["without-races"] if variant == "thread" else []
    done = run_sanitized([str(executable("collectives.cpp", variant)), *without_races])
    assert done.returncode == 0, done.stderr
