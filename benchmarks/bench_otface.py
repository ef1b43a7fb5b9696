"""The transport term of the OTFace loss, forward + backward: otface_cuda against torch, on this machine, in one run.

    python benchmarks/bench_otface.py                                # batches of 64 to 512, maps of 512 x 7 x 7
    python benchmarks/bench_otface.py --json out.json --plot out.png
    python benchmarks/bench_otface.py --device cuda

The hard triplets of a batch with four images of a person, eps 1, 10 iterations; mining them is not timed. Everyone's
first answer is compared with float64, and only then timed. A time is the median over repetitions, quartiles in
brackets. Two measures, timed in turn with everyone else: the term's own matrix products alone (costs of the different
pairs, gradients of those in the loss), by the fastest of three ways to ask torch for them; and the limit, the best rate
of a large square product, of which the operations of the term's products are a percentage.
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
from otface_peers import EVERYONE, OURS, PEERS, Peer
from otface_problems import (
    Answer,
    Problem,
    Row,
    largest_difference,
    make_problem,
    quick_rows,
    rows_for,
    solve_float64,
)
from otface_products import own_products

ROW_SECONDS = 30.0  # time budget of a row; everyone gets the least number of repetitions, however long that takes
AGREES = 1e-3  # largest difference from float64, of the loss and of the gradient


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        result = run(options)
    except DisagreementError as error:
        print(f"bench_otface: {error}", file=sys.stderr)
        return 1
    deliver(result, table(result), options)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("bench_otface", __doc__, PEERS)
    options = parser.parse_args(argv)
    check_options(parser, options, PEERS)
    return options


# ---- the run ----


def run(options: argparse.Namespace) -> dict[str, Any]:
    use_threads(options.threads)
    device = options.device
    torch.set_float32_matmul_precision("highest")  # no TensorFloat-32, for anyone
    peers = [PEERS[name] for name in options.peers]
    clock = measure.Clock(device)
    results: list[dict[str, Any]] = []

    def row_step(row: Row) -> None:
        result = {"title": row.title, **dataclasses.asdict(row), **run_row(row, peers, clock, options.quick)}
        if not options.quick:
            for entry in (result["ours"], *result["peers"]):
                if "seconds" in entry:
                    entry["peak_bytes"] = peak_memory(entry["name"], row, device)
        results.append(result)

    rows = quick_rows(device) if options.quick else rows_for(device)
    for step in progress([(row.title, functools.partial(row_step, row)) for row in rows]):
        step()
    return {
        **provenance("otface", device, PEERS, options.peers),
        "quick": options.quick,
        "rows": results,
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
    products = {name: measure.Contender(call) for name, call in own_products(problem, exact).items()}
    square_call, square_flops = roofline.square_product(device)
    square = measure.Contender(square_call)
    for contender in (*products.values(), square):
        contender.call()
    timed[OURS.name] = measure.Contender(ours)
    others = [contender for name, contender in timed.items() if name != OURS.name]
    least, budget = (3, 0.5) if quick else (5, ROW_SECONDS)
    with measure.OtherPrograms() as other_programs:
        measure.interleave(
            timed[OURS.name], [*others, *products.values(), square], clock, budget, least, ours_each_time=False
        )
    if device == "cuda":
        ours_entry["wall_seconds"] = summary([clock.time(ours, wall=True) for _ in range(least)])

    for entry in (ours_entry, *entries):
        if entry["name"] in timed:
            factor = len(problem.triplets) / entry["sampled"] if "sampled" in entry else 1
            entry["seconds"] = summary([factor * seconds for seconds in timed[entry["name"]].samples])
    seconds = {name: summary(contender.samples) for name, contender in products.items()}
    fastest = min(seconds, key=lambda name: seconds[name]["median"])
    median = ours_entry["seconds"]["median"]
    flops, rate = row.flops(len(exact.pairs), len(exact.active)), square_flops / min(square.samples)
    ours_entry["limit"] = {"percent": 100 * flops / median / rate, "of": "a square product"}
    ours_entry["own_products"] = {"times": median / seconds[fastest]["median"], "by": fastest}
    for entry in entries:
        if "seconds" in entry:
            entry["ratio"] = entry["seconds"]["median"] / median
    return {
        "triplets": len(problem.triplets),
        "n_active": exact.n_active,
        "pairs": len(exact.pairs),
        "active_pairs": len(exact.active),
        "flops": flops,
        "ours": ours_entry,
        "peers": entries,
        "products": seconds,
        "square_flops_per_s": rate,
        "other_programs_cpus": other_programs.cpus,
    }


def prepare(peer: Peer, problem: Problem, exact: Answer) -> tuple[Callable[[], Answer] | None, dict[str, Any]]:
    """Its call, and what to write about it; no call if it has no room, fails, or computes something else."""
    entry: dict[str, Any] = {"name": peer.name, "label": peer.label, "version": peer.version}
    if why := too_large(peer.needs(problem), problem.maps.device.type):
        return None, entry | {"cannot": why}
    if peer.sample:
        problem = problem.sample(peer.sample)
        exact = solve_float64(problem)
        entry["sampled"] = len(problem.triplets)
    try:
        call = peer.prepare(problem)
        answer = call()
    except Exception as error:  # out of memory, for instance: the others can still be measured
        traceback.print_exc()
        return None, entry | {"cannot": f"fails: {type(error).__name__}: {first_line(error)}"}
    entry["difference"] = largest_difference(answer, exact)
    if not max(entry["difference"].values()) <= AGREES:  # also where one is NaN
        return None, entry | {"cannot": f"differs from float64: {entry['difference']}"}
    return call, entry


def prepared(name: str, row: Row, device: str) -> Callable[[], Answer]:
    peer, problem = EVERYONE[name], make_problem(row, device)
    return peer.prepare(problem.sample(peer.sample) if peer.sample else problem)


def peak_memory(name: str, row: Row, device: str) -> float | None:
    """Bytes that a call adds at its peak, the gradient of the maps included."""
    if device == "cuda":
        return measure.peak_memory_cuda(prepared(name, row, device))
    return measure.peak_memory_cpu(memory_work, name, row, torch.get_num_threads())


def memory_work(name: str, row: Row, threads: int) -> tuple[Callable, Callable]:
    """In the child process: a tiny call, and a function that prepares the real one."""
    torch.set_num_threads(threads)
    return prepared(name, quick_rows("cpu")[0], "cpu"), lambda: prepared(name, row, "cpu")


# ---- the table ----

COLUMNS = ["", "ms (quartiles)", "ratio", "of its products", "of the limit", "peak MB", "max diff"]


def table(result: dict[str, Any]) -> str:
    """Everything in one aligned text. A peer's ratio says how many times ours is faster."""
    lines: list[list[str] | str] = []
    notes = Notes()
    for row in result["rows"]:
        wall = row["ours"].get("wall_seconds")
        alone = f"; ours made and waited for alone: {milliseconds(wall['median'])} ms" if wall else ""
        products = ", ".join(f"{name} {milliseconds(s['median'])} ms" for name, s in row["products"].items())
        lines.append(
            f"{row['title']}: {row['triplets']:,} hard triplets, {row['n_active']:,} active; {row['pairs']:,} pairs, "
            f"{row['active_pairs']:,} of them in the loss; products: {products}{alone}{disturbance(row)}"
        )
        for entry in (row["ours"], *row["peers"]):
            lines.append(table_line(entry, row, notes.mark))
    return "\n".join([versions(result), "", *aligned(COLUMNS, lines), "", *footnotes(result, notes)])


def table_line(entry: dict[str, Any], row: dict[str, Any], mark: Callable[[str], str]) -> list[str]:
    if "cannot" in entry:
        return ["  " + entry["label"] + mark(entry["cannot"]), *["-"] * (len(COLUMNS) - 1)]
    note = EVERYONE[entry["name"]].note
    times = limit = ""
    if "limit" in entry:
        times = f"{entry['own_products']['times']:.2f}x" + (f" (target {row['target']}x)" if row["target"] else "")
        limit = f"{entry['limit']['percent']:.0f} %"
    return [
        "  " + entry["label"] + (mark(note) if note else ""),
        time_cell(entry["seconds"]),
        f"{significant(entry['ratio'])}x" if "ratio" in entry else "",
        times,
        limit,
        megabytes(entry.get("peak_bytes")),
        f"{max(entry['difference'].values()):.0e}",
    ]


def footnotes(result: dict[str, Any], notes: Notes) -> list[str]:
    cold = "; device events, cold L2, the host ahead of the GPU" if result["device"] == "cuda" else ""
    lines = [
        f"ratio: the peer's median over ours, timed in turn{cold}.",
        "of its products: our median over that of the fastest of the three ways to compute the matrix products alone: "
        "torch.bmm of pairs, torch.mm of blocks of the table of all pairs, torch.mm of each image with its partners.",
        "of the limit: the operations of these products in our median, of the best rate of a square product.",
        "peak MB: memory that a call adds at its peak (resolution 0.3 MB on a CPU).",
        "max diff: from float64, of the loss, relative, and of the gradient, relative to its largest entry.",
        *notes.lines(),
    ]
    if result["absent"]:
        lines.append(f"Not asked for: {', '.join(result['absent'])}.")
    return wrapped(lines)


if __name__ == "__main__":
    sys.exit(main())
