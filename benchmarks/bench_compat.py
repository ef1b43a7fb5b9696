"""Drop-in replacements: each original against its replacement in otface_cuda.compat, on this machine, in one run.

    python benchmarks/bench_compat.py
    python benchmarks/bench_compat.py --json out.json
    python benchmarks/bench_compat.py --peers solve_batch-autodiff,PartialFC_V2

Both are called by the same lines on the same float32 input. Their results are compared, and only then timed, in turn. A
time is the median over repetitions, quartiles in brackets.
"""

from __future__ import annotations

import argparse
import functools
import sys
import traceback
from typing import Any

import harness
import measure
import torch
from compat_cases import CASES, Case
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


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    result = run(options)
    deliver(result, table(result), options)
    return 0 if any("ratio" in row for row in result["rows"]) else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("bench_compat", __doc__, CASES)
    options = parser.parse_args(argv)
    check_options(parser, options, CASES)
    if options.device != "cpu" or options.plot:
        parser.error("there are figures for the CPU only, and no chart")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    use_threads(options.threads)
    rows: list[dict[str, Any]] = []

    def row_step(case: Case) -> None:
        rows.append(run_row(case, options.quick))

    for step in progress([(name, functools.partial(row_step, CASES[name])) for name in options.peers]):
        step()
    return {**provenance("compat", options.device, CASES, options.peers), "quick": options.quick, "rows": rows}


def run_row(case: Case, quick: bool) -> dict[str, Any]:
    """Compare, then time in turn."""
    row: dict[str, Any] = {"name": case.name, "title": case.label, "package": case.package, "version": case.version}
    row |= {"note": case.note, "other_programs_cpus": None}
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
    return "\n".join([versions(result), "", *aligned(COLUMNS, lines), "", *wrapped(text)])


if __name__ == "__main__":
    sys.exit(main())
