"""`otface_cuda.kernel_for`: what it says of each tier, of the CPU, and of devices that are not there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

import otface_cuda
from otface_cuda import _checks, kernel_for
from otface_cuda.kernels import VECTOR_BYTES, row_blocks

pytestmark = pytest.mark.either_torch

ROOT = Path(__file__).parents[1]


def lines(*arguments: int, **options) -> dict[str, str]:
    """The printed table: its first line as "", the others by their names."""
    first, *others = str(kernel_for(*arguments, **options)).splitlines()
    assert all(line.startswith("  ") and len(line) <= 120 for line in others)
    return {"": first} | {line[2:19].strip(): line[19:] for line in others}


# The CPU


def test_many_small_problems_on_the_cpu(threads: Callable[[int], None]) -> None:
    threads(2)
    assert lines(49, 49, batch=256, dtype=torch.bfloat16, device="cpu") == {
        "": "sinkhorn, 256 problems of 49 x 49, bfloat16",
        "device": f"cpu, {otface_cuda.info().cpu_isa}, 2 threads",
        "tier": "cpu",
        "why": "each thread takes the next problem",
        "threads": "1 per problem",
    }


def test_one_large_problem_on_the_cpu(threads: Callable[[int], None]) -> None:
    threads(3)
    told = lines(2048, 2048, device=torch.device("cpu"), grad="implicit")
    assert told[""] == "implicit gradient of sinkhorn, 1 problem of 2048 x 2048, float32"
    assert "share the rows" in told["why"]
    assert told["threads"] == "3 per problem, in 32 blocks of rows"


def test_one_small_problem_on_the_cpu(threads: Callable[[int], None]) -> None:
    threads(2)
    assert kernel_for(49, 49, device="cpu").threads_per_problem == 1
    threads(1)
    assert kernel_for(2048, 2048, device="cpu").threads_per_problem == 1
    assert "1 thread" in kernel_for(2048, 2048, device="cpu").device


BLOCKS = r"""
#include <cstdio>
#include <cstring>
#define OTFACE_VEC_BYTES 16
#include "sinkhorn/cpu_problem.h"
using namespace otface::sinkhorn;
int main() {
  for (long n, m, lanes; std::scanf("%ld %ld %ld", &n, &m, &lanes) == 3;)
    std::printf("%ld\n", static_cast<long>(RowBlocks(round_up(n, 4), round_up(m, lanes)).count));
}
"""


def test_blocks_of_rows_are_those_of_the_kernels(tmp_path: Path) -> None:
    """The rule stands in C++ and in Python: a small program asks the former."""
    (tmp_path / "blocks.cpp").write_text(BLOCKS)
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++20", "-I", ROOT / "csrc", tmp_path / "blocks.cpp", "-o", tmp_path / "blocks"], check=True
    )
    sizes = [1, 3, 49, 511, 724, 725, 800, 1023, 2048, 4097, 50_000, 200_000]
    asked = [(n, m, size // 4) for n in sizes for m in sizes for size in VECTOR_BYTES.values()]
    told = subprocess.run(
        [tmp_path / "blocks"],
        input="\n".join(" ".join(map(str, shape)) for shape in asked),
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(line) for line in told.stdout.split()] == [row_blocks(*shape) for shape in asked]


def test_every_instruction_set_has_its_vectors() -> None:
    places = {"baseline": "sinkhorn/cpu_baseline.cpp", "avx2": "common/begin_avx2.h", "avx512": "common/begin_avx512.h"}
    sources = {isa: (ROOT / "csrc" / place).read_text() for isa, place in places.items()}
    assert {isa: f"#define OTFACE_VEC_BYTES {size}\n" in sources[isa] for isa, size in VECTOR_BYTES.items()} == (
        dict.fromkeys(VECTOR_BYTES, True)
    )
    assert otface_cuda.info().cpu_isa in VECTOR_BYTES


# CUDA, as the library would tell it


TOLD = {
    "forward": "tier=register\ntile_rows=13\ntile_cols=13\nthreads_per_problem=16\nproblems_per_block=2\n"
    "blocks_per_problem=1\nregisters=251\nshared_bytes=24960\nworkspace_bytes=0\n",
    "implicit": "tier=shared\ntile_rows=0\ntile_cols=0\nthreads_per_problem=256\nproblems_per_block=1\n"
    "blocks_per_problem=1\nregisters=128\nshared_bytes=98304\nworkspace_bytes=0\n",
    "unrolled": "tier=stream\ntile_rows=0\ntile_cols=0\nthreads_per_problem=8448\nproblems_per_block=1\n"
    "blocks_per_problem=33\nregisters=96\nshared_bytes=3136\nworkspace_bytes=67108864\n",
}


class Gpu:
    """Two GPUs of which the second is current, and what they are asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.told = dict(TOLD)
        self.on: int | None = None
        monkeypatch.setattr(_checks, "HAS_CUDA_KERNELS", True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.ops.otface, "sinkhorn_kernel", self.sinkhorn_kernel, raising=False)

    def device(self, index: int) -> AbstractContextManager[None]:
        self.on = index
        return nullcontext()

    def sinkhorn_kernel(self, op: str, batch: int, n: int, m: int, is_double: bool) -> str:
        self.asked.append((op, batch, n, m, is_double, self.on))
        return self.told[op] + "shared_limit=232448\nmultiprocessors=132\n"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_register_tier(gpu: Gpu) -> None:
    assert lines(49, 50, batch=4096) == {
        "": "sinkhorn, 4096 problems of 49 x 50, float32",
        "device": "cuda:1, GPU 1",
        "tier": "register",
        "why": "K fits the registers of a warp",
        "threads": "16 per problem, 2 problems per block",
        "tile per thread": "13 x 13 entries of K",
        "registers": "251 per thread",
        "shared memory": "24.38 KiB per block",
        "workspace": "0 bytes",
    }
    assert gpu.asked == [("forward", 4096, 49, 50, False, 1)]


def test_shared_tier(gpu: Gpu) -> None:
    told = lines(100, 120, grad="implicit", dtype=torch.float64, device="cuda:0")
    assert told[""] == "implicit gradient of sinkhorn, 1 problem of 100 x 120, float64"
    assert told["device"] == "cuda:0, GPU 0"
    assert told["tier"] == "shared"
    assert told["why"] == (
        "in float64, without a register tier; K and its vectors take 96 KiB of the 227 KiB a block can have"
    )
    assert told["threads"] == "256 per problem"
    assert "tile per thread" not in told
    assert gpu.asked == [("implicit", 1, 100, 120, True, 0)]
    gpu.told["forward"] = TOLD["implicit"]
    assert lines(100, 120)["why"].startswith("too large for registers; K and its vectors take 96 KiB of ")


def test_stream_tier(gpu: Gpu) -> None:
    kernel = kernel_for(4000, 4000, batch=4, grad="unrolled", dtype=torch.float16)
    assert kernel.tier == "stream"
    assert "227 KiB" in kernel.why
    assert "  threads          8448 per problem, in 33 blocks\n" in str(kernel)
    assert str(kernel).endswith("  workspace        64 MiB")
    assert gpu.asked == [("unrolled", 4, 4000, 4000, False, 1)]


def test_envelope(gpu: Gpu) -> None:
    kernel = kernel_for(49, 50, batch=4096, grad="envelope")
    assert (kernel.tier, kernel.threads_per_problem, kernel.blocks_per_problem) == ("entrywise", 49 * 32, 7)
    assert gpu.asked == []


@pytest.mark.parametrize("problem", ["tier=none", "registers=0"])
def test_kernels_for_another_gpu(problem: str, gpu: Gpu) -> None:
    """There is no code for this one in the library: CUDA knows no registers of it, or no block fits."""
    key = problem.partition("=")[0]
    told = [problem if line.startswith(key) else line for line in TOLD["forward"].splitlines()]
    gpu.told["forward"] = "\n".join(told) + "\n"
    with pytest.raises(RuntimeError, match=r"kernel_for: .*not compiled for cuda:1, GPU 1; .*TORCH_CUDA_ARCH_LIST=7.5"):
        kernel_for(49, 49)


def test_what_the_library_tells() -> None:
    """The operator itself runs without a GPU, and knows no limits then."""
    if not _checks.HAS_CUDA_KERNELS:
        pytest.skip("needs a build with CUDA kernels")
    for op, text in TOLD.items():
        told = torch.ops.otface.sinkhorn_kernel(op, 3, 300, 300, False)
        names = [line.partition("=")[0] for line in told.splitlines()]
        assert names == [line.partition("=")[0] for line in text.splitlines()] + ["shared_limit", "multiprocessors"]


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("grad", [None, "unrolled", "implicit"])
def test_tiers_of_a_gpu(grad: str | None, device: str) -> None:
    tiers = [kernel_for(n, n, grad=grad, device=device).tier for n in (8, 120, 3000)]
    assert tiers == ["shared" if grad == "implicit" else "register", "shared", "stream"]
    kernel = kernel_for(3000, 3000, grad=grad, device=device)
    assert kernel.blocks_per_problem > 1
    assert kernel.workspace_bytes >= 4 * 3000 * 3000
    assert 0 < kernel.registers <= 255
    assert all(kernel_for(n, n, grad=grad, device=device).shared_bytes > 0 for n in (8, 120, 3000))


# Wrong arguments


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"n": 0}, ValueError, "`n` must be at least 1, got 0"),
        ({"m": 4.0}, TypeError, "`m` must be an int, got 4.0"),
        ({"batch": 0}, ValueError, "`batch` must be at least 1, got 0"),
        ({"dtype": torch.int32}, ValueError, "`dtype` must be float64, .* got torch.int32"),
        ({"grad": "exact"}, ValueError, "`grad` must be .* got 'exact'"),
        ({"device": "mps"}, ValueError, "`device` must be a CUDA device or 'cpu', got 'mps'"),
        (
            {"device": "cuda:2"},
            ValueError,
            "`device` must be another or 'cpu', torch finds only 2 GPUs here, got 'cuda:2'",
        ),
    ],
    ids=lambda x: "".join(x) if isinstance(x, dict) else "",
)
def test_wrong_arguments(wrong: dict, error: type[Exception], words: str, gpu: Gpu) -> None:
    with pytest.raises(error, match=f"kernel_for: {words}"):
        kernel_for(**{"n": 4, "m": 5, **wrong})


def test_no_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"kernel_for: `device` must be .* no GPU here, got 'cuda'"):
        kernel_for(49, 49)


def test_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "HAS_CUDA_KERNELS", False)
    with pytest.raises(ValueError, match=r"kernel_for: `device` must be 'cpu', .*; (run|install) .*-m otface_cuda"):
        kernel_for(49, 49)
