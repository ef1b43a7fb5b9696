"""Which kernel a problem takes, and why: `otface_cuda.kernel_for`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _checks
from ._build import build_info

# csrc/sinkhorn/plan.cuh: the plan, and the envelope gradient with it
ROWS_PER_PLAN_BLOCK = 8
# csrc/sinkhorn/cpu_*.cpp: bytes in a vector
VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64}


@dataclass(frozen=True)
class Kernel:
    """What `kernel_for` returns; `print` shows it in a few lines. What does not apply is None."""

    task: str  # what is computed, of which problems
    device: str
    tier: str  # "register", "shared", "stream" or "entrywise" on a GPU, "cpu"
    why: str
    threads_per_problem: int
    problems_per_block: int | None = None
    blocks_per_problem: int | None = None
    tile: tuple[int, int] | None = None  # rows and columns of K that a thread holds in registers
    registers: int | None = None  # per thread
    shared_bytes: int | None = None  # per block
    workspace_bytes: int | None = None  # memory of the GPU, beside arguments and results

    def __str__(self) -> str:
        threads = f"{self.threads_per_problem} per problem"
        if self.problems_per_block is not None and self.problems_per_block > 1:
            threads += f", {self.problems_per_block} problems per block"
        if self.blocks_per_problem is not None and self.blocks_per_problem > 1:
            threads += f", in {self.blocks_per_problem} blocks" + (" of rows" if self.tier == "cpu" else "")
        rows = {
            "device": self.device,
            "tier": self.tier,
            "why": self.why,
            "threads": threads,
            "tile per thread": None if self.tile is None else f"{self.tile[0]} x {self.tile[1]} entries of K",
            "registers": None if self.registers is None else f"{self.registers} per thread",
            "shared memory": None if self.shared_bytes is None else f"{_size(self.shared_bytes)} per block",
            "workspace": None if self.workspace_bytes is None else _size(self.workspace_bytes),
        }
        return "\n".join([self.task, *(f"  {name:<17}{text}" for name, text in rows.items() if text is not None)])


def kernel_for(
    n: int,
    m: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cuda",
    grad: str | None = None,
) -> Kernel:
    """Which kernel solves problems of n x m, how it is laid out on the device, and why.

    K is the matrix exp((f + g - C) / eps) that an iteration multiplies with. On a GPU one team of threads solves one
    problem, and the tier says where K lies and who the team is:

    - ``"register"``: the registers of 16 or 32 threads of a warp;
    - ``"shared"``: the shared memory of a block;
    - ``"stream"``: global memory; a gang of blocks, all on the device at once, shares a problem;
    - ``"entrywise"``: there is no K, each entry of the result is computed by itself.

    Args:
        n: rows of the cost.
        m: columns of the cost.
        batch: number of problems. It decides how many blocks share a problem of the stream tier, nothing else.
        dtype: of the cost.
        device: a CUDA device, which is asked for its limits, or ``"cpu"``.
        grad: ``None`` for the solve, or a gradient mode for its backward pass, which is another kernel.

    Returns:
        :class:`otface_cuda.kernels.Kernel`; print it.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.
        RuntimeError: the CUDA kernels were not compiled for this GPU.

    >>> kernel = kernel_for(2048, 2048, device="cpu")
    >>> kernel.tier, kernel.blocks_per_problem
    ('cpu', 32)
    >>> print(kernel)  # doctest: +ELLIPSIS
    sinkhorn, 1 problem of 2048 x 2048, float32
      device           cpu, ...
      tier             cpu
      why              ...
      threads          ...
    """
    where = "kernel_for"
    n, m, batch = (_checks.check_int(where, name, x, 1) for name, x in (("n", n), ("m", m), ("batch", batch)))
    if dtype not in _checks.COST_DTYPES:
        raise ValueError(f"{where}: `dtype` must be float64, float32, bfloat16 or float16, got {dtype}")
    if grad is not None:
        _checks.check_choice(where, "grad", grad, _checks.GRADIENT_MODES)
    on = torch.device(device)
    if on.type not in ("cpu", "cuda"):
        raise ValueError(f"{where}: `device` must be a CUDA device or 'cpu', got {str(on)!r}")
    problems = f"{batch} problem{'s' if batch > 1 else ''} of {n} x {m}"
    what = "sinkhorn" if grad is None else f"{grad} gradient of sinkhorn"
    task = f"{what}, {problems}, {str(dtype).removeprefix('torch.')}"
    # The implicit gradient is computed in float64, whatever the cost is.
    is_double = dtype == torch.float64
    if on.type == "cpu":
        return _on_cpu(task, n, m, batch, is_double or grad == "implicit", grad)
    return _on_cuda(where, task, n, m, batch, is_double, grad, on)


def _on_cuda(
    where: str, task: str, n: int, m: int, batch: int, is_double: bool, grad: str | None, device: torch.device
) -> Kernel:
    if not _checks.HAS_CUDA_KERNELS:
        raise ValueError(
            f"{where}: `device` must be 'cpu', because otface_cuda was built without CUDA kernels; "
            f"{_checks.HOW_TO_GET_CUDA_KERNELS}"
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        found = f"only {count} GPU{'s' if count > 1 else ''}" if count > 0 else "no GPU"
        raise ValueError(f"{where}: `device` must be another or 'cpu', torch finds {found} here, got {str(device)!r}")
    index = torch.cuda.current_device() if device.index is None else device.index
    name = f"cuda:{index}, {torch.cuda.get_device_name(index)}"
    if grad == "envelope":
        return Kernel(
            task,
            name,
            "entrywise",
            "the plan is computed from the potentials, a warp for each row",
            threads_per_problem=32 * n,
            blocks_per_problem=-(-n // ROWS_PER_PLAN_BLOCK),
        )
    with torch.cuda.device(index):
        text: str = torch.ops.otface.sinkhorn_kernel(grad or "forward", batch, n, m, is_double)
    told = dict(line.split("=", 1) for line in text.splitlines())
    if told["tier"] == "none" or told["registers"] == "0":
        major, minor = torch.cuda.get_device_capability(index)
        raise RuntimeError(
            f"{where}: the CUDA kernels were not compiled for {name}; build otface_cuda again with "
            f"TORCH_CUDA_ARCH_LIST={major}.{minor} (`python -m otface_cuda` shows what it was compiled for)"
        )
    limit, shared = _size(int(told["shared_limit"])), _size(int(told["shared_bytes"]))
    beyond_registers = "in float64, without a register tier" if grad == "implicit" else "too large for registers"
    why = {
        "register": "K fits the registers of a warp",
        "shared": f"{beyond_registers}; K and its vectors take {shared} of the {limit} a block can have",
        "stream": f"too large for the {limit} of shared memory a block can have, so K lies in global memory",
    }[told["tier"]]
    tile = int(told["tile_rows"]), int(told["tile_cols"])
    return Kernel(
        task,
        name,
        told["tier"],
        why,
        threads_per_problem=int(told["threads_per_problem"]),
        problems_per_block=int(told["problems_per_block"]),
        blocks_per_problem=int(told["blocks_per_problem"]),
        tile=tile if told["tier"] == "register" else None,
        registers=int(told["registers"]),
        shared_bytes=int(told["shared_bytes"]),
        workspace_bytes=int(told["workspace_bytes"]),
    )


def _on_cpu(task: str, n: int, m: int, batch: int, is_double: bool, grad: str | None) -> Kernel:
    instruction_set, threads = build_info()["cpu_isa"], torch.get_num_threads()
    blocks = row_blocks(n, m, VECTOR_BYTES[instruction_set] // (8 if is_double else 4))
    if batch >= threads:
        why, used = "each thread takes the next problem", 1
    elif blocks > 1:
        why, used = "fewer problems than threads, which share the rows of one at a time", min(threads, blocks)
    else:
        why, used = "too few rows for threads to share", 1
    return Kernel(
        task,
        f"cpu, {instruction_set}, {threads} thread{'s' if threads > 1 else ''}",
        "cpu",
        why,
        threads_per_problem=used,
        blocks_per_problem=blocks,
    )


def row_blocks(n: int, m: int, lanes: int) -> int:
    """Into how many blocks the CPU kernels cut the rows of a problem: RowBlocks in csrc/sinkhorn/cpu_problem.h."""
    entries_per_block, most_blocks = 2**17, 64
    rows, cols = -(-n // 4) * 4, -(-m // lanes) * lanes
    if rows * cols < 4 * entries_per_block:
        return 1
    rows_per_block = max(entries_per_block // cols, rows // most_blocks, 1)
    return -(-rows // (-(-rows_per_block // 4) * 4))


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"
