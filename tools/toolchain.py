"""What setup.py builds, with which tools, and why. Needs nothing but the standard library.

Every function here takes what it looks at as an argument, so that tests/test_build.py can ask it about machines that
do not exist.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = 77  # the first that reads `license = "MIT"` in pyproject.toml

# Without a GPU to ask and without TORCH_CUDA_ARCH_LIST. Machine code for two architectures keeps the build short: that
# for 8.0 (A100) also runs on 8.6 and 8.9, and the PTX of 9.0 (H100, H200) is translated for anything newer.
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"otface_cuda: {sentence}")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: the folder that holds include/ and bin/nvcc, and its version, such as "13.0"."""

    root: Path
    version: str


@dataclass(frozen=True)
class Decision:
    """Whether CUDA is built, with which toolkit, and the reason in words.

    `advice` is for one who may have expected CUDA kernels and gets none: how to get what is missing.
    """

    toolkit: Toolkit | None
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{'CUDA and CPU' if self.toolkit else 'CPU only'}: {self.reason}"


def decide(forced: str, torch_version: str, torch_cuda: str | None, toolkits: Iterator[Toolkit]) -> Decision:
    """CUDA is built when torch has it and a toolkit of its major version is found; OTFACE_CUDA=0 or 1 forces.

    Whether this machine has a GPU plays no part: builds are often made on machines without one.
    """
    if forced not in ("", "0", "1"):
        raise BuildError(f"the environment variable OTFACE_CUDA must be 0 or 1, got {forced!r}.")
    if forced == "0":
        return Decision(None, "OTFACE_CUDA=0")
    if torch_cuda is None:
        if forced:
            raise BuildError(f"OTFACE_CUDA=1, but torch {torch_version} has no CUDA; install a torch that has.")
        return Decision(None, f"torch {torch_version} has no CUDA")

    mismatched = None
    for toolkit in toolkits:
        if toolkit.version.split(".")[0] == torch_cuda.split(".")[0]:
            asked = "OTFACE_CUDA=1, " if forced else ""
            return Decision(toolkit, f"{asked}torch {torch_version}, CUDA {toolkit.version} toolkit in {toolkit.root}")
        mismatched = mismatched or toolkit
    if mismatched:
        raise BuildError(
            f"torch {torch_version} is for CUDA {torch_cuda}, but the toolkit in {mismatched.root} is CUDA "
            f"{mismatched.version}; set CUDA_HOME to one of the same major version, or "
            f"{how_to_get_a_toolkit(torch_cuda)}, or set OTFACE_CUDA=0 to build without."
        )
    where = "searched CUDA_HOME, CUDA_PATH, nvcc on PATH, /usr/local/cuda*, nvidia's pip packages"
    if forced:
        raise BuildError(f"OTFACE_CUDA=1, but no CUDA toolkit was found ({where}); {how_to_get_a_toolkit(torch_cuda)}.")
    return Decision(None, f"no CUDA toolkit found ({where})", how_to_get_a_toolkit(torch_cuda))


def how_to_get_a_toolkit(torch_cuda: str) -> str:
    """For a torch of that CUDA. nvidia's pip packages are a toolkit, in one folder, from CUDA 13 on."""
    if int(torch_cuda.split(".")[0]) < 13:
        return f"install NVIDIA's CUDA toolkit {torch_cuda} and set CUDA_HOME to its folder"
    return f'run pip install "cuda-toolkit[nvcc,cccl]=={torch_cuda}.*"'


def find_toolkits(env: Mapping[str, str], site_packages: str, installed: str = "/usr/local/cuda*") -> Iterator[Toolkit]:
    """The usable CUDA toolkits of this machine, the preferred first. One named by the user is the only one."""
    named = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    if named:
        toolkit = as_toolkit(Path(named))
        if toolkit is None:
            raise BuildError(f"CUDA_HOME is {named}, which does not hold bin/nvcc and include/cuda_runtime.h.")
        yield toolkit
        return
    roots = [*roots_of_nvcc(shutil.which("nvcc", path=env.get("PATH")))]
    roots += sorted(map(Path, glob.glob(installed)), reverse=True)  # the newest first
    roots += sorted(Path(site_packages).glob("nvidia/cu*"), reverse=True)
    for root in dict.fromkeys(roots):
        toolkit = as_toolkit(root)
        if toolkit:
            yield toolkit


def roots_of_nvcc(nvcc: str | None) -> list[Path]:
    """Where the toolkit of this nvcc may be. It is often a script that starts the real one, so nvcc is asked first."""
    if nvcc is None:
        return []
    said = run([nvcc, "--dryrun", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    roots = [Path(top.group(1).strip())] if top else []
    roots += [Path(nvcc).resolve().parent.parent, Path(nvcc).parent.parent]
    return [root.resolve() for root in roots]


def as_toolkit(root: Path) -> Toolkit | None:
    """The toolkit in that folder, or None where one of its two halves, or its version, is missing."""
    nvcc = root / "bin" / "nvcc"
    if not (nvcc.is_file() and (root / "include" / "cuda_runtime.h").is_file()):
        return None
    release = re.search(r"release (\d+\.\d+)", run([str(nvcc), "--version"]))
    return Toolkit(root, release.group(1)) if release else None


def cudart_library(root: Path) -> str:
    """What the linker calls the CUDA runtime. nvidia's pip packages lack the plain name that -lcudart looks for."""
    folders = [root / "lib64", root / "lib"]
    if any((folder / "libcudart.so").exists() for folder in folders):
        return "cudart"
    numbered = [path.name for folder in folders for path in folder.glob("libcudart.so.*")]
    return f":{numbered[0]}" if numbered else "cudart"


def build_folder(torch_version: str) -> str:
    """Where objects are kept: one lasting folder per Python and torch, so that ninja compiles what changed."""
    return f"build/{sys.implementation.cache_tag}-torch{torch_version}"


def check_torch(version: str) -> None:
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise BuildError(f"torch {version} is too old; it needs torch {'.'.join(map(str, OLDEST_TORCH))} or later.")


def check_setuptools(version: str) -> None:
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise BuildError(
            f'setuptools {version} is too old; run: pip install "setuptools>={OLDEST_SETUPTOOLS}" (or leave '
            "--no-build-isolation out, and pip brings one, and another torch)."
        )


def check_writable(folder: Path) -> None:
    """setuptools and pip write beside the sources, wherever the result goes. Whether they can, only a file tells."""
    for place in (folder, folder / "build", folder / "otface_cuda.egg-info"):
        try:
            if place.exists():
                tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise BuildError(
                f"{place} cannot be written to ({error.strerror}), and the build writes there; copy the source folder "
                "to where you can, and build it there."
            ) from None


def check_compiler(compiler: str) -> None:
    """`compiler` is the command line torch compiles with: $CXX, else c++."""
    command = shlex.split(compiler)
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"the C++ compiler '{compiler}' was not found; install g++ 11 or later, or set CXX to yours.")
    macros = run([*command, "-std=c++20", "-dM", "-E", "-x", "c++", os.devnull])
    standard = re.search(r"__cplusplus (\d+)", macros)
    if standard is None or int(standard.group(1)) < 202002:
        raise BuildError(f"the compiler '{compiler}' does not know C++20; install g++ 11 or later, or set CXX to one.")


def check_ninja(env: Mapping[str, str]) -> None:
    if shutil.which("ninja", path=env.get("PATH")) is None:
        raise BuildError("ninja was not found; run: pip install ninja")


def check_python_headers(include: str) -> None:
    if not Path(include, "Python.h").is_file():
        raise BuildError(f"{include} holds no Python.h; install Python's development files (Debian: python3-dev).")


def run(command: list[str]) -> str:
    """What the command prints, on both channels; nothing if it cannot be started."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return done.stdout
