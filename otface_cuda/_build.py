"""The compiled library: load it, or say in one sentence why that fails, and ask it how it was built."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch


def load() -> None:
    """Load `otface_cuda._C`, which registers torch.ops.otface.*; the ImportError of a failure says what to do."""
    if find_spec("otface_cuda._C") is None:
        raise ImportError(
            "otface_cuda is not compiled here: run `pip install --no-build-isolation -e .` in its source folder, "
            "or leave that folder if otface_cuda is installed elsewhere."
        )
    try:
        import_module("otface_cuda._C")
    except ImportError as error:
        raise ImportError(
            f"otface_cuda was compiled for a torch that does not fit the installed one ({torch.__version__}): run "
            f"`pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder. ({error})"
        ) from error
    cpu_isa_error = build_info()["cpu_isa_error"]
    if cpu_isa_error:
        raise ImportError(f"otface_cuda: {cpu_isa_error}")


def build_info() -> dict[str, str]:
    """What csrc/torch/build_info.cpp tells: one `key=value` per line."""
    text: str = torch.ops.otface.build_info()
    return dict(line.split("=", 1) for line in text.splitlines())
