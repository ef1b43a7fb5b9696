"""Prints what each CUDA kernel of the last build needs, as nvcc's ptxas reported it.

    python tools/kernel_resources.py                             # the build of this Python and its torch
    python tools/kernel_resources.py --registers-only register_  # and fail if a kernel of such a name spills

A kernel whose matrix is to stay in registers must use no local memory at all. ptxas tells of two ways to fail:
registers spilled because there are too few, and a stack frame, which an array gets that is indexed by a variable.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import toolchain
from nvcc_report import SUFFIX

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["arch", "registers", "spill stores", "spill loads", "stack", "shared", "kernel"]


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. Everything but the registers is in bytes; `shared` is the static part."""

    name: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int

    @property
    def local_memory(self) -> str:
        """What of its data is not in registers, or an empty string."""
        if self.spill_stores or self.spill_loads:
            return f"spills registers ({self.spill_stores} bytes stored, {self.spill_loads} bytes loaded)"
        return f"has a stack frame of {self.stack} bytes" if self.stack else ""


def parse(report: str) -> list[Kernel]:
    """The kernels of a text that ptxas printed. Functions that were not inlined report too; they are left out."""
    kernels = []
    name, architecture, frame = "", "", None
    lines = iter(report.splitlines())
    for line in lines:
        if entry := re.search(r"Compiling entry function '(.+)' for '(.+)'", line):
            name, architecture = entry.groups()
        elif line.endswith(f"Function properties for {name}"):
            frame = [int(number) for number in re.findall(r"(\d+) bytes", next(lines, ""))]
        elif (used := re.search(r"Used (\d+) registers", line)) and frame:
            shared = re.search(r"(\d+) bytes smem", line)
            stack, stores, loads = frame
            size = int(shared[1]) if shared else 0
            kernels.append(Kernel(name, architecture, int(used[1]), stores, loads, stack, size))
            frame = None
    return kernels


def demangle(names: Iterable[str]) -> list[str]:
    """Through c++filt, which comes with g++; without it the names stay as they are."""
    names = list(names)
    if shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def short(name: str) -> str:
    """A demangled name without its return type, its parameters and the namespaces."""
    name = re.sub(r"(?:\b\w+|\(anonymous namespace\))::", "", name.removeprefix("void "))
    name = re.sub(r"(?<=>) (?=>)", "", name)  # as older versions of c++filt write it
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def table(kernels: list[Kernel]) -> str:
    lines = [COLUMNS]
    for kernel, name in zip(kernels, demangle(k.name for k in kernels), strict=True):
        numbers = (kernel.registers, kernel.spill_stores, kernel.spill_loads, kernel.stack, kernel.shared)
        lines.append([kernel.architecture, *map(str, numbers), short(name)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS) - 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:]), line[-1]]) for line in lines
    )


def failures(kernels: list[Kernel], pattern: str) -> list[str]:
    """A sentence for each kernel of that name that uses local memory, or one if there is no such kernel at all."""
    named = list(zip(kernels, demangle(k.name for k in kernels), strict=True))
    chosen = [(kernel, name) for kernel, name in named if re.search(pattern, name)]
    if not chosen:
        return [f"no kernel's name matches {pattern!r}, so nothing was checked."]
    return [
        f"{short(name)} ({kernel.architecture}) must stay in registers, but it {kernel.local_memory}."
        for kernel, name in chosen
        if kernel.local_memory
    ]


def read(folder: Path, sources: list[str]) -> list[Kernel]:
    """The kernels of those sources, compiled into that folder. SystemExit where one has no report."""
    kernels = []
    for source in sources:
        report = folder / "csrc" / (source.removesuffix(".cu") + ".o" + SUFFIX)
        if not report.is_file():
            raise SystemExit(f"kernel_resources: {folder} holds no report on {source}; build with CUDA first.")
        kernels += parse(report.read_text())
    return kernels


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernel_resources", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", help="where it was built; default: by this Python and its torch"
    )
    parser.add_argument("--registers-only", metavar="REGEX", help="fail if a kernel of such a name uses local memory")
    options = parser.parse_args(argv)
    folder = options.folder
    if folder is None:
        import torch

        folder = ROOT / toolchain.build_folder(torch.__version__)
    groups = json.loads((ROOT / "csrc" / "sources.json").read_text())
    kernels = read(folder, [file for files in groups.values() for file in files if file.endswith(".cu")])
    print(table(kernels), flush=True)
    sentences = failures(kernels, options.registers_only) if options.registers_only else []
    for sentence in sentences:
        print(f"kernel_resources: {sentence}", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
