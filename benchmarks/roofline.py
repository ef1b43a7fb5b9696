"""What this machine can do, measured in the same run as the operator, and how much of it the operator uses.

One iteration of Sinkhorn on K (n x m) is one product with K and one with its transpose: 2 n m multiply-adds, 4 n m
floating-point operations. Nothing else is counted as work, in particular no exponential, so the percentage is of the
arithmetic that the mathematics cannot avoid. The unrolled backward pass goes through the iterations in reverse: two
more products with K an iteration, and one more 2 n m for the rank-2 term of each iteration in the gradient of the cost.

The limit a row is held against:
- K of one problem fits in the L2 cache of a core (CPU), or the kernel keeps it in registers or in the shared memory of
  a block (GPU): arithmetic, against the rate of torch's float32 matrix product. On a GPU too it is made of float32
  multiply-adds: TensorFloat-32, which is done by other units and is no float32, is off.
- otherwise: one read of K an iteration (4 n m bytes), against the bandwidth of reading a matrix of that size (CPU), or
  of a large copy in the GPU's memory.
- none, on a GPU, when K is in its memory, but those of all problems together fit in its L2 cache: how fast that cache
  can be read is not measured here, and against the memory the figure would flatter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Clock
from problems import Row

MATRIX = 2048  # side of the matrix product; on CUDA four times that


def work(row: Row) -> dict[str, int]:
    """Floating-point operations, and bytes of K read, of one call on the whole batch."""
    per_iteration = 4 * row.n * row.m
    products = 3 if row.backward else 1
    steps = row.batch * row.iterations
    return {
        "flops": steps * per_iteration * products,
        "bytes": steps * 4 * row.n * row.m * (2 if row.backward else 1),
    }


def on_chip_bytes(device: str) -> int:
    """Where a K of this size stays for a whole solve: the L2 cache of a core, or the shared memory of a block."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == "2":
            return int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return 1 << 20  # not told: the usual size


def measure(rows: list[Row], device: str) -> dict[str, Any]:
    """The limits that the rows need. Rates are the best of several repetitions: a limit is what can be reached."""
    torch.set_float32_matmul_precision("highest")  # no TensorFloat-32
    clock = Clock(device)
    product, flops = square_product(device)
    seconds = _best(product, clock)
    copied = torch.rand(_copied_bytes(device) // 4, device=device)
    target = torch.empty_like(copied)
    copy_seconds = _best(lambda: target.copy_(copied), clock)
    footprints = [] if device == "cuda" else sorted({footprint(row) for row in rows if not fits(row, device)})
    return {
        "matmul_flops": flops / seconds,
        "copy_bytes_per_s": 2 * 4 * copied.numel() / copy_seconds,  # read and written
        "read_bytes_per_s": {str(size): _read_rate(size, clock) for size in footprints},
        "on_chip_bytes": on_chip_bytes(device),
    }


def square_product(device: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], Any], int]:
    """A matrix product that can be as fast as any, and its operations."""
    side = MATRIX * (4 if device == "cuda" else 1)
    a, b, out = (torch.rand(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * side**3


def _copied_bytes(device: str) -> int:
    """So many that no cache holds a part worth mentioning, and the start of the copy takes no part of the time."""
    return min(2**32, torch.cuda.mem_get_info()[0] // 4) if device == "cuda" else 2**28


def best(first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """The highest figures of several measurements."""
    result = dict(first)
    for other in others:
        for key, value in other.items():
            result[key] = best(result[key], value) if isinstance(value, dict) else max(result[key], value)
    return result


def fits(row: Row, device: str) -> bool:
    """Whether K of one problem stays on chip."""
    if device == "cuda":
        import otface_cuda

        return otface_cuda.kernel_for(row.n, row.m, batch=row.batch, device=device).tier in ("register", "shared")
    return 4 * row.n * row.m <= on_chip_bytes(device)


def in_l2_of_gpu(row: Row) -> bool:
    return footprint(row) <= torch.cuda.get_device_properties(0).L2_cache_size


def footprint(row: Row) -> int:
    """Bytes of all K of the batch, which are read again in each iteration."""
    return 4 * row.batch * row.n * row.m


def percentage(row: Row, seconds: float, limits: dict[str, Any], device: str) -> dict[str, Any] | None:
    """Percent of the limit that applies, and its name; None where there is none."""
    if fits(row, device):
        done, name, limit = work(row)["flops"], "matmul", limits["matmul_flops"]
    elif device != "cuda":
        done, name, limit = work(row)["bytes"], "read", limits["read_bytes_per_s"][str(footprint(row))]
    elif in_l2_of_gpu(row):
        return None
    else:
        done, name, limit = work(row)["bytes"], "copy", limits["copy_bytes_per_s"]
    return {"percent": 100 * done / seconds / limit, "of": name}


def _read_rate(size: int, clock: Clock) -> float:
    """Bytes a second of reading the same ``size`` bytes over and over.

    The best of torch's sum of all entries, sums of rows, largest entry, and dot product of the matrix with itself, each
    of them one pass with all threads.
    """
    side = round((size / 4) ** 0.5)
    matrix = torch.rand(side, side, device=clock.device)
    flat = matrix.view(-1)
    passes: list[Callable[[], Any]] = [
        lambda: matrix.sum(),
        lambda: matrix.sum(1),
        lambda: matrix.amax(),
        lambda: torch.dot(flat, flat),
    ]
    return 4 * side * side / min(_best(call, clock) for call in passes)


def _best(call: Callable[[], Any], clock: Clock, seconds: float = 0.4) -> float:
    call()
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        best = min(best, clock.time(call))
    return best
