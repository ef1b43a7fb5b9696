"""`otface_cuda.info()`, and what an import says when the compiled library cannot be used."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import otface_cuda
from otface_cuda import _build
from otface_cuda.info import Info

pytestmark = pytest.mark.either_torch


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


def test_version_is_that_of_the_installed_distribution():
    assert version("otface_cuda") == otface_cuda.__version__


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


def test_python_m_says_how_to_get_cuda_kernels():
    said = python("-m", "otface_cuda").stdout
    assert (_build.how_to_get_cuda_kernels() in said) == (
        torch.version.cuda is not None and not otface_cuda.info().cuda
    )


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        (None, "install a torch with CUDA, then run `pip install --no-build-isolation"),
        ("12.8", "install NVIDIA's CUDA toolkit 12.8 and set CUDA_HOME to its folder, then run `pip install --no-"),
        ("13.0", 'run `pip install "cuda-toolkit[nvcc,cccl]==13.0.*"`, unless there is a CUDA toolkit, then run `pip'),
        ("13.2", 'run `pip install "cuda-toolkit[nvcc,cccl]==13.2.*"`, unless'),
    ],
)
def test_how_to_get_cuda_kernels(monkeypatch, cuda, said):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert _build.how_to_get_cuda_kernels().startswith(said)


# Python started in the source folder, where nothing is compiled

PACKAGE = Path(otface_cuda.__file__).parent


@pytest.fixture
def source(tmp_path):
    """A source folder without a compiled library."""
    shutil.copytree(PACKAGE, tmp_path / "source" / "otface_cuda", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path / "source"


@pytest.fixture
def site(tmp_path):
    """A folder of packages that has otface_cuda, as pip leaves it."""
    package = tmp_path / "site" / "otface_cuda"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(sys.modules["otface_cuda._C"].__file__, package)
    metadata = tmp_path / "site" / "otface_cuda-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: otface_cuda\nVersion: 0.1.0\n")
    return tmp_path / "site"


def python_in(source: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python started in `source`, for which `site` comes before everything else; without -S, what was installed with -e
    would be seen too.
    """
    path = os.pathsep.join([str(site), *sys.path])
    command, env = [sys.executable, "-S", *arguments], {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)


def egg_info(source: Path, site: Path) -> str:
    """What pip leaves in the source folder describes the package there, which has no library."""
    (source / "otface_cuda.egg-info").mkdir()
    (source / "otface_cuda.egg-info" / "PKG-INFO").write_text("Name: otface_cuda\nVersion: 0.0.9\n")
    return ""


NOT_LISTED = "import importlib.metadata as m; m.distributions = lambda **options: []\n"


def installed_with_e(source: Path, site: Path) -> str:
    """No distribution that lists the package, but an importer that knows where it is, as setuptools makes it."""
    library = str(site / "otface_cuda" / "_C.abi3.so")
    return NOT_LISTED + (
        "import importlib.util as u, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        return u.spec_from_file_location(name, {library!r}) if name == 'otface_cuda._C' else None\n"
        "sys.meta_path.append(Finder)\n"
    )


@pytest.mark.parametrize("way", [None, egg_info, installed_with_e], ids=lambda way: way and way.__name__)
def test_the_source_folder_takes_the_library_of_what_is_installed(source, site, way):
    before = way(source, site) if way else ""
    program = (
        before + "import sys, otface_cuda, torch; print(otface_cuda.sinkhorn(torch.ones(2, 2), 1.0).value.item())\n"
        "print(otface_cuda.__file__, sys.modules['otface_cuda._C'].__file__, otface_cuda.info().version, sep='\\n')"
    )
    done = python_in(source, site, "-c", program)
    assert done.stdout.splitlines() == [
        "1.0",
        str(source / "otface_cuda" / "__init__.py"),
        str(site / "otface_cuda" / "_C.abi3.so"),
        otface_cuda.__version__,
    ], done.stderr


def test_python_m_in_the_source_folder(source, site):
    assert python_in(source, site, "-m", "otface_cuda").stdout.startswith(f"otface_cuda {otface_cuda.__version__}\n")


@pytest.mark.parametrize(
    ("change", "count", "name"),
    [
        (lambda source: (source / "otface_cuda" / "_checks.py").open("a").write("# newer"), 1, "_checks.py"),
        (lambda source: (source / "otface_cuda" / "compat" / "newer.py").touch(), 1, "compat/newer.py"),
        (lambda source: (source / "otface_cuda" / "functional.py").unlink(), 1, "functional.py"),
    ],
    ids=["changed", "added", "removed"],
)
def test_other_python_files_than_those_installed(source, site, change, count, name):
    change(source)
    done = python_in(source, site, "-c", "import otface_cuda")
    assert done.returncode == 1
    assert f"ImportError: otface_cuda is not compiled in {source}/otface_cuda, where Python found it, " in done.stderr
    differ = f"{count} Python files differ, such as {name}"
    assert f"does not fit what is installed in {site}/otface_cuda ({differ}): run `pip install" in done.stderr


def test_nothing_is_installed(source, tmp_path):
    done = python_in(source, tmp_path, "-c", NOT_LISTED + "import otface_cuda")
    assert f"ImportError: otface_cuda is not compiled in {source}/otface_cuda" in done.stderr
    assert "and not installed elsewhere: run `pip install --no-build-isolation .`" in done.stderr


# What the loader of shared libraries says


def shared_library(path: Path, source: str, *options: str) -> Path:
    path.with_suffix(".c").write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", path, path.with_suffix(".c"), *options], check=True)
    return path


def error_of_loading(library: Path) -> str:
    done = python("-c", f"import ctypes; ctypes.CDLL({str(library)!r}, mode=ctypes.RTLD_GLOBAL | 2)")
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


USE = 'extern "C" void other(); extern "C" void use() { other(); }'
OTHER = 'extern "C" void other() {}'


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("libfoo.so.7", r"it needs libfoo\.so\.7, which was not found on this machine; install that, or run `pip"),
        (
            "libtorch_cuda.so",
            r"it was compiled for a torch that does not .*, which does not bring libtorch_cuda\.so; run",
        ),
        (
            "libcudart.so.12",
            r"it was compiled for a torch that does not .*, which does not bring libcudart\.so\.12; run",
        ),
    ],
)
def test_a_library_is_missing(tmp_path, name, said):
    other = shared_library(tmp_path / name, OTHER, f"-Wl,-soname,{name}")
    library = shared_library(tmp_path / "_C.so", USE, str(other))
    other.unlink()
    assert re.match(said, _build.why_it_does_not_load(error_of_loading(library)))


def test_a_newer_system_is_needed(tmp_path):
    def other(version: str) -> Path:
        (tmp_path / "versions").write_text(f"{version} {{ other; }};")
        return shared_library(tmp_path / "libc7.so", OTHER, f"-Wl,--version-script={tmp_path / 'versions'}")

    library = shared_library(tmp_path / "_C.so", USE, str(other("GLIBC_7.34")))
    other("GLIBC_7.28")
    said = _build.why_it_does_not_load(error_of_loading(library))
    assert said.startswith("it was compiled on a newer system than this one, which lacks GLIBC_7.34; run `pip install")


def test_a_symbol_is_missing(tmp_path):
    said = _build.why_it_does_not_load(error_of_loading(shared_library(tmp_path / "_C.so", USE)))
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    torch_is = (
        f"it was compiled for a torch that does not fit the installed one ({torch.__version__}, {cuda}); run `pip"
    )
    assert said.startswith(torch_is)


def test_any_other_failure():
    assert _build.why_it_does_not_load("out of luck").startswith("its compiled library does not load; run `pip install")


def test_the_error_of_the_loader_is_in_the_message(monkeypatch):
    def fail(name):
        raise ImportError("libfoo.so.7: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(_build, "import_module", fail)
    with pytest.raises(
        ImportError, match=r"^otface_cuda: it needs libfoo\.so\.7, .* source folder\. \(libfoo\.so\.7: "
    ):
        _build.load()
