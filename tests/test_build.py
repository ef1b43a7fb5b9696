"""The decisions and the error sentences of the build, asked about machines made of temporary folders."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toolchain
from toolchain import BuildError, Toolkit

ROOT = Path(__file__).resolve().parent.parent


def executable(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def toolkit_in(root: Path, version: str = "13.0") -> Toolkit:
    """A folder that looks like a CUDA toolkit."""
    executable(root / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.88'")
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    return Toolkit(root, version)


def find(env: dict[str, str], site: Path, installed: str = "") -> list[Toolkit]:
    return list(toolchain.find_toolkits({"PATH": "", **env}, str(site), installed))


# Whether CUDA is built

GPU_TORCH = ("2.13.0+cu130", "13.0")
CPU_TORCH = ("2.13.0+cpu", None)
TOOLKIT_13 = Toolkit(Path("/opt/cuda"), "13.2")
TOOLKIT_12 = Toolkit(Path("/opt/cuda-12.8"), "12.8")


@pytest.mark.parametrize(
    ("forced", "torch", "toolkits", "toolkit", "text"),
    [
        ("", GPU_TORCH, [TOOLKIT_13], TOOLKIT_13, "CUDA and CPU: torch 2.13.0+cu130, CUDA 13.2 toolkit in /opt/cuda"),
        ("", GPU_TORCH, [TOOLKIT_12, TOOLKIT_13], TOOLKIT_13, "CUDA 13.2 toolkit in /opt/cuda"),
        ("1", GPU_TORCH, [TOOLKIT_13], TOOLKIT_13, "CUDA and CPU: OTFACE_CUDA=1, torch 2.13.0+cu130"),
        ("0", GPU_TORCH, [TOOLKIT_13], None, "CPU only: OTFACE_CUDA=0"),
        ("", GPU_TORCH, [], None, "CPU only: no CUDA toolkit found (searched CUDA_HOME"),
        ("", CPU_TORCH, [TOOLKIT_13], None, "CPU only: torch 2.13.0+cpu has no CUDA"),
        ("0", CPU_TORCH, [], None, "CPU only: OTFACE_CUDA=0"),
    ],
)
def test_decision(forced, torch, toolkits, toolkit, text):
    decision = toolchain.decide(forced, *torch, iter(toolkits))
    assert decision.toolkit == toolkit
    assert text in str(decision)


@pytest.mark.parametrize(
    ("forced", "torch", "toolkits", "sentence"),
    [
        ("yes", GPU_TORCH, [TOOLKIT_13], "OTFACE_CUDA must be 0 or 1, got 'yes'"),
        ("1", CPU_TORCH, [TOOLKIT_13], "OTFACE_CUDA=1, but torch 2.13.0+cpu has no CUDA"),
        ("1", GPU_TORCH, [], "OTFACE_CUDA=1, but no CUDA toolkit was found"),
        ("", GPU_TORCH, [TOOLKIT_12], "is for CUDA 13.0, but the toolkit in /opt/cuda-12.8 is CUDA 12.8"),
    ],
)
def test_impossible_decision(forced, torch, toolkits, sentence):
    with pytest.raises(BuildError, match=re.escape(sentence)):
        toolchain.decide(forced, *torch, iter(toolkits))


def test_a_torch_without_cuda_never_looks_for_a_toolkit():
    def toolkits():
        raise AssertionError("looked for one")
        yield

    assert toolchain.decide("", *CPU_TORCH, toolkits()).toolkit is None


# Where the toolkit is


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_named_toolkit_is_the_only_one(tmp_path, variable):
    named = toolkit_in(tmp_path / "named")
    toolkit_in(tmp_path / "cuda-13.0")
    assert find({variable: str(named.root)}, tmp_path, str(tmp_path / "cuda*")) == [named]


def test_a_wrongly_named_toolkit_is_an_error(tmp_path):
    with pytest.raises(BuildError, match="does not hold bin/nvcc and include/cuda_runtime"):
        find({"CUDA_HOME": str(tmp_path)}, tmp_path)


def test_nvcc_on_path_may_be_a_script(tmp_path):
    real = toolkit_in(tmp_path / "real")
    script = executable(tmp_path / "bin" / "nvcc", f"echo '#$ TOP={real.root}/bin/..'")
    assert find({"PATH": str(script.parent)}, tmp_path) == [real]


def test_nvcc_on_path_may_be_a_link(tmp_path):
    real = toolkit_in(tmp_path / "real")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(real.root / "bin" / "nvcc")
    assert find({"PATH": str(tmp_path / "bin")}, tmp_path) == [real]


def test_order_of_the_search(tmp_path):
    pip = toolkit_in(tmp_path / "site" / "nvidia" / "cu13", "13.1")
    old = toolkit_in(tmp_path / "cuda-12.8", "12.8")
    new = toolkit_in(tmp_path / "cuda-13.0")
    on_path = toolkit_in(tmp_path / "opt", "13.2")
    env = {"PATH": str(on_path.root / "bin")}
    assert find(env, tmp_path / "site", str(tmp_path / "cuda*")) == [on_path, new, old, pip]


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h"])
def test_half_a_toolkit_is_none(tmp_path, missing):
    root = toolkit_in(tmp_path / "cuda").root
    (root / missing).unlink()
    assert toolchain.as_toolkit(root) is None


@pytest.mark.parametrize(
    ("files", "library"),
    [
        (["lib64/libcudart.so", "lib64/libcudart.so.13"], "cudart"),
        (["lib/libcudart.so.13"], ":libcudart.so.13"),
        ([], "cudart"),
    ],
)
def test_name_of_the_cuda_runtime(tmp_path, files, library):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert toolchain.cudart_library(tmp_path) == library


# What else the build needs


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.0a0+git1234", "3.0.0"])
def test_new_enough_torch(version):
    toolchain.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.1"])
def test_old_torch(version):
    with pytest.raises(BuildError, match=re.escape(f"torch {version} is too old; it needs torch 2.11 or later")):
        toolchain.check_torch(version)


def test_compiler(tmp_path):
    new = executable(tmp_path / "new", "echo '#define __cplusplus 202002L'")
    toolchain.check_compiler(f"{new} -m64")
    old = executable(tmp_path / "old", "echo '#define __cplusplus 201709L'")  # what g++ 10 says
    with pytest.raises(BuildError, match=r"does not know C\+\+20; install g\+\+ 11 or later"):
        toolchain.check_compiler(str(old))
    with pytest.raises(BuildError, match=r"C\+\+ compiler 'no-such-compiler' was not found; install g\+\+"):
        toolchain.check_compiler("no-such-compiler")


def test_ninja(tmp_path):
    with pytest.raises(BuildError, match="ninja was not found; run: pip install ninja"):
        toolchain.check_ninja({"PATH": str(tmp_path)})
    executable(tmp_path / "ninja")
    toolchain.check_ninja({"PATH": str(tmp_path)})


def test_python_headers(tmp_path):
    with pytest.raises(BuildError, match=r"holds no Python\.h"):
        toolchain.check_python_headers(str(tmp_path))
    (tmp_path / "Python.h").touch()
    toolchain.check_python_headers(str(tmp_path))


@pytest.mark.parametrize(
    ("before", "env", "sentence"),
    [
        ("", {"CXX": "no-such-compiler"}, "otface_cuda: the C++ compiler 'no-such-compiler' was not found"),
        ("sys.modules['torch'] = None", {}, "otface_cuda: it is compiled against your torch: install torch first"),
    ],
)
def test_setup_ends_with_one_sentence(before, env, sentence):
    program = f"import runpy, sys; {before or 'pass'}; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(sentence)  # a torch with CUDA may warn before it
    assert "Traceback" not in done.stderr


# The list of sources


def test_every_source_file_is_listed_once():
    csrc = ROOT / "csrc"
    groups = json.loads((csrc / "sources.json").read_text())
    listed = sorted(file for files in groups.values() for file in files)
    present = sorted(str(path.relative_to(csrc)) for path in csrc.rglob("*") if path.suffix in (".cpp", ".cu"))
    assert listed == present


def test_kernels_do_not_include_torch():
    including = re.compile(r'#include *[<"](torch|ATen|c10)/')
    for path in (ROOT / "csrc").rglob("*.*"):
        if "torch" not in path.relative_to(ROOT / "csrc").parts:
            assert not including.search(path.read_text()), path
