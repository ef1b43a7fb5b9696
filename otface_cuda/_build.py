"""The compiled library: load it, or say in one sentence why that fails, and ask it how it was built."""

from __future__ import annotations

from importlib import import_module

import torch


def load() -> None:
    """Load `otface_cuda._C`, which registers torch.ops.otface.*; an ImportError says what to do about a failure."""
    try:
        import_module("otface_cuda._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            "otface_cuda is not compiled: run `pip install --no-build-isolation .` in its source folder; "
            "and do not import it from there unless it was installed with -e."
        ) from error
    except ImportError as error:
        raise ImportError(
            f"otface_cuda was compiled for another torch than the installed one ({torch.__version__}): "
            f"run `pip install --no-build-isolation --force-reinstall --no-deps .` again. ({error})"
        ) from error
    wrong = build_info()["cpu_isa_error"]
    if wrong:
        raise ImportError(f"otface_cuda: {wrong}")


def build_info() -> dict[str, str]:
    """What csrc/torch/build_info.cpp tells: decision, torch, cpu_isa and, in a CUDA build, cuda, cuda_architectures."""
    lines: str = torch.ops.otface.build_info()
    return dict(line.split("=", 1) for line in lines.splitlines())
