"""The compiled library: find it, load it, or say in one sentence why that fails, and ask it how it was built."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch

LIBRARY = "_C.abi3.so"
BUILD_AGAIN = "run `pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"


def load() -> None:
    """Load `otface_cuda._C`, which registers torch.ops.otface.*; the ImportError of a failure says what to do."""
    find_library(Path(__file__).parent)
    try:
        import_module("otface_cuda._C")
    except ImportError as error:
        raise ImportError(f"otface_cuda: {why_it_does_not_load(str(error))}. ({error})") from error
    cpu_isa_error = build_info()["cpu_isa_error"]
    if cpu_isa_error:
        raise ImportError(f"otface_cuda: {cpu_isa_error}")


def find_library(folder: Path) -> None:
    """See to it that `import otface_cuda._C` finds the library, also where it is not in the folder of these files.

    A Python that is started in the source folder takes the package from there, where nothing is compiled unless it was
    installed with -e. The library of the installed package fits if its Python files are the same as these.
    """
    if (folder / LIBRARY).is_file():
        return
    here = f"otface_cuda is not compiled in {folder}, where Python found it"
    installed = installed_package()
    if installed is None:
        raise ImportError(
            f"{here}, and not installed elsewhere: run `pip install --no-build-isolation .` in its source folder."
        )
    differing = sorted({name for name, _ in python_files(folder) ^ python_files(installed)})
    if differing:
        raise ImportError(
            f"{here}, and does not fit what is installed in {installed} ({len(differing)} Python files differ, such as "
            f"{differing[0]}): run `pip install --no-build-isolation .` in its source folder, or leave that folder."
        )
    sys.modules["otface_cuda"].__path__.append(str(installed))


def installed_package() -> Path | None:
    """The folder of another otface_cuda that has its library: one that pip copied, or that it knows by -e."""
    folders = [Path(str(found.locate_file("otface_cuda"))) for found in distributions(name="otface_cuda")]
    by_e = find_spec("otface_cuda._C")
    if by_e and by_e.origin:
        folders.append(Path(by_e.origin).parent)
    return next((folder for folder in folders if (folder / LIBRARY).is_file()), None)


def python_files(folder: Path) -> set[tuple[str, bytes]]:
    return {(str(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*.py")}


def why_it_does_not_load(error: str) -> str:
    """What the loader of shared libraries says, and what to do about it."""
    other_torch = (
        f"it was compiled for a torch that does not fit the installed one ({torch.__version__}, {torch_cuda()})"
    )
    version = re.search(r"version `(.+?)' not found", error)
    if version:
        return f"it was compiled on a newer system than this one, which lacks {version[1]}; {BUILD_AGAIN}"
    library = re.search(r"(lib\S+): cannot open shared object file", error)
    if library and library[1].startswith(("libtorch", "libc10", "libcudart")):
        return f"{other_torch}, which does not bring {library[1]}; {BUILD_AGAIN}"
    if library:
        return f"it needs {library[1]}, which was not found on this machine; install that, or {BUILD_AGAIN}"
    if "undefined symbol" in error:
        return f"{other_torch}; {BUILD_AGAIN}"
    return f"its compiled library does not load; {BUILD_AGAIN}"


def torch_cuda() -> str:
    """Of which CUDA the installed torch is, in words."""
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def how_to_get_cuda_kernels() -> str:
    """What to do for CUDA tensors where the CUDA kernels were not compiled."""
    if torch.version.cuda is None:
        first = "install a torch with CUDA"
    elif int(torch.version.cuda.split(".")[0]) < 13:  # nvidia's packages of those are no toolkit that nvcc could use
        first = f"install NVIDIA's CUDA toolkit {torch.version.cuda} and set CUDA_HOME to its folder"
    else:
        first = f'run `pip install "cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"`, unless there is a CUDA toolkit'
    return f"{first}, then {BUILD_AGAIN}"


def build_info() -> dict[str, str]:
    """What csrc/torch/build_info.cpp tells: one `key=value` per line."""
    text: str = torch.ops.otface.build_info()
    return dict(line.split("=", 1) for line in text.splitlines())
