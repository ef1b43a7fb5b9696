"""Builds `otface_cuda._C`. All else about the package is in pyproject.toml; what is decided, and why, in tools/toolchain.py."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    raise toolchain.BuildError(
        "it is compiled against your torch: install torch first, then run pip install --no-build-isolation ."
    ) from None


class IncrementalBuild(cpp_extension.BuildExtension):
    """Keeps the object files, one folder per torch, where an editable install would compile all of them every time."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}")


def extension() -> Any:
    # A ninja that came with pip is beside Python, which is on PATH only in an activated environment.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    toolchain.check_torch(torch.__version__)
    toolchain.check_compiler(os.environ.get("CXX", "c++"))
    toolchain.check_ninja(os.environ)
    toolchain.check_python_headers(sysconfig.get_path("include"))
    toolkits = toolchain.find_toolkits(os.environ, sysconfig.get_path("purelib"))
    decision = toolchain.decide(os.environ.get("OTFACE_CUDA", ""), torch.__version__, torch.version.cuda, toolkits)
    print(f"otface_cuda: {decision}", file=sys.stderr)

    groups = json.loads((ROOT / "csrc" / "sources.json").read_text())
    sources = groups["kernels_cpu"] + groups["torch"]
    common = ["-std=c++20", "-O3", "-g0", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    common += [f"-isystem{path}" for path in cpp_extension.include_paths()]  # no warnings from torch's headers
    common += [f'-DOTFACE_BUILD_TORCH="{torch.__version__}"', f'-DOTFACE_BUILD_DECISION="{decision}"']
    host = ["-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=fast", "-fvisibility=hidden"]
    host += ["-Werror"] if os.environ.get("OTFACE_WERROR") == "1" else []
    make: Any = cpp_extension.CppExtension
    if decision.toolkit:
        make = cpp_extension.CUDAExtension
        cpp_extension.CUDA_HOME = str(decision.toolkit.root)  # torch's own guess is wrong where nvcc is a script
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", toolchain.DEFAULT_ARCHITECTURES)
        sources += groups["kernels_cuda"] + groups["torch_cuda"]
        common += ["-DUSE_CUDA", "-DOTFACE_WITH_CUDA"]
    return make(
        "otface_cuda._C",
        [f"csrc/{source}" for source in sources],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": common + host, "nvcc": common + ["-Xcompiler=" + ",".join(host)]},
        py_limited_api=True,
    )


if __name__ == "__main__":
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": IncrementalBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
