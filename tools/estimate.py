"""Estimates what the CUDA kernels take on an H200, from their machine code. No GPU is needed, and none is asked.

    python tools/estimate.py            # compiles the kernels one by one, some minutes, and prints the tables
    python tools/estimate.py --write    # and puts them into docs/estimate.md

It needs nvcc, and cuobjdump on PATH, beside nvcc or in Triton's package, which comes with a torch for CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sass
import toolchain
from kernel_resources import parse as parse_resources

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "estimate.md"

# An H200. Rates: the CUDA programming guide's table for compute capability 9.0; latencies: what measurements of this
# and of neighbouring architectures suggest. In docs/estimate.md all of this is said to be assumed.
MULTIPROCESSORS = 132
GIGAHERTZ = 1.98
REGISTERS, SHARED_BYTES, RESERVED_BYTES = 65536, 228 * 1024, 1024  # of a multiprocessor; the last per block
QUARTERS = 4
QUARTER = sass.Machine(
    busy={"multiply-add": 1, "double": 2, "compare and integer": 2, "shuffle and shared": 4, "special": 8, "global": 4},
    latency={"SHFL": 24, "LDS": 30, "MUFU": 24, "LDG": 400},
    other_latency=30,
    until_read=12,
)
LANES_PER_CLOCK = {"float": 128, "double": 64}  # multiply-adds of a multiprocessor
SHARED_BYTES_PER_CLOCK = 128
BYTES_PER_SECOND = 4.8e12
SECONDS_PER_MEETING = 2e-6  # of the blocks of a gang

# Instructions of a warp before and after the iterations of its two problems of 49 x 49 in float, from g = 0: counted by
# hand in the machine code, loops times their rounds. Reading the cost 2,800, the first f 3,500, K 2,800, the rest
# 3,400.
START_AND_END = 12500


@dataclass(frozen=True)
class Kernel:
    """One kernel, of which one loop is looked at."""

    label: str
    code: str  # what comes after the includes: the instantiation, and a type A for it
    name: str  # in the machine code
    needs: Mapping[str, int]  # sass.Flow.loop_with
    shared: str = "0"  # C++: bytes of shared memory per block


@dataclass(frozen=True)
class Compiled:
    loop: list[sass.Instruction]
    registers: int
    spilled: int  # bytes
    shared: int


def register_kernel(algorithm: str, tile: Sequence[str], size: int) -> Kernel:
    scalar, (lane_rows, lane_cols, rows, cols) = tile[0], map(int, tile[1:])
    forward = algorithm == "Forward"
    needs = {"products": (2 if forward else 4) * rows * cols, "SHFL": 2, "MUFU": 2}
    if not forward and scalar == "float":  # the gradients of the weights are summed in double, by some lanes only
        needs["F2F"] = rows // lane_cols + rows % lane_cols + cols // lane_rows + cols % lane_rows
    return Kernel(
        f"{algorithm.lower()}, {scalar}, {size} x {size}",
        f"using A = {algorithm}<RegisterMatrix<{', '.join(tile)}>>;\n"
        "template __global__ void solve_in_registers<A>(const __grid_constant__ A::Params, int);",
        "solve_in_registers",
        needs,
        f"bytes<A>({size}, 32) * {32 // (lane_rows * lane_cols)}",
    )


def memory_kernel(algorithm: str, scalar: str, gang: bool, loads: int) -> Kernel:
    kernel, more = ("solve_in_stream", ", char*, int, int64_t, bool") if gang else ("solve_in_shared", "")
    return Kernel(
        f"{algorithm.lower()}, {scalar}",
        f"using A = {algorithm}<MemoryMatrix<{scalar}, {str(gang).lower()}>>;\n"
        f"template __global__ void {kernel}<A>(const __grid_constant__ A::Params{more});",
        kernel,
        {"products": 64, "SHFL": 6, "MUFU": 1, "LDS": loads},
    )


K_TWICE = Kernel("K twice", "", "solve_with_k_twice", {"products": 98, "BAR": 2, "LDS": 26}, "512")


# --- from source to machine code ---

PROGRAM = """\
#include <cstdio>
#include "sinkhorn/forward.cuh"
#include "sinkhorn/unrolled.cuh"
#include "sinkhorn/tiers.cuh"
namespace otface::sinkhorn {{
template <class A>
size_t bytes(int size, int threads) {{
  Arena arena{{nullptr}};
  arena.take<Problem>(1);
  [[maybe_unused]] const typename A::State state(arena, size, size, threads);
  return arena.used;
}}
{code}
}}
int main() {{
  using namespace otface::sinkhorn;
  std::printf("%zu", static_cast<size_t>({shared}));
}}
"""


class Compiler:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        toolkits = toolchain.find_toolkits(os.environ, sysconfig.get_path("purelib"))
        toolkit = next(toolkits, None)
        if toolkit is None:
            raise SystemExit("estimate: no CUDA toolkit was found; set CUDA_HOME to one.")
        self.nvcc, self.version = toolkit.root / "bin" / "nvcc", toolkit.version
        triton = Path(sysconfig.get_path("purelib"), "triton", "backends", "nvidia", "bin")
        found = shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), str(triton)]))
        beside = self.nvcc.with_name("cuobjdump")
        if found is None and not beside.is_file():
            raise SystemExit("estimate: cuobjdump was not found; it comes with the CUDA toolkit and with Triton.")
        self.cuobjdump = found or str(beside)

    def compile(self, kernel: Kernel) -> Compiled:
        source, program = self.folder / "kernel.cu", self.folder / "kernel"
        if kernel is K_TWICE:
            text = (ROOT / "tools" / "k_twice.cu").read_text()
            text += f'int main() {{ __builtin_printf("{kernel.shared}"); }}\n'
        else:
            text = PROGRAM.format(code=kernel.code, shared=kernel.shared)
        source.write_text(text)
        flags = ["-std=c++20", "-O3", "-arch=sm_90", "--expt-relaxed-constexpr", "--resource-usage", f"-I{ROOT}/csrc"]
        report = self._run([str(self.nvcc), *flags, str(source), "-o", str(program)])
        (resources,) = [k for k in parse_resources(report) if kernel.name in k.name]
        code = sass.parse(self._run([self.cuobjdump, "-sass", str(program)]), kernel.name)
        return Compiled(
            sass.Flow(code).loop_with(kernel.needs),
            resources.registers,
            resources.spill_stores,
            int(self._run([str(program)])),
        )

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"estimate: {command[0]} failed:\n{done.stdout}")
        return done.stdout


def tiles(name: str) -> list[list[str]]:
    """The register tiles of one of the lists in tiers.cuh."""
    text = (ROOT / "csrc" / "sinkhorn" / "tiers.cuh").read_text()
    (listed,) = re.findall(rf"struct {name} {{\s*using List = Tiles<(.*?)>;\s", text, re.DOTALL)
    return [found.split(", ") for found in re.findall(r"RegisterMatrix<([^>]*)>", listed)]


# --- what is made of it ---


def warps_per_multiprocessor(compiled: Compiled, warps_per_block: int = 1) -> int:
    of_registers = REGISTERS // (32 * math.ceil(compiled.registers / 8) * 8) // warps_per_block
    of_shared = SHARED_BYTES // (compiled.shared + RESERVED_BYTES)
    return min(of_registers, of_shared, 32, 64 // warps_per_block) * warps_per_block


@dataclass(frozen=True)
class Estimate:
    """Of one iteration of one problem; clocks of a multiprocessor that is full of such problems."""

    floor: float  # the multiply-adds alone
    issue: float  # every instruction in a slot of its own
    schedule: float  # with the latencies
    longer: float  # with latencies half as long again
    warps: int


def estimate(compiled: Compiled, warps_per_problem: float, products: int, scalar: str, block_warps: int) -> Estimate:
    warps = warps_per_multiprocessor(compiled, block_warps)
    per_quarter = max(1, warps // QUARTERS)
    to_problems = warps_per_problem / (QUARTERS * per_quarter)
    return Estimate(
        products / LANES_PER_CLOCK[scalar],
        len(compiled.loop) * warps_per_problem / QUARTERS,
        sass.clocks_per_round(compiled.loop, per_quarter, QUARTER) * to_problems,
        sass.clocks_per_round(compiled.loop, per_quarter, QUARTER.slower(1.5)) * to_problems,
        warps,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_loop(compiled: Compiled, per_problem: float) -> list[str]:
    """Instructions by part, per problem, and then in all."""
    parts = sass.by_part(compiled.loop)
    names = ("multiply-add", "double", "shuffle and shared", "special", "compare and integer")
    shown = {name: parts[name] for name in names}
    shown["multiply-add"] += shown.pop("double")
    numbers = [*shown.values(), len(compiled.loop) - sum(shown.values()), len(compiled.loop)]
    return [f"{number * per_problem:.0f}" for number in numbers]


COUNTS = ["multiply, add", "shuffle, shared", "special", "compare, integer", "other", "all"]


def tiles_table(compiler: Compiler) -> str:
    rows = []
    for algorithm, scalar in itertools.product(("Forward", "Unrolled"), ("float", "double")):
        for tile in tiles(f"{algorithm}Tiles<{scalar}>"):
            lane_rows, lane_cols, tile_rows, tile_cols = map(int, tile[1:])
            size = min(lane_rows * tile_rows, lane_cols * tile_cols)
            size = 49 if size == 52 else size
            kernel = register_kernel(algorithm, tile, size)
            compiled = compiler.compile(kernel)
            warps = lane_rows * lane_cols / 32
            made = estimate(compiled, warps, (2 if algorithm == "Forward" else 4) * size * size, scalar, 1)
            rows.append(
                [
                    kernel.label,
                    str(compiled.registers),
                    str(made.warps),
                    *of_loop(compiled, warps),
                    f"{made.floor:.1f}",
                    f"{made.issue:.1f}",
                    f"{made.schedule:.1f}",
                    f"{made.schedule / made.floor:.1f}x",
                ]
            )
    head = ["kernel", "registers", "warps", *COUNTS, "floor", "issue", "schedule", "schedule / floor"]
    return table(head, rows)


def layouts_table(compiler: Compiler) -> str:
    size, rows = 49, []
    for tile in ("4, 4, 13, 13", "8, 4, 7, 13", "4, 8, 13, 7"):
        lane_rows, lane_cols, tile_rows, tile_cols = map(int, tile.split(", "))
        compiled = compiler.compile(register_kernel("Forward", ["float", *tile.split(", ")], size))
        warps = lane_rows * lane_cols / 32
        label = f"tiles of {tile_rows} x {tile_cols}, {lane_rows * lane_cols} lanes"
        rows.append(layout_row(label, compiled, warps, 1))
    compiled = compiler.compile(K_TWICE)
    rows.append(layout_row("K twice, 64 threads", compiled, 2, 2))
    narrow = [dataclasses.replace(x, opcode=x.name) for x in compiled.loop]
    label = "the same, if a load of 16 bytes takes no longer than one of 4"
    rows.append(layout_row(label, dataclasses.replace(compiled, loop=narrow), 2, 2))
    return table(["layout", "registers", "warps", *COUNTS, "floor", "issue", "schedule", "latency + 50 %"], rows)


def layout_row(label: str, compiled: Compiled, warps: float, warps_per_block: int) -> list[str]:
    made = estimate(compiled, warps, 2 * 49 * 49, "float", warps_per_block)
    clocks = [f"{x:.1f}" for x in (made.floor, made.issue, made.schedule, made.longer)]
    return [label, str(compiled.registers), str(made.warps), *of_loop(compiled, warps), *clocks]


def batch_table(compiler: Compiler) -> str:
    problems, iterations = 4096, 100
    (tile,) = [x for x in tiles("ForwardTiles<float>") if x[1:] == ["4", "4", "13", "13"]]
    compiled = compiler.compile(register_kernel("Forward", tile, 49))
    made = estimate(compiled, 0.5, 2 * 49 * 49, "float", 1)
    more = 1 + START_AND_END / len(compiled.loop) / iterations
    rows = []
    for label, clocks in (
        ("floor: the multiply-adds alone", made.floor),
        ("issue: every instruction of the iterations", made.issue),
        ("the same, with start and end", made.issue * more),
        ("schedule: the iterations, with latencies", made.schedule),
        ("the same, with start and end", made.schedule * more),
    ):
        seconds = problems / MULTIPROCESSORS * iterations * clocks / (GIGAHERTZ * 1e9)
        rows.append([label, f"{clocks:.1f}", f"{seconds * 1e6:.0f} us", f"{clocks / made.floor:.2f}x"])
    return table(["", "clocks per iteration", "time", "of the floor"], rows)


def rows_per_stripe(gang: bool, rows: int) -> int:
    """As in memory_matrix.cuh."""
    limit, least = (512, 16) if gang else (16, 4)
    return max(least, math.ceil(math.ceil(rows / limit) / 4) * 4)


def shared_table(compiler: Compiler) -> str:
    compiled = compiler.compile(memory_kernel("Forward", "float", False, 8))
    rows = []
    for size in (80, 128, 160, 220):
        stripes = math.ceil(size / rows_per_stripe(False, size))
        padded = 4 * math.ceil(size / 4)
        passes = math.ceil(size / 4)
        moved = 4 * (size * padded + stripes * size + 2 * stripes * padded + 8 * size)
        floor = 2 * size * size / LANES_PER_CLOCK["float"]
        issue = passes * len(compiled.loop) / QUARTERS
        clocks = [f"{x:.0f}" for x in (floor, moved / SHARED_BYTES_PER_CLOCK, issue)]
        rows.append([f"{size} x {size}", str(passes), f"{moved / 1024:.0f} KiB", *clocks, f"{issue / floor:.1f}x"])
    head = ["size", "passes of four rows", "shared memory", "floor", "its bytes", "issue", "issue / floor"]
    needs = f"{compiled.registers} registers"
    return table(head, rows) + "\n\n" + table(["a pass", *COUNTS], [[needs, *of_loop(compiled, 1)]])


def stream_table(compiler: Compiler) -> str:
    compiled = compiler.compile(memory_kernel("Forward", "float", True, 16))
    rows = []
    for problems, size in ((8, 2048), (1, 2048), (1, 10000)):
        threads = 256 if size <= 2048 else 512
        per_multiprocessor = REGISTERS // (compiled.registers * threads)
        resident = MULTIPROCESSORS * per_multiprocessor
        height = rows_per_stripe(True, size)
        stripes = math.ceil(size / height)
        blocks = min(stripes, resident // problems)
        rounds = math.ceil(stripes / blocks)
        once = size <= 8 * threads
        of_k = problems * 4 * size * size
        of_partial = problems * 4 * size * stripes * 2 if once else of_k // 2
        in_flight = per_multiprocessor * threads * 128 * (2 if once else 1)
        seconds = of_k / BYTES_PER_SECOND
        rows.append(
            [
                f"{problems} of {size} x {size}",
                f"{blocks} of {threads} threads",
                f"{stripes} of {height} rows, {stripes / (rounds * blocks):.0%} busy",
                f"{of_k / 1e6:.0f} MB, {'once' if once else 'twice, the second time from cache'}",
                f"{of_partial / 1e6:.0f} MB",
                f"{in_flight / 1024:.0f} KiB",
                f"{seconds * 1e6:.1f} us" if of_k > 50e6 else "in L2",
                f"{2 * SECONDS_PER_MEETING * 1e6:.0f} us",
            ]
        )
    head = ["problems", "blocks", "stripes", "K", "partial", "in flight", "K from memory", "two meetings"]
    needs = f"{compiled.registers} registers, {compiled.spilled} bytes spilled"
    return table(head, rows) + "\n\n" + table(["a pass", *COUNTS], [[needs, *of_loop(compiled, 1)]])


# Marked in docs/estimate.md by these names.
TABLES = {
    "layouts": layouts_table,
    "4096 problems": batch_table,
    "tiles": tiles_table,
    "shared tier": shared_table,
    "stream tier": stream_table,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    text = PAGE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        for name, make in TABLES.items():
            made = make(compiler)
            print(f"{name}\n\n{made}\n", flush=True)
            before, mark, rest = text.partition(f"<!-- {name} -->\n")
            text = f"{before}{mark}\n{made}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    if options.write:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
