"""The CUDA kernels for numpy: on the host executor, in this process or in an executable built with a sanitizer.

A case is a dictionary of arrays (case.cpp reads it): the problem, the options and which steps to run, of "forward",
"envelope", "unrolled" and "implicit". Later steps find what earlier ones left; a case may also bring it along.
"""

from __future__ import annotations

import functools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .build import ROOT, Build, load_module

TIERS = ("any", "registers", "shared", "stream")
CHOICE = (
    "tier",
    "tile_rows",
    "tile_cols",
    "threads_per_problem",
    "problems_per_block",
    "blocks_per_problem",
    "shared_bytes",
    "workspace_bytes",
)

Arrays = dict[str, np.ndarray]


def make_case(
    cost: np.ndarray,
    eps: float | np.ndarray,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    *,
    steps: Sequence[str] = ("forward",),
    tol: float | np.ndarray = 0.0,
    row_lengths: np.ndarray | None = None,
    col_lengths: np.ndarray | None = None,
    init_g: np.ndarray | None = None,
    mass_tolerance: float = np.inf,
    tier: str = "any",
    cost_offset: int = 0,
    grads: Mapping[str, np.ndarray] | None = None,
    **options: float,
) -> Arrays:
    """A case from a cost (B, n, m) with any strides; as uint16 with `cost_bfloat=1` it holds bits of bfloat16.

    `cost_offset`: so many entries lie before the first one, which is then aligned only as an entry must be.
    `grads`: "value", "transport_cost", "f", "g", "plan". `options`: max_iter, check_every, want_plan, want_history,
    want_grad_cost, want_grad_a, want_grad_b, implicit_tol, implicit_max_iter; of the executor: seed, multiprocessors,
    blocks_per_multiprocessor, shared_bytes_per_block, workspace_bytes; poison_float, another filling of shared memory,
    workspace and results: what comes out must not depend on it; trap_invalid, for kernels that do not compute inf - inf
    on purpose.
    """
    real = np.float64 if cost.dtype == np.float64 else np.float32
    case: Arrays = {name: np.asarray(value, np.int64) for name, value in options.items() if name != "implicit_tol"}
    if "implicit_tol" in options:
        case["implicit_tol"] = np.asarray(options["implicit_tol"], np.float64)
    case |= {step: np.asarray(1, np.int64) for step in steps}
    case["batch"], case["n"], case["m"] = (np.asarray(size, np.int64) for size in cost.shape)
    case["tier"] = np.asarray(TIERS.index(tier), np.int64)
    storage, case["cost_strides"] = _storage(cost.view(np.uint16) if cost.dtype == np.float16 else cost)
    case["cost"] = np.concatenate([np.zeros(cost_offset, storage.dtype), storage])
    case["cost_offset"] = np.asarray(cost_offset, np.int64)
    for name, weights in (("a", a), ("b", b)):
        if weights is not None:
            broadcast = np.broadcast_to(weights.astype(real, copy=False), (len(cost), weights.shape[-1]))
            case[name], case[f"{name}_strides"] = _storage(broadcast)
    case["eps"] = np.atleast_1d(np.asarray(eps, np.float64))
    case["tol"] = np.atleast_1d(np.asarray(tol, np.float64))
    case["mass_tolerance"] = np.asarray(mass_tolerance, np.float64)
    for name, lengths in (("row_lengths", row_lengths), ("col_lengths", col_lengths)):
        if lengths is not None:
            case[name] = np.asarray(lengths, np.int64)
    if init_g is not None:
        case["init_g"] = init_g.astype(real)
    for name, grad in (grads or {}).items():
        case[f"grad_{name}"] = grad.astype(real)
    return {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in case.items()}


def run(case: Arrays) -> Arrays:
    """Runs a case in this process; an error of a launch, or the executor's report, is a RuntimeError."""
    return load_module().run(case)


def choice(results: Arrays, step: str = "forward") -> dict[str, int]:
    """What a step launched."""
    return dict(zip(CHOICE, results[f"{step}_choice"].tolist(), strict=True))


def tier_of(results: Arrays, step: str = "forward") -> str:
    """The tier that a step ran in."""
    return TIERS[choice(results, step)["tier"]]


@dataclass
class Outcome:
    """What a run of the driver said."""

    ok: bool
    checksums: list[str]  # of the results, a case each
    barriers: list[str]  # FILE:LINE of each barrier reached
    report: str  # of the sanitizer, the executor or the launcher


def run_driver(
    variant: str, cases: Iterable[Arrays], without_barrier: str | None = None, timeout: float | None = None
) -> Outcome:
    """Runs cases in the executable of a variant: "plain", "address" or "thread"."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases"
        write_cases(path, cases)
        command = [str(driver(variant)), str(path)]
        if without_barrier is not None:
            command += ["without", without_barrier]
        try:
            done = run_sanitized(command, timeout)
        except subprocess.TimeoutExpired:
            return Outcome(False, [], [], f"no end after {timeout} s")
    words = [line.split() for line in done.stdout.splitlines()]
    return Outcome(
        done.returncode == 0,
        [line[1] for line in words if line[0] == "results"],
        [line[1] for line in words if line[0] == "barrier"],
        done.stderr,
    )


@functools.cache
def driver(variant: str) -> Path:
    """The executable, compiled if need be."""
    return Build().driver(variant)


def run_sanitized(command: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs an executable that was built with a sanitizer, which ends at the first mistake."""
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=timeout)
    done.stderr = _with_lines(done.stderr, command[0])
    return done


def write_cases(path: Path, cases: Iterable[Arrays]) -> None:
    """The driver's input: integers of 64 bits, names and the arrays' bytes."""
    with path.open("wb") as file:

        def integers(*values: int) -> None:
            file.write(struct.pack(f"<{len(values)}q", *values))

        cases = list(cases)
        integers(len(cases))
        for case in cases:
            integers(len(case))
            for name, array in case.items():
                integers(len(name))
                file.write(name.encode())
                integers(ord(array.dtype.char), array.ndim, *array.shape)
                file.write(array.tobytes())


def _with_lines(report: str, executable: str) -> str:
    """Adds the line to frames where it is missing: functions that several objects have in common confuse the reader of
    debug information in the sanitizer.
    """
    frame = re.compile(
        r"^(\s+#\d+ .*?)(?: <null>)? \(\S*" + re.escape(Path(executable).name) + r"\+(0x[0-9a-f]+)\)$", re.M
    )
    missing = [match for match in frame.finditer(report) if not re.search(r":\d+$", match[1])]
    if not missing:
        return report
    command = ["addr2line", "-e", executable, *(match[2] for match in missing)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {match[2]: line.removeprefix(f"{ROOT}/") for match, line in zip(missing, lines, strict=True)}
    return frame.sub(lambda match: f"{match[1]} {found[match[2]]}" if match[2] in found else match[0], report)


def _storage(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries in memory from the first to the last of a view, and its strides in entries."""
    strides = np.array(x.strides, np.int64) // x.itemsize
    if x.size == 0:
        return np.empty(0, x.dtype), strides
    extent = 1 + int(sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)))
    return np.lib.stride_tricks.as_strided(x, (extent,), (x.itemsize,)).copy(), strides
