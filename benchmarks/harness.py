"""What the benchmarks have in common: the command line, the machine in words, the progress, the cells of the tables."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import measure
import torch
from plot import draw, machine

# POT would start each other library that is installed; JAX then takes most of a GPU's memory, from everyone.
for _library in ("JAX", "CUPY", "TENSORFLOW"):
    os.environ.setdefault(f"POT_BACKEND_DISABLE_{_library}", "1")

DISTURBED = 0.1  # CPUs that other programs use during the timings, from which the table says so

FREE = 0.9  # the share of the free memory that may be used


class DisagreementError(Exception):
    """Ours computes something else than float64, so no time of it means anything."""


class Library:
    """Something that is measured."""

    name = ""  # for --peers
    label = ""  # in the table
    module = "torch"  # must be importable
    package = "torch"  # whose version is reported
    note = ""  # footnote: how it is run
    devices = ("cpu", "cuda")

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return ""


# ---- command line ----


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One sentence, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser(name: str, description: str, known: dict[str, Library]) -> Parser:
    """The options that every benchmark has."""
    parser = Parser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure to PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the chart into PATH, a .png (needs matplotlib)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--peers",
        metavar="A,B",
        help=f"only these, or 'none'; known: {', '.join(known)}; default: those installed",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads for everyone; default: torch's")
    parser.add_argument("--quick", action="store_true", help="small rows, few repetitions, no memory: a smoke test")
    return parser


def check_options(parser: Parser, options: argparse.Namespace, known: dict[str, Library]) -> None:
    """One sentence if an option cannot be met; then ``options.peers`` is the list of those that take part."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    cpus = available_cpus()
    if options.threads is not None and not 1 <= options.threads <= cpus:
        parser.error(f"--threads must be from 1 to {cpus}, the CPUs of this machine, got {options.threads}")
    wanted = [] if options.peers in (None, "none") else options.peers.split(",")
    for name in wanted:
        if name not in known:
            parser.error(f"--peers: no peer is called {name!r}; known: {', '.join(known)}")
        if not known[name].installed:
            parser.error(f"--peers: {name} is not installed (pip install {known[name].package})")
        if options.device not in known[name].devices:
            parser.error(f"--peers: {name} does not run on {options.device}")
    everyone = [p.name for p in known.values() if p.installed and options.device in p.devices]
    options.peers = everyone if options.peers is None else wanted
    for path in (options.json, options.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist")
    if options.plot and options.plot.suffix != ".png":
        parser.error("--plot must end in .png")
    if importlib.util.find_spec("otface_cuda") is None:
        parser.error("otface_cuda is not installed: pip install --no-build-isolation . in the project's folder")


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


def provenance(benchmark: str, device: str, known: dict[str, Library], taken: list[str]) -> dict[str, Any]:
    """What is needed to make sense of the figures later. No path of the machine goes in."""
    import otface_cuda

    info = json.loads(json.dumps(dataclasses.asdict(otface_cuda.info())))  # tuples become lists
    commit, dirty = git_state()
    return {
        "benchmark": benchmark,
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
        "absent": [p.name for p in known.values() if device in p.devices and p.name not in taken],
        "memory_resolution_bytes": measure.MEMORY_RESOLUTION if device == "cpu" else 512,
    }


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


def free_bytes(device: str) -> float:
    """Memory that may still be used."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return FREE * (torch.cuda.mem_get_info()[0] + unused)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return FREE * int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo does not say what memory is available")


def first_line(error: Exception) -> str:
    """Of its message, without words that are paths of this machine."""
    lines = str(error).strip().splitlines() or [""]
    return " ".join(word for word in lines[0].split() if not holds_path(word))[:200]


def too_large(needed: int, device: str) -> str:
    """Why so many bytes cannot be had, or an empty string."""
    free = free_bytes(device)
    return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if needed > free else ""


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


def deliver(result: dict[str, Any], table: str, options: argparse.Namespace) -> None:
    """What a run ends with: the printed table, and the files that were asked for."""
    print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        draw(result, options.plot)


# ---- figures ----


def summary(samples: list[float]) -> dict[str, Any]:
    low, middle, high = measure.quartiles(samples)
    return {"median": middle, "quartiles": [low, high], "repetitions": len(samples)}


# ---- the table ----


def aligned(columns: list[str], lines: list[list[str] | str]) -> list[str]:
    """Lines of cells in columns as wide as they need; a text is a line of its own, with an empty one before it."""
    rows = [columns, *lines]
    widths = [max(len(line[i]) for line in rows if isinstance(line, list)) for i in range(len(columns))]
    text = []
    for line in rows:
        if isinstance(line, str):
            text += ["", line]
        else:
            cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            text.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    return text


class Notes:
    """Numbered footnotes; one that is asked for again keeps its number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        return f" [{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {note}" for note, number in self._numbers.items()]


def wrapped(lines: list[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="    ")]


def disturbance(row: dict[str, Any]) -> str:
    """What the title of a row says if the machine was not ours alone."""
    others = row["other_programs_cpus"] or 0
    return f"; DISTURBED: other programs used {others:.1f} CPUs" if others > DISTURBED else ""


def versions(result: dict[str, Any]) -> str:
    """The machine and what ran on it."""
    return (
        f"{processor(result)}, torch {result['torch']}, "
        f"otface_cuda {result['info'].get('version', '')} at {(result['commit'] or 'no commit')[:10]}"
        f"{' with changes' if result['dirty'] else ''}"
    )


def processor(result: dict[str, Any]) -> str:
    """The machine, and for a CPU its instruction set."""
    return machine(result) + ("" if "gpu" in result else f", {result['info']['cpu_isa']}")


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
