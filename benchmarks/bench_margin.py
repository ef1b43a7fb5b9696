"""Margin-softmax loss, forward + backward: otface_cuda against what else there is, on this machine, in one run.

    python benchmarks/bench_margin.py                                # the CPU rows, up to a million classes
    python benchmarks/bench_margin.py --json out.json --plot out.png
    python benchmarks/bench_margin.py --device cuda                  # with the rows for a GPU, up to ten million

ArcFace(0.5), scale 64, the mean loss and its gradients in x and weight. Everyone's first answer is compared with
float64, and only then timed. A time is the median over repetitions, quartiles in brackets. The limit is torch's own
matrix product: the products that a call does (3 of 2 B C d operations, or 4 where the logits are computed again) at
the best rate of this run, either of the row's own three products in full size or of a large square one, whichever is
faster; both are timed in turn with everyone else. What does not fit in memory is left out, and the table says so.
Ctrl-C ends the run with the rows that are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import harness
import measure
import roofline
import torch
from harness import (
    DisagreementError,
    Notes,
    aligned,
    check_options,
    deliver,
    disturbance,
    first_line,
    megabytes,
    milliseconds,
    progress,
    provenance,
    significant,
    summary,
    time_cell,
    too_large,
    use_threads,
    versions,
    wrapped,
)
from margin_peers import EVERYONE, OTHER, OURS, PEERS, Peer
from margin_problems import (
    TARGET_BYTES,
    Answer,
    Problem,
    Row,
    largest_difference,
    make_problem,
    quick_rows,
    rows_for,
    solve_float64,
)

ROW_SECONDS = 8.0  # time budget of a row; everyone gets the least number of repetitions, however long that takes
LARGE_FLOPS = 10**12  # of one call, from which three repetitions are enough instead of five
AGREES = {"float32": 1e-3, "bfloat16": 5e-2}  # largest difference from float64, of the loss and of each gradient
PRODUCTS = "its own three products"
SQUARE = "a square product"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        result = run(options)
    except DisagreementError as error:
        print(f"bench_margin: {error}", file=sys.stderr)
        return 1
    deliver(result, table(result), options)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("bench_margin", __doc__, PEERS)
    options = parser.parse_args(argv)
    check_options(parser, options, PEERS)
    return options


# ---- the run ----


def run(options: argparse.Namespace) -> dict[str, Any]:
    use_threads(options.threads)
    device = options.device
    torch.set_float32_matmul_precision("highest")  # no TensorFloat-32, for anyone
    rows = quick_rows(device) if options.quick else rows_for(device)
    peers = [OTHER, *(PEERS[name] for name in options.peers)]
    clock = measure.Clock(device)
    results: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []

    def row_step(row: Row) -> None:
        if why := too_large(row.weight_bytes + 2 * OURS.needs(row), device):  # the float64 gradient is as large
            left_out.append({"title": row.title, "why": why})
            return
        result = {"title": row.title, **dataclasses.asdict(row), **run_row(row, peers, clock, options.quick)}
        if not options.quick:
            for entry in (result["ours"], result["other"], *result["peers"]):
                if "seconds" in entry:
                    entry["peak_bytes"] = peak_memory(entry["name"], row, device)
        results.append(result)

    try:
        for step in progress([(row.title, functools.partial(row_step, row)) for row in rows]):
            step()
    except KeyboardInterrupt:  # what has been measured is kept
        done = {entry["title"] for entry in (*results, *left_out)}
        left_out += [{"title": row.title, "why": "the run was stopped"} for row in rows if row.title not in done]
    return {
        **provenance("margin", device, PEERS, options.peers),
        "quick": options.quick,
        "target_bytes": TARGET_BYTES if device == "cpu" else None,
        "rows": results,
        "left_out": left_out,
    }


def run_row(row: Row, peers: list[Peer], clock: measure.Clock, quick: bool) -> dict[str, Any]:
    """Prepare everyone, compare each first answer with float64, then time everyone in turn."""
    device = clock.device
    problem = make_problem(row, device)
    exact = solve_float64(problem)
    ours, ours_entry = prepare(OURS, problem, exact)
    if ours is None:
        raise DisagreementError(f"{row.title}: {ours_entry['cannot']}")
    entries, timed = [], {}
    for peer in peers:
        call, entry = prepare(peer, problem, exact)
        entries.append(entry)
        if call:
            timed[peer.name] = measure.Contender(call)
    del exact

    square, square_flops = roofline.square_product(device, getattr(torch, row.dtype))
    limits = {SQUARE: (square_flops, measure.Contender(square))}
    if not too_large(row.logits_bytes + row.weight_bytes, device):
        limits[PRODUCTS] = (row.flops(3), measure.Contender(own_products(problem)))
    for _, contender in limits.values():
        contender.call()
    ours_timed = measure.Contender(ours)
    others = [*timed.values(), *(contender for _, contender in limits.values())]
    least, budget = (3, 0.5) if quick else (3 if row.flops(4) > LARGE_FLOPS else 5, ROW_SECONDS)
    with measure.OtherPrograms() as other_programs:
        measure.interleave(ours_timed, others, clock, budget, least, ours_each_time=False)
    if device == "cuda":
        ours_entry["wall_seconds"] = summary([clock.time(ours, wall=True) for _ in range(least)])

    rates = {name: flops / min(contender.samples) for name, (flops, contender) in limits.items()}
    best = max(rates, key=rates.__getitem__)
    timed[OURS.name] = ours_timed
    for entry in (ours_entry, *entries):
        if entry["name"] in timed:
            entry["seconds"] = summary(timed[entry["name"]].samples)
            products = EVERYONE[entry["name"]].products(row)
            flops = row.flops(products)
            percent = 100 * flops / entry["seconds"]["median"] / rates[best]
            entry |= {"products": products, "flops": flops, "limit": {"percent": percent, "of": best}}
    other, *others = entries
    for entry in others:
        for mine, key in ((ours_entry, "ratio"), (other, "ratio_other")):
            if "seconds" in entry and "seconds" in mine:
                entry[key] = entry["seconds"]["median"] / mine["seconds"]["median"]
    return {
        "ours": ours_entry,
        "other": other,
        "peers": others,
        "limits": {
            name: {"flops_per_s": rates[name], "seconds": summary(contender.samples)}
            for name, (_, contender) in limits.items()
        },
        "other_programs_cpus": other_programs.cpus,
    }


def prepare(peer: Peer, problem: Problem, exact: Answer) -> tuple[Callable[[], Answer] | None, dict[str, Any]]:
    """Its call, and what to write about it; no call if it has no room, fails, or computes something else."""
    row = problem.row
    entry: dict[str, Any] = {"name": peer.name, "label": peer.label, "version": peer.version}
    if why := too_large(peer.needs(row), problem.x.device.type):
        return None, entry | {"cannot": why}
    try:
        call = peer.prepare(problem)
        answer = call()
    except Exception as error:  # out of memory, a compiler that is missing: the others can still be measured
        traceback.print_exc()
        return None, entry | {"cannot": f"fails: {type(error).__name__}: {first_line(error)}"}
    entry["difference"] = largest_difference(answer, exact)
    if not max(entry["difference"].values()) <= AGREES[row.dtype]:  # also where one is NaN
        return None, entry | {"cannot": f"differs from float64: {entry['difference']}"}
    return call, entry


def own_products(problem: Problem) -> Callable[[], None]:
    """x W^T, G W and G^T x as torch computes them, in full size and without allocating; G is what x W^T left."""
    dtype = getattr(torch, problem.row.dtype)
    x, weight = problem.x.to(dtype), problem.weight.to(dtype)
    logits = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)

    def call() -> None:
        torch.mm(x, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_x)
        torch.mm(logits.T, x, out=grad_weight)

    return call


def peak_memory(name: str, row: Row, device: str) -> float | None:
    """Bytes that a call adds at its peak beyond the gradient of the weight."""
    if device == "cuda":
        peak = measure.peak_memory_cuda(EVERYONE[name].prepare(make_problem(row, device)))
    else:
        peak = measure.peak_memory_cpu(memory_work, name, row, torch.get_num_threads())
    return None if peak is None else max(0.0, peak - row.weight_bytes)


def memory_work(name: str, row: Row, threads: int) -> tuple[Callable, Callable]:
    """In the child process: a tiny call, and a function that prepares the real one."""
    torch.set_num_threads(threads)
    tiny = EVERYONE[name].prepare(make_problem(Row(4, 16, 8), "cpu"))
    return tiny, lambda: EVERYONE[name].prepare(make_problem(row, "cpu"))


# ---- the table ----

COLUMNS = ["", "ms (quartiles)", "ratio", "to other", "limit", "peak MB", "max diff"]


def table(result: dict[str, Any]) -> str:
    """Everything in one aligned text. A peer's ratio says how many times ours is faster."""
    lines: list[list[str] | str] = []
    notes = Notes()
    for row in result["rows"]:
        wall = row["ours"].get("wall_seconds")
        alone = f"; ours made and waited for alone: {milliseconds(wall['median'])} ms" if wall else ""
        rates = ", ".join(f"{limit['flops_per_s'] / 1e9:.0f} Gflop/s {name}" for name, limit in row["limits"].items())
        lines.append(f"{row['title']}; {rates}{alone}{disturbance(row)}")
        for entry in (row["ours"], row["other"], *row["peers"]):
            lines.append(table_line(entry, row, result["target_bytes"], notes.mark))
    return "\n".join([versions(result), "", *aligned(COLUMNS, lines), "", *footnotes(result, notes)])


def table_line(
    entry: dict[str, Any], row: dict[str, Any], target_bytes: float | None, mark: Callable[[str], str]
) -> list[str]:
    if "cannot" in entry:
        return ["  " + entry["label"] + mark(entry["cannot"]), *["-"] * (len(COLUMNS) - 1)]
    note = EVERYONE[entry["name"]].note
    is_ours, is_other = entry is row["ours"], entry is row["other"]
    percent = f"{entry['limit']['percent']:.0f} %"
    if row["target"] and (is_ours or is_other):
        percent += f" (target {row['target']} %)"
    memory = megabytes(entry.get("peak_bytes"))
    if target_bytes and is_ours and "peak_bytes" in entry:
        memory += f" (target {megabytes(target_bytes)})"
    return [
        "  " + entry["label"] + (mark(note) if note else ""),
        time_cell(entry["seconds"]),
        times(entry.get("ratio")),
        times(entry.get("ratio_other")),
        percent,
        memory,
        f"{max(entry['difference'].values()):.0e}",
    ]


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{significant(ratio)}x"


def footnotes(result: dict[str, Any], notes: Notes) -> list[str]:
    cold = "; device events, cold L2, the host ahead of the GPU" if result["device"] == "cuda" else ""
    lines = [
        f"ratio: the peer's median over ours, timed in turn{cold}; to other: over ours the other way.",
        "limit: 6 B C d operations, or 8 B C d where ours computes the logits again, in the median time, against the "
        "better of the two rates in the row's title, each the best of its repetitions.",
        "peak MB: memory beyond weight, its gradient and x at the peak of a call (resolution 0.3 MB on a CPU).",
        "max diff: from float64, of the loss, relative, and of both gradients, relative to the largest entry.",
        *notes.lines(),
        *(f"Left out: {row['title']}: {row['why']}." for row in result["left_out"]),
    ]
    if result["absent"]:
        lines.append(f"Not run, not installed or not asked for: {', '.join(result['absent'])}.")
    return wrapped(lines)


if __name__ == "__main__":
    sys.exit(main())
