"""Compiles `otface_cuda._C`. What is decided, and why, is in tools/toolchain.py; the rest is in pyproject.toml."""

from __future__ import annotations

import json
import os
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

toolchain.check_setuptools(setuptools.__version__)  # before what torch imports of it
toolchain.check_writable(ROOT)
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    raise toolchain.BuildError(
        "it is compiled against your torch: install torch first, then run pip install --no-build-isolation ."
    ) from None


def decide() -> toolchain.Decision:
    # A ninja that came with pip is beside Python, which is on PATH only in an activated environment.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    toolchain.check_torch(torch.__version__)
    toolchain.check_compiler(os.environ.get("CXX", "c++"))
    toolchain.check_ninja(os.environ)
    toolchain.check_python_headers(sysconfig.get_path("include"))
    toolkits = toolchain.find_toolkits(os.environ, sysconfig.get_path("purelib"))
    return toolchain.decide(os.environ.get("OTFACE_CUDA", ""), torch.__version__, torch.version.cuda, toolkits)


def reporting_nvcc(toolkit: toolchain.Toolkit) -> str:
    """The command torch starts as nvcc. PYTORCH_NVCC may name another one before it, such as ccache and nvcc."""
    nvcc = os.environ.get("PYTORCH_NVCC", shlex.quote(str(toolkit.root / "bin" / "nvcc")))
    return shlex.join([sys.executable, str(ROOT / "tools" / "nvcc_report.py")]) + " " + nvcc


def extension(decision: toolchain.Decision) -> Extension:
    groups = json.loads((ROOT / "csrc" / "sources.json").read_text())
    sources = groups["kernels_cpu"] + groups["torch"]
    both = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    host = ["-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
    nvcc = ["--expt-relaxed-constexpr"]  # device code may call constexpr functions of the standard library
    if os.environ.get("OTFACE_WERROR") == "1":
        host += ["-Werror"]
        nvcc += ["-Werror=all-warnings"]
    if decision.toolkit:
        sources += groups["kernels_cuda"] + groups["torch_cuda"]
        both += ["-DUSE_CUDA", "-DOTFACE_WITH_CUDA"]
        cpp_extension.CUDA_HOME = str(decision.toolkit.root)  # torch's own guess is wrong where nvcc is a script
        os.environ["PYTORCH_NVCC"] = reporting_nvcc(decision.toolkit)
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", toolchain.DEFAULT_ARCHITECTURES)
    cxx = [f"-isystem{path}" for path in cpp_extension.include_paths()]  # no warnings about torch's headers
    cxx += [f"-include{ROOT / 'csrc' / 'torch' / 'old_glibc.h'}"]
    cxx += [f'-DOTFACE_BUILT_WITH="{torch.__version__}"', f"-DOTFACE_BUILT_FOR={json.dumps(str(decision))}"]

    make: Any = cpp_extension.CUDAExtension if decision.toolkit else cpp_extension.CppExtension
    made: Extension = make(
        "otface_cuda._C",
        [f"csrc/{source}" for source in sources],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": both + host + cxx, "nvcc": [*both, *nvcc, "-Xcompiler=" + ",".join(host)]},
        py_limited_api=True,
    )
    if decision.toolkit:
        cudart = toolchain.cudart_library(decision.toolkit.root)
        made.libraries = [cudart if library == "cudart" else library for library in made.libraries]
    return made


DECISION = decide()


class Build(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(
            ROOT / toolchain.build_folder(torch.__version__)
        )  # an editable install would use a new one

    def run(self) -> None:
        print(f"otface_cuda: compiling for {DECISION}", file=sys.stderr)
        super().run()
        print(f"otface_cuda: compiled for {DECISION}", file=sys.stderr)
        if DECISION.advice:
            print(f"otface_cuda: for the CUDA kernels, {DECISION.advice} and build it again.", file=sys.stderr)


setup(
    ext_modules=[extension(DECISION)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
