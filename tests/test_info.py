"""`otface_cuda.info()`, and what an import says when the compiled library cannot be used."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import otface_cuda
from otface_cuda import _build
from otface_cuda.info import Info


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_info():
    info = otface_cuda.info()
    assert info.version == otface_cuda.__version__
    assert info.torch == torch.__version__
    assert info.threads == torch.get_num_threads()
    assert info.cpu_isa in _build.build_info()["cpu_isa_supported"].split(",")
    assert len(info.gpus) == torch.cuda.device_count()
    assert info.built_for.startswith("CUDA and CPU: " if info.cuda else "CPU only: ")
    assert bool(info.cuda) == bool(info.cuda_architectures)


def test_version_is_that_of_pyproject():
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    assert f'\nversion = "{otface_cuda.__version__}"\n' in pyproject.read_text()


def test_text_of_a_cuda_build():
    info = Info(
        version="0.1.0",
        torch="2.14.0+cu130",
        built_with_torch="2.13.0+cu130",
        built_for="CUDA and CPU: OTFACE_CUDA=1",
        cuda="13.0",
        cuda_architectures=("8.0", "9.0"),
        gpus=("NVIDIA H200",),
        cpu_isa="avx512",
        threads=16,
    )
    assert str(info).splitlines() == [
        "otface_cuda 0.1.0",
        "  torch             2.14.0+cu130 (built with 2.13.0+cu130)",
        "  built for         CUDA and CPU: OTFACE_CUDA=1",
        "  CUDA              13.0, compiled for 8.0, 9.0",
        "  GPU               NVIDIA H200",
        "  CPU instructions  avx512",
        "  CPU threads       16",
    ]


def test_python_m_prints_info():
    done = python("-m", "otface_cuda")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"otface_cuda {otface_cuda.__version__}\n  torch ")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_chosen_instruction_set(isa):
    if isa not in _build.build_info()["cpu_isa_supported"].split(","):
        pytest.skip(f"this processor has no {isa}")
    done = python("-c", "import otface_cuda; print(otface_cuda.info().cpu_isa)", OTFACE_CPU_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_unknown_instruction_set():
    done = python("-c", "import otface_cuda", OTFACE_CPU_ISA="sse9")
    assert done.returncode == 1
    assert re.search(
        r"ImportError: otface_cuda: the environment variable OTFACE_CPU_ISA is 'sse9'; "
        r"this processor supports: baseline\b",
        done.stderr,
    )


def test_not_compiled(monkeypatch):
    monkeypatch.setattr(_build, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="otface_cuda is not compiled here: run `pip install --no-build-isolation"):
        _build.load()


def test_compiled_for_another_torch(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: torch_library_impl")

    monkeypatch.setattr(_build, "import_module", fail)
    with pytest.raises(ImportError, match=r"compiled for a torch that does not fit .* \(undefined symbol"):
        _build.load()
