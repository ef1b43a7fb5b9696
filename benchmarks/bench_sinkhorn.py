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
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import faces
import measure
import roofline
import torch
from peers import OURS, PEERS, Peer
from plot import draw, machine
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
DISTURBED = 0.1  # CPUs that other programs use during the timings, from which the table says so
ERROR_PROBLEMS = 64  # how many problems give the marginal error of potentials, and the iterations that match it


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        result = run(options)
    except faces.FacesError as error:
        print(f"bench_sinkhorn: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        draw(result, options.plot)
    return 0


# ---- command line ----


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One sentence, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench_sinkhorn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure to PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the chart into PATH, a .png (needs matplotlib)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--peers",
        metavar="A,B",
        help=f"only these, or 'none'; known: {', '.join(PEERS)}; default: those installed",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads for everyone; default: torch's")
    parser.add_argument(
        "--faces", type=Path, metavar="PATH", help="take the 49x49 costs from faces: ROOT/person/image, or a tar of it"
    )
    parser.add_argument("--quick", action="store_true", help="small rows, few repetitions, no memory: a smoke test")
    options = parser.parse_args(argv)

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    cpus = available_cpus()
    if options.threads is not None and not 1 <= options.threads <= cpus:
        parser.error(f"--threads must be from 1 to {cpus}, the CPUs of this machine, got {options.threads}")
    wanted = [] if options.peers in (None, "none") else options.peers.split(",")
    for name in wanted:
        if name not in PEERS:
            parser.error(f"--peers: no peer is called {name!r}; known: {', '.join(PEERS)}")
        if not PEERS[name].installed:
            parser.error(f"--peers: {name} is not installed (pip install {PEERS[name].package})")
        if options.device not in PEERS[name].devices:
            parser.error(f"--peers: {name} does not run on {options.device}")
    everyone = [p.name for p in PEERS.values() if p.installed and options.device in p.devices]
    options.peers = everyone if options.peers is None else wanted
    for path in (options.json, options.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist")
    if options.plot and options.plot.suffix != ".png":
        parser.error("--plot must end in .png")
    if options.faces and not options.faces.exists():
        parser.error(f"--faces: {options.faces} does not exist")
    if not OURS.installed:
        parser.error("otface_cuda is not installed: pip install --no-build-isolation . in the project's folder")
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
        **provenance(device, peers),
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


def summary(samples: list[float]) -> dict[str, Any]:
    low, middle, high = measure.quartiles(samples)
    return {"median": middle, "quartiles": [low, high], "repetitions": len(samples)}


def separation(problem: Problem) -> dict[str, float]:
    """Do the costs know faces? Their means, and how often a pair of one person is nearer than a pair of two."""
    costs = solve_float64(dataclasses.replace(problem, row=dataclasses.replace(problem.row, backward=False)))
    same, different = costs.transport_cost.split(problem.row.batch // 2)[:2]
    return {
        "mean_cost_same": float(same.mean()),
        "mean_cost_different": float(different.mean()),
        "same_is_nearer": float((same[:, None] < different).float().mean()),
    }


# ---- the machine ----


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(threads: int | None) -> None:
    """The same number of threads for everyone. jax sizes its pool by the CPUs it may use, so those are limited."""
    if threads is None:
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def provenance(device: str, peers: list[Peer]) -> dict[str, Any]:
    """What is needed to make sense of the figures later. No path of the machine goes in."""
    import otface_cuda

    info = json.loads(json.dumps(dataclasses.asdict(otface_cuda.info())))  # tuples become lists
    commit, dirty = git_state()
    return {
        "benchmark": "sinkhorn",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "dirty": dirty,
        "device": device,
        "device_name": torch.cuda.get_device_name(0) if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        **({"gpu": gpu()} if device == "cuda" else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "info": {key: value for key, value in info.items() if not holds_path(value)},
        "absent": [p.name for p in PEERS.values() if device in p.devices and p not in peers],
        "memory_resolution_bytes": measure.MEMORY_RESOLUTION if device == "cpu" else 512,
    }


def kernels(row: Row) -> list[dict[str, Any]]:
    """Those that ours takes for the row: of the solve, and of the gradient."""
    import otface_cuda

    modes = [None, "unrolled"] if row.backward else [None]
    taken = [otface_cuda.kernel_for(row.n, row.m, batch=row.batch, device="cuda", grad=mode) for mode in modes]
    return [dataclasses.asdict(kernel) for kernel in taken]


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "shared_bytes_per_block": properties.shared_memory_per_block_optin,
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
    }


def holds_path(value: Any) -> bool:
    return os.sep in json.dumps(value, default=str)


def git_state() -> tuple[str | None, bool | None]:
    """The commit of this checkout, and whether a tracked file differs from it."""
    try:
        here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **here).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(changed.strip())


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def progress(steps: list[tuple[str, Callable[[], None]]]) -> Iterator[Callable[[], None]]:
    """The steps, with a bar from tqdm if it is there and someone watches, else with one line a step."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        for i, (title, step) in enumerate(steps, start=1):
            print(f"[{i}/{len(steps)}] {title}", file=sys.stderr, flush=True)
            yield step
        return
    with tqdm(total=len(steps), bar_format="{l_bar}{bar:20}{r_bar}", leave=False) as bar:
        for title, step in steps:
            bar.set_description(title)
            yield step
            bar.update()


# ---- the table ----

COLUMNS = ["", "ms (quartiles)", "ratio", "iterations", "error", "limit", "peak MB", "max diff"]


def table(result: dict[str, Any]) -> str:
    """Everything in one aligned text. A peer's ratio says how many times ours is faster."""
    lines: list[list[str] | str] = [COLUMNS]
    notes: dict[str, int] = {}

    def mark(text: str) -> str:
        return f" [{notes.setdefault(text, len(notes) + 1)}]"

    for row in result["rows"]:
        others = row["other_programs_cpus"] or 0
        disturbed = f"; DISTURBED: other programs used {others:.1f} CPUs" if others > DISTURBED else ""
        wall = row["ours"].get("wall_seconds")
        alone = f"; ours made and waited for alone: {milliseconds(wall['median'])} ms" if wall else ""
        tiers = "".join(f", {kernel['tier']} kernel" for kernel in row.get("kernels", []))
        lines.append(f"{row['title']}; {row['input']}{tiers}{alone}{disturbed}")
        for entry in (row["ours"], *row["peers"]):
            lines.append(table_line(entry, row, mark))
    widths = [max(len(line[i]) for line in lines if isinstance(line, list)) for i in range(len(COLUMNS))]
    text = [heading(result), ""]
    for line in lines:
        if isinstance(line, str):
            text += ["", line]
        else:
            cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            text.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join([*text, "", *footnotes(result, notes)])


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
    lines = [
        f"{processor(result)}, torch {result['torch']}, "
        f"otface_cuda {result['info'].get('version', '')} at {(result['commit'] or 'no commit')[:10]}"
        f"{' with changes' if result['dirty'] else ''}"
    ]
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


def processor(result: dict[str, Any]) -> str:
    """The machine, and for a CPU its instruction set."""
    return machine(result) + ("" if "gpu" in result else f", {result['info']['cpu_isa']}")


def footnotes(result: dict[str, Any], notes: dict[str, int]) -> list[str]:
    cold = "; device events, cold L2, the host ahead of the GPU" if result["device"] == "cuda" else ""
    lines = [
        f"ratio: the peer's median over ours, timed in turn{cold}.",
        "error: |P 1 - a|_1 + |P^T 1 - b|_1, the mean over the problems.",
        "limit: our unavoidable multiply-adds (or bytes of K, if it does not stay on chip) against the rate measured.",
        "peak MB: memory beyond the inputs at the peak of a call, outputs included (resolution 0.3 MB on a CPU).",
        "max diff: from float64 after as many iterations, of <P, C>, plan and gradient, relative to the largest.",
    ]
    lines += [f"[{number}] {note}" for note, number in notes.items()]
    if result["absent"]:
        lines.append(f"Not run, not installed or not asked for: {', '.join(result['absent'])}.")
    return [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="    ")]


def significant(value: float, digits: int = 2) -> str:
    """Two significant digits, and all digits before the point: 0.57, 5.7, 57, 568."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def milliseconds(seconds: float) -> str:
    return significant(1e3 * seconds, 3)


def time_cell(seconds: dict[str, Any]) -> str:
    low, high = seconds["quartiles"]
    return f"{milliseconds(seconds['median'])} ({milliseconds(low)}-{milliseconds(high)})"


def megabytes(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.1f}" if count < 1e8 else f"{count / 1e6:.0f}"


if __name__ == "__main__":
    sys.exit(main())
