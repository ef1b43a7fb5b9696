"""Batched Sinkhorn: otface_cuda against what else there is, on this machine, in one run.

    python benchmarks/bench_sinkhorn.py                              # the CPU rows, under two minutes on 2 cores
    python benchmarks/bench_sinkhorn.py --faces lfw112.tar           # the 49x49 costs come from real faces
    python benchmarks/bench_sinkhorn.py --json out.json --plot out.png
    python benchmarks/bench_sinkhorn.py --device cuda                # the rows for a GPU

How a figure comes about: problems.py makes the inputs and the float64 answers, peers.py runs each library, measure.py
takes times and memory, roofline.py measures what the machine can do. A time is the median over repetitions, quartiles
in brackets; a ratio is a peer's median over ours, the two timed in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faces
import harness
import measure
import roofline
import torch
from harness import (
    Notes,
    aligned,
    check_options,
    deliver,
    disturbance,
    megabytes,
    milliseconds,
    progress,
    provenance,
    significant,
    summary,
    time_cell,
    use_threads,
    versions,
    wrapped,
)
from peers import OURS, PEERS, Peer
from problems import (
    ROWS,
    Answer,
    Problem,
    Row,
    largest_difference,
    make_problem,
    plan_error,
    potentials_error,
    quick_rows,
    solve_float64,
)

ROW_SECONDS = 4.0  # time budget of a row; everyone gets five repetitions, however long that takes
ERROR_PROBLEMS = 64  # how many problems give the marginal error of potentials, and the iterations that match it


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        result = run(options)
    except faces.FacesError as error:
        print(f"bench_sinkhorn: {error}", file=sys.stderr)
        return 2
    deliver(result, table(result), options)
    return 0


# ---- command line ----


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.parser("bench_sinkhorn", __doc__, PEERS)
    parser.add_argument(
        "--faces", type=Path, metavar="PATH", help="take the 49x49 costs from faces: ROOT/person/image, or a tar of it"
    )
    options = parser.parse_args(argv)
    check_options(parser, options, PEERS)
    if options.faces and not options.faces.exists():
        parser.error(f"--faces: {options.faces} does not exist")
    return options


# ---- the run ----


def run(options: argparse.Namespace) -> dict[str, Any]:
    use_threads(options.threads)
    device = options.device
    rows = quick_rows(device) if options.quick else ROWS[device]
    points, facts = None, None
    if options.faces:
        points, facts = faces.face_points(options.faces, max(row.batch for row in rows if row.faces))
    peers = [PEERS[name] for name in options.peers]
    clock = measure.Clock(device)
    limits: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []

    def limits_step() -> None:
        limits.append(roofline.measure(rows, device))

    def row_step(row: Row) -> None:
        given = tuple(side[: row.batch] for side in points) if points and row.faces else None
        problem = make_problem(row, device, given)
        least, budget = (3, 0.5) if options.quick else (5, ROW_SECONDS)
        result = {"title": row.title, "input": "faces" if given else "random points", **dataclasses.asdict(row)}
        result |= run_row(problem, peers, clock, least, budget)
        if device == "cuda":
            result["kernels"] = kernels(row)
        if given and "mean_cost_same" not in facts:
            facts.update(separation(problem))
        if not options.quick:
            for entry in (result["ours"], *result["peers"]):
                if "seconds" in entry:
                    entry["peak_bytes"] = peak_memory(entry["name"], problem, device)
        results.append(result)

    # The limits are measured before and after, and the better figures count: a machine that others use is not always
    # at its best, and a limit too low would flatter us.
    row_steps = [(row.title, functools.partial(row_step, row)) for row in rows]
    for step in progress([("limits of the machine", limits_step), *row_steps, ("limits again", limits_step)]):
        step()
    best = roofline.best(*limits)
    for row, result in zip(rows, results, strict=True):
        result["work"] = roofline.work(row)
        result["limit"] = roofline.percentage(row, result["ours"]["seconds"]["median"], best, device)
    return {
        **provenance("sinkhorn", device, PEERS, options.peers),
        "quick": options.quick,
        "limits": best,
        "faces": facts,
        "rows": results,
    }


def run_row(problem: Problem, peers: list[Peer], clock: measure.Clock, least: int, budget: float) -> dict[str, Any]:
    """Prepare everyone, compare each first answer with float64, then time everyone in turn."""
    row = problem.row
    exact = None if row.from_points else solve_float64(problem.head(problem.checked))
    ours = OURS.prepare(problem)
    entries = [describe(OURS, problem, ours(), exact)]
    timed = [(OURS.name, measure.Contender(ours))]
    for peer in peers:
        entry = {"name": peer.name, "label": peer.label, "version": peer.version}
        entries.append(entry)
        if why := peer.cannot(row, problem.x.device.type):
            entry["cannot"] = why
            continue
        try:
            call = peer.prepare(problem)
            entry |= describe(peer, problem, call(), exact)
        except Exception as error:  # out of memory, a compiler that is missing: the others can still be measured
            traceback.print_exc()
            entry["cannot"] = f"fails in this row: {type(error).__name__}"
            continue
        if peer.own_schedule:
            entry["ours_iterations"] = iterations_to_reach(problem.head(ERROR_PROBLEMS), entry["error"])
            if entry["ours_iterations"] is None:
                entry["cannot"] = f"ours does not reach its marginal error, {entry['error']:.1e}"
                continue
            ours_at_error = OURS.prepare_points(problem, entry["ours_iterations"])
            ours_at_error()
            timed.append((f"ours at the error of {peer.name}", measure.Contender(ours_at_error)))
        timed.append((peer.name, measure.Contender(call, wall=peer.own_streams)))

    (_, ours_timed), *others = timed
    with measure.OtherPrograms() as other_programs:
        measure.interleave(ours_timed, [c for _, c in others], clock, budget, least)
    if clock.device == "cuda":
        entries[0]["wall_seconds"] = summary([clock.time(ours, wall=True) for _ in range(least)])
    samples = {name: contender.samples for name, contender in timed}
    for entry in entries:
        if entry["name"] not in samples:
            continue
        scale = row.batch / entry.get("counted", row.batch)
        entry["seconds"] = summary([scale * s for s in samples[entry["name"]]])
        against = samples.get(f"ours at the error of {entry['name']}")
        if against:
            entry["ours_seconds"] = summary(against)
        baseline = entry.get("ours_seconds", entries[0]["seconds"])
        if entry is not entries[0]:
            entry["ratio"] = entry["seconds"]["median"] / baseline["median"]
    return {"ours": entries[0], "peers": entries[1:], "other_programs_cpus": other_programs.cpus}


def describe(peer: Peer, problem: Problem, result: Any, exact: Answer | None) -> dict[str, Any]:
    """Who it is, its marginal error, and how far it is from float64."""
    entry: dict[str, Any] = {"name": peer.name, "label": peer.label, "version": peer.version}
    entry["iterations"] = peer.iterations(problem.row)
    if peer.counted(problem.row) < problem.row.batch:
        entry["counted"] = peer.counted(problem.row)
    if peer.own_schedule or exact is None:
        f, g = peer.read(problem, result) if peer.own_schedule else (result.f, result.g)
        entry["error"] = potentials_error(problem.head(ERROR_PROBLEMS), f, g)
    else:
        answer = peer.read(problem, result)
        entry["error"] = plan_error(answer.plan)
        entry["difference"] = largest_difference(answer, exact)
    return entry


def iterations_to_reach(problem: Problem, error: float, most: int = 20_000) -> int | None:
    """The fewest iterations after which ours has at most this marginal error: doubling, then bisection.

    None if it is not reached.
    """

    def reached(iterations: int) -> bool:
        out = OURS.prepare_points(problem, iterations)()
        return potentials_error(problem, out.f, out.g) <= error

    high = 1
    while not reached(high):
        if high >= most:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def peak_memory(name: str, problem: Problem, device: str) -> float | None:
    """Bytes one call adds at its peak; None where it cannot be seen (jax has its own allocator on a GPU)."""
    contender = OURS if name == OURS.name else PEERS[name]
    if device == "cuda":
        return None if contender.own_streams else measure.peak_memory_cuda(contender.prepare(problem))
    x, y = problem.x.numpy(), problem.y.numpy()
    return measure.peak_memory_cpu(memory_work, name, problem.row, x, y, torch.get_num_threads())


def memory_work(name: str, row: Row, x: Any, y: Any, threads: int) -> tuple[Callable, Callable]:
    """In the child process: a tiny call, and a function that prepares the real one."""
    torch.set_num_threads(threads)
    contender = OURS if name == OURS.name else PEERS[name]
    points = torch.from_numpy(x), torch.from_numpy(y)
    tiny_row = Row(2, 8, 8, row.eps, 2, backward=row.backward)
    tiny = contender.prepare(make_problem(tiny_row, "cpu"))
    return tiny, lambda: contender.prepare(make_problem(row, "cpu", points))


def separation(problem: Problem) -> dict[str, float]:
    """Do the costs know faces? Their means, and how often a pair of one person is nearer than a pair of two."""
    costs = solve_float64(dataclasses.replace(problem, row=dataclasses.replace(problem.row, backward=False)))
    same, different = costs.transport_cost.split(problem.row.batch // 2)[:2]
    return {
        "mean_cost_same": float(same.mean()),
        "mean_cost_different": float(different.mean()),
        "same_is_nearer": float((same[:, None] < different).float().mean()),
    }


def kernels(row: Row) -> list[dict[str, Any]]:
    """Those that ours takes for the row: of the solve, and of the gradient."""
    import otface_cuda

    modes = [None, "unrolled"] if row.backward else [None]
    taken = [otface_cuda.kernel_for(row.n, row.m, batch=row.batch, device="cuda", grad=mode) for mode in modes]
    return [dataclasses.asdict(kernel) for kernel in taken]


# ---- the table ----

COLUMNS = ["", "ms (quartiles)", "ratio", "iterations", "error", "limit", "peak MB", "max diff"]


def table(result: dict[str, Any]) -> str:
    """Everything in one aligned text. A peer's ratio says how many times ours is faster."""
    lines: list[list[str] | str] = []
    notes = Notes()
    for row in result["rows"]:
        wall = row["ours"].get("wall_seconds")
        alone = f"; ours made and waited for alone: {milliseconds(wall['median'])} ms" if wall else ""
        tiers = "".join(f", {kernel['tier']} kernel" for kernel in row.get("kernels", []))
        lines.append(f"{row['title']}; {row['input']}{tiers}{alone}{disturbance(row)}")
        for entry in (row["ours"], *row["peers"]):
            lines.append(table_line(entry, row, notes.mark))
    return "\n".join([heading(result), "", *aligned(COLUMNS, lines), "", *footnotes(result, notes)])


def table_line(entry: dict[str, Any], row: dict[str, Any], mark: Callable[[str], str]) -> list[str]:
    if "cannot" in entry:
        return ["  " + entry["label"] + mark(entry["cannot"]), *["-"] * (len(COLUMNS) - 1)]
    label = "  " + entry["label"]
    if entry["name"] in PEERS and PEERS[entry["name"]].note:
        label += mark(PEERS[entry["name"]].note)
    if "counted" in entry:
        label += mark(f"run on {entry['counted']} of {row['batch']} problems, its time scaled")
    iterations = str(entry["iterations"] or "-")
    if "ours_iterations" in entry:
        ours = f"max_iter={entry['ours_iterations']}, in {milliseconds(entry['ours_seconds']['median'])} ms"
        label += mark(f"in this row ours reaches that error with {ours}")
    is_ours = entry is row["ours"]
    limit = row["limit"] if is_ours else None
    difference = entry.get("difference")
    return [
        label,
        time_cell(entry["seconds"]),
        "" if is_ours else f"{significant(entry['ratio'])}x",
        iterations,
        f"{entry['error']:.1e}",
        f"{limit['percent']:.0f} % {limit['of']}" if limit else "",
        megabytes(entry.get("peak_bytes")),
        f"{max(difference.values()):.0e}" if difference else "-",
    ]


def heading(result: dict[str, Any]) -> str:
    lines = [versions(result)]
    limits = result["limits"]
    reads = "".join(
        f", reading {int(size) / 2**20:.0f} MB {rate / 1e9:.0f} GB/s"
        for size, rate in limits["read_bytes_per_s"].items()
    )
    lines.append(
        f"Limits: matrix product {limits['matmul_flops'] / 1e9:.0f} Gflop/s, "
        f"copy {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s{reads}"
    )
    if result["faces"]:
        f = result["faces"]
        lines.append(
            f"Faces: {f['pairs']} pairs of {f['images']} images; mean transport cost {f['mean_cost_same']:.4f} for one "
            f"person, {f['mean_cost_different']:.4f} for two; the first is smaller in {f['same_is_nearer']:.0%}"
        )
    return "\n".join(lines)


def footnotes(result: dict[str, Any], notes: Notes) -> list[str]:
    cold = "; device events, cold L2, the host ahead of the GPU" if result["device"] == "cuda" else ""
    lines = [
        f"ratio: the peer's median over ours, timed in turn{cold}.",
        "error: |P 1 - a|_1 + |P^T 1 - b|_1, the mean over the problems.",
        "limit: our unavoidable multiply-adds (or bytes of K, if it does not stay on chip) against the rate measured.",
        "peak MB: memory beyond the inputs at the peak of a call, outputs included (resolution 0.3 MB on a CPU).",
        "max diff: from float64 after as many iterations, of <P, C>, plan and gradient, relative to the largest.",
    ]
    lines += notes.lines()
    if result["absent"]:
        lines.append(f"Not run, not installed or not asked for: {', '.join(result['absent'])}.")
    return wrapped(lines)


if __name__ == "__main__":
    sys.exit(main())
