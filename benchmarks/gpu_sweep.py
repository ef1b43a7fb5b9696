"""What an iteration, a problem and a call cost on a GPU, for every tier: the figures that docs/estimate.md foretells.

    python benchmarks/gpu_sweep.py                                    # 16 s on an H200
    python benchmarks/gpu_sweep.py --seconds 60 --json sweep.json     # what fits into a minute, most telling first

Each size is solved with 10 and with 110 iterations: the difference is what 100 iterations cost, the rest is start and
end (reading the cost, the first iteration in the log domain, K, the results). The floor is that of the multiply-adds,
2 n m per iteration and problem, at the rate of this card's clock; of the stream tier, one read of K per iteration at
the copy bandwidth that was measured. Times are medians between device events, with cold L2, the host ahead of the GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import measure
import roofline
import torch

import otface_cuda

FEW, MANY = 10, 110  # iterations
LANES = 128  # float32 multiply-adds of a multiprocessor in a clock

# (batch, n = m), most telling first.
FULL = [(4096, 49), (4096, 64), (4096, 32), (16384, 16), (131072, 4), (256, 224), (8, 2048), (1, 10_000)]
MORE = [(1024, 100), (1024, 80), (512, 128), (256, 200), (64, 256), (64, 512), (32, 1024), (1, 2048), (1, 512)]
SMALL = [(1, 49), (64, 49), (1024, 49), (16384, 49), (1, 16), (1, 200)]
GRADIENTS = [(4096, 49), (4096, 32), (16384, 16), (256, 224), (64, 256), (8, 2048)]


def cost_of(batch: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(n)
    x, y = (
        torch.nn.functional.normalize(torch.randn(batch, n, 32, generator=generator, device="cuda"), dim=-1)
        for _ in range(2)
    )
    return (1 - x @ y.mT).to(dtype)


def call_for(cost: torch.Tensor, iterations: int, grad: str | None) -> Callable[[], Any]:
    if grad is None:
        return lambda: otface_cuda.sinkhorn(cost, 0.05, max_iter=iterations)
    leaf = cost.detach().requires_grad_()

    def forward_and_backward() -> torch.Tensor:
        out = otface_cuda.sinkhorn(leaf, 0.05, max_iter=iterations, grad=grad)
        of = out.value if grad == "envelope" else out.transport_cost
        return torch.autograd.grad(of.sum(), leaf)[0]

    return forward_and_backward


def median(call: Callable[[], Any], clock: measure.Clock, least: int = 7, budget: float = 0.15) -> float:
    call()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < least or (time.perf_counter() - begin < budget and len(samples) < 50):
        samples.append(clock.time(call))
        if time.perf_counter() - begin > 2:
            break
    return statistics.median(samples)


def clock_mhz() -> float | None:
    """Of the multiprocessors, now."""
    asked = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def one(batch: int, n: int, dtype: torch.dtype, grad: str | None, clock: measure.Clock) -> dict[str, Any]:
    cost = cost_of(batch, n, dtype)
    few, many = (median(call_for(cost, iterations, grad), clock) for iterations in (FEW, MANY))
    kernel = otface_cuda.kernel_for(n, n, batch=batch, dtype=dtype, device="cuda", grad=grad)
    return {
        "batch": batch,
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
        "grad": grad,
        "tier": kernel.tier,
        "kernel": dataclasses.asdict(kernel),
        "seconds": {str(FEW): few, str(MANY): many},
        "per_iteration": (many - few) / (MANY - FEW),
        "rest": few - FEW * (many - few) / (MANY - FEW),
        "clock_mhz": clock_mhz(),
    }


def work() -> list[tuple[int, int, torch.dtype, str | None]]:
    rows: list[tuple[int, int, torch.dtype, str | None]] = [(*size, torch.float32, None) for size in FULL]
    rows += [(*size, torch.float32, "unrolled") for size in GRADIENTS]
    rows += [(*size, torch.float32, None) for size in (*SMALL, *MORE)]
    rows += [(4096, 49, torch.float32, "implicit"), (4096, 49, torch.float32, "envelope")]
    rows += [(4096, 48, torch.float64, None), (4096, 48, torch.float64, "unrolled"), (4096, 49, torch.bfloat16, None)]
    return rows


def table(result: dict[str, Any]) -> str:
    limits, gpu = result["limits"], result["gpu"]
    columns = ["", "tier", "ms 10", "ms 110", "us/iteration", "floor", "x floor", "rest us"]
    lines: list[list[str] | str] = []
    for row in result["rows"]:
        title = f"B={row['batch']} {row['n']}x{row['n']} {row['dtype']} {row['grad'] or 'forward'}"
        if "cannot" in row:
            lines.append([title, row["cannot"][:40], *["-"] * 6])
            continue
        entries = row["batch"] * row["n"] ** 2
        double = row["dtype"] == "float64"
        if row["tier"] == "stream":
            floor = entries * (8 if double else 4) / limits["copy_bytes_per_s"]
        else:
            rate = gpu["multiprocessors"] * LANES / (2 if double else 1) * 1e6 * (row["clock_mhz"] or 1980)
            floor = 2 * entries / rate
        if row["grad"] == "unrolled":
            floor *= 3  # forward, and twice as much backward
        lines.append(
            [
                title,
                row["tier"],
                f"{1e3 * row['seconds'][str(FEW)]:.3f}",
                f"{1e3 * row['seconds'][str(MANY)]:.3f}",
                f"{1e6 * row['per_iteration']:.2f}",
                f"{1e6 * floor:.2f}",
                f"{row['per_iteration'] / floor:.2f}",
                f"{1e6 * row['rest']:.1f}",
            ]
        )
    head = (
        f"{harness.versions(result)}\nLimits: matrix product {limits['matmul_flops'] / 1e12:.1f} Tflop/s, "
        f"copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    )
    return "\n".join([head, "", *harness.aligned(columns, lines)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("gpu_sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="begin no row after so many; default: 120")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device")
    end = time.perf_counter() + options.seconds
    clock = measure.Clock("cuda")
    result = {**harness.provenance("sweep", "cuda", {}, []), "limits": roofline.measure([], "cuda"), "rows": []}
    torch.cuda.empty_cache()
    for batch, n, dtype, grad in work():
        if time.perf_counter() > end:
            break
        try:
            row = one(batch, n, dtype, grad, clock)
        except RuntimeError as error:  # out of memory: the others can still be measured
            row = {"batch": batch, "n": n, "dtype": str(dtype), "grad": grad, "cannot": harness.first_line(error)}
        result["rows"].append(row)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
