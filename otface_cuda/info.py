"""What is installed and what this machine offers it: `otface_cuda.info()`, or `python -m otface_cuda`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import __version__
from ._build import build_info


@dataclass(frozen=True)
class Info:
    """What `info()` returns; `print` shows it as a table."""

    version: str
    torch: str
    built_with_torch: str
    built_for: str  # what the build decided about CUDA, and why
    cuda: str | None  # the toolkit of the build, None in a build without CUDA
    cuda_architectures: tuple[str, ...]
    gpus: tuple[str, ...]
    cpu_isa: str
    threads: int

    def __str__(self) -> str:
        compiled = f"{self.cuda}, compiled for {', '.join(self.cuda_architectures)}" if self.cuda else "not compiled"
        rows = {
            "torch": f"{self.torch} (built with {self.built_with_torch})",
            "built for": self.built_for,
            "CUDA": compiled,
            "GPU": ", ".join(self.gpus) or "none found",
            "CPU instructions": self.cpu_isa,
            "CPU threads": str(self.threads),
        }
        return "\n".join([f"otface_cuda {self.version}", *(f"  {name:<18}{text}" for name, text in rows.items())])


def info() -> Info:
    """Versions, CUDA architectures compiled, GPUs found, CPU instruction set chosen, threads.

    >>> import otface_cuda
    >>> otface_cuda.info().cpu_isa in ("baseline", "avx2", "avx512")
    True
    """
    build = build_info()
    toolkit = int(build.get("cuda", 0))
    return Info(
        version=__version__,
        torch=torch.__version__,
        built_with_torch=build["built_with"],
        built_for=build["built_for"],
        cuda=f"{toolkit // 1000}.{toolkit % 1000 // 10}" if toolkit else None,
        cuda_architectures=tuple(
            f"{int(number) // 100}.{int(number) % 100 // 10}"
            for number in build.get("cuda_architectures", "").split(",")
            if number
        ),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        cpu_isa=build["cpu_isa"],
        threads=torch.get_num_threads(),
    )
