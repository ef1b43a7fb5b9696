"""Drop-in replacements: each original against its replacement in otface_cuda.compat, on this machine, in one run.

    python benchmarks/bench_compat.py
    python benchmarks/bench_compat.py --json out.json
    python benchmarks/bench_compat.py --peers solve_batch-autodiff,PartialFC_V2

Both are called by the same lines on the same input, float32 unless it says otherwise. Their results are compared, and
only then timed, in turn. A time is the median over repetitions, quartiles in brackets. A second table has small calls,
on one thread, forward and forward + backward.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import traceback
from typing import Any

import harness
import measure
import torch
from compat_cases import CASES, Call, Case, differentiated
from compat_small import SMALL, Side, Small
from harness import (
    Notes,
    aligned,
    check_options,
    deliver,
    disturbance,
    first_line,
    progress,
    provenance,
    significant,
    summary,
    time_cell,
    use_threads,
    versions,
    wrapped,
)

ROW_SECONDS = 8.0  # time budget of a row; both get the least number of repetitions, however long that takes
LEAST = 5  # repetitions
SMALL_SECONDS = 2.0  # time budget of the two timings of a small call
TURN = 1e-3  # seconds of small calls that are timed as one


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    result = run(options)
    deliver(result, table(result), options)
    return 0 if any("cannot" not in row for row in result["rows"] + result["small"]) else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("bench_compat", __doc__, CASES | SMALL)
    options = parser.parse_args(argv)
    check_options(parser, options, CASES | SMALL)
    if options.device != "cpu" or options.plot:
        parser.error("there are figures for the CPU only, and no chart")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    use_threads(options.threads)
    rows: list[dict[str, Any]] = []
    small: list[dict[str, Any]] = []

    def step(name: str) -> None:
        if name in CASES:
            rows.append(run_row(CASES[name], options.quick))
        else:
            small.append(run_small(SMALL[name], options.quick))

    for run_one in progress([(name, functools.partial(step, name)) for name in options.peers]):
        run_one()
    about = provenance("compat", options.device, CASES | SMALL, options.peers)
    return {**about, "quick": options.quick, "rows": rows, "small": small}


def description(case: Case | Small) -> dict[str, Any]:
    of_package = {"package": case.package, "version": case.version}
    return {"name": case.name, "title": case.label, **of_package, "note": case.note, "other_programs_cpus": None}


def run_row(case: Case, quick: bool) -> dict[str, Any]:
    """Compare, then time in turn."""
    row = description(case)
    try:
        original, replacement = case.prepare(quick, torch.Generator().manual_seed(0))
        row["difference"] = largest_difference(replacement(), original())
    except Exception as error:  # another version of the original, for instance: the other rows can still be measured
        traceback.print_exc()
        return row | {"cannot": f"fails: {type(error).__name__}: {first_line(error)}"}
    if not row["difference"] <= case.agrees:  # also where one is NaN
        return row | {"cannot": f"the two differ by {row['difference']:.0e}"}
    old, new = measure.Contender(original), measure.Contender(replacement)
    with measure.OtherPrograms() as other_programs:
        measure.interleave(new, [old], measure.Clock("cpu"), 0.2 if quick else ROW_SECONDS, LEAST)
    row |= {"original": summary(old.samples), "replacement": summary(new.samples)}
    row["ratio"] = row["original"]["median"] / row["replacement"]["median"]
    return row | {"other_programs_cpus": other_programs.cpus}


def run_small(case: Small, quick: bool) -> dict[str, Any]:
    """Compare, then time in turn on one thread: the call alone, and with the gradients of everything it takes."""
    row = description(case)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pair = case.prepare(torch.Generator().manual_seed(0))
        ways = ["forward"] + ["forward + backward"] * case.has_gradient
        calls = {way: [way_of(way, side, pair.inputs) for side in pair[:2]] for way in ways}
        row["difference"] = max(largest_difference(new(), old()) for old, new in calls.values())
        if not row["difference"] <= case.agrees:
            return row | {"cannot": f"the two differ by {row['difference']:.0e}"}
        with measure.OtherPrograms() as other_programs:
            row["ways"] = {way: in_turn(*pair, quick) for way, pair in calls.items()}
    except Exception as error:  # another version of the original, for instance: the other rows can still be measured
        traceback.print_exc()
        return row | {"cannot": f"fails: {type(error).__name__}: {first_line(error)}"}
    finally:
        torch.set_num_threads(threads)
    return row | {"other_programs_cpus": other_programs.cpus}


def way_of(way: str, side: Side, inputs: tuple[torch.Tensor, ...]) -> Call:
    if way == "forward":
        return lambda: (side.call(*inputs).detach(),)
    return differentiated(side.call, *inputs, parameters=side.parameters)


def in_turn(original: Call, replacement: Call, quick: bool) -> dict[str, Any]:
    """Of one call each; many are timed together, so that the clock is no part of it."""
    begin = time.perf_counter()
    original()
    count = 1 if quick else max(1, int(TURN / (time.perf_counter() - begin)))
    old, new = (measure.Contender(functools.partial(repeat, call, count)) for call in (original, replacement))
    measure.interleave(new, [old], measure.Clock("cpu"), 0.02 if quick else SMALL_SECONDS / 2, LEAST)
    sides = {"original": old, "replacement": new}
    times = {name: summary([x / count for x in side.samples]) for name, side in sides.items()}
    return {**times, "ratio": times["original"]["median"] / times["replacement"]["median"]}


def repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def largest_difference(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Of the entries of any result, relative to the largest entry of that result."""
    return max(
        float((x.double() - y.double()).abs().amax() / y.double().abs().amax())
        for x, y in zip(found, expected, strict=True)
    )


# ---- the table ----

COLUMNS = ["", "original, ms (quartiles)", "replacement, ms (quartiles)", "ratio", "max diff"]


def table(result: dict[str, Any]) -> str:
    lines: list[list[str] | str] = []
    notes = Notes()
    for row in result["rows"]:
        about = row["note"] or f"{row['package']} {row['version']}"
        if "cannot" in row:
            lines.append([row["title"] + notes.mark(row["cannot"]), *["-"] * (len(COLUMNS) - 1)])
            continue
        lines.append(
            [
                row["title"] + disturbance(row) + notes.mark(about),
                time_cell(row["original"]),
                time_cell(row["replacement"]),
                f"{significant(row['ratio'])}x",
                f"{row['difference']:.0e}",
            ]
        )
    text = ["max diff: of the results and gradients of the two, relative to the largest entry of each.", *notes.lines()]
    if result["absent"]:
        text.append(f"Not run, not installed or not asked for: {', '.join(result['absent'])}.")
    small = aligned(SMALL_COLUMNS, [small_line(row) for row in result["small"]]) if result["small"] else []
    return "\n".join([versions(result), "", *aligned(COLUMNS, lines), "", *wrapped(text), "", *small])


SMALL_COLUMNS = ["small calls, one thread", "original, us", "ours", "ratio", "with backward, us", "ours", "ratio"]


def small_line(row: dict[str, Any]) -> list[str]:
    cells = [row["title"] + disturbance(row)]
    if "cannot" in row:
        return [f"{cells[0]}: {row['cannot']}", *["-"] * (len(SMALL_COLUMNS) - 1)]
    for way in ("forward", "forward + backward"):
        times = row["ways"].get(way)
        cells += small_cells(times) if times else ["-"] * 3
    return cells


def small_cells(times: dict[str, Any]) -> list[str]:
    """Original and replacement in microseconds, and their ratio."""
    medians = [significant(1e6 * times[side]["median"], 3) for side in ("original", "replacement")]
    return [*medians, f"{significant(times['ratio'], 3)}x"]


if __name__ == "__main__":
    sys.exit(main())
