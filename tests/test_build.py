"""The decisions and the error sentences of the build, asked about machines made of temporary folders."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import kernel_resources
import nvcc_report
import pytest
import toolchain
import torch
import wheel_contents
from toolchain import BuildError, Toolkit

import otface_cuda
from otface_cuda import _build

pytestmark = pytest.mark.either_torch

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


@pytest.mark.parametrize(
    ("cuda", "advice"),
    [
        ("13.0", 'run pip install "cuda-toolkit[nvcc,cccl]==13.0.*"'),
        ("14.2", 'run pip install "cuda-toolkit[nvcc,cccl]==14.2.*"'),
        ("12.8", "install NVIDIA's CUDA toolkit 12.8 and set CUDA_HOME to its folder"),
    ],
)
def test_how_to_get_a_toolkit(monkeypatch, cuda, advice):
    """At the end of the build, in what stops it, and later at the first CUDA tensor."""
    assert toolchain.decide("", "2.14.0", cuda, iter([])).advice == advice
    for forced, toolkits in (("1", []), ("", [Toolkit(Path("/opt/cuda-11"), "11.0")])):
        with pytest.raises(BuildError, match=re.escape(advice)):
            toolchain.decide(forced, "2.14.0", cuda, iter(toolkits))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert _build.how_to_get_cuda_kernels().replace("`", "").startswith(advice)


@pytest.mark.parametrize(("forced", "installed"), [("", CPU_TORCH), ("0", GPU_TORCH), ("0", CPU_TORCH)])
def test_no_advice_where_the_cpu_alone_is_what_was_asked_for(forced, installed):
    assert toolchain.decide(forced, *installed, iter([])).advice == ""


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


def test_setuptools():
    toolchain.check_setuptools("77.0.1")
    toolchain.check_setuptools("103.1")
    with pytest.raises(BuildError, match=r'setuptools 76\.1\.0 is too old; run: pip install "setuptools>=77"'):
        toolchain.check_setuptools("76.1.0")
    requires = f'"setuptools>={toolchain.OLDEST_SETUPTOOLS}"'
    for name in ("pyproject.toml", "README.md"):
        assert requires in (ROOT / name).read_text()


def test_source_folder_that_cannot_be_written_to(tmp_path):
    """/proc cannot be, whoever asks; elsewhere permissions do not bind root."""
    toolchain.check_writable(tmp_path)
    with pytest.raises(
        BuildError, match=r"/proc cannot be written to \(.+\), and the build writes there; copy the source"
    ):
        toolchain.check_writable(Path("/proc"))
    (tmp_path / "build").symlink_to("/proc")  # as a build by another user leaves it
    with pytest.raises(BuildError, match="/build cannot be written to"):
        toolchain.check_writable(tmp_path)


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


# What is packed


def tracked() -> list[str]:
    """The files of the repository, as far as git is there to tell."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout:
        pytest.skip("not a checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> list[str]:
    """The names in an sdist that is made of a copy of the repository."""
    files, copy = tracked(), tmp_path_factory.mktemp("source")
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "tools" / "__pycache__").mkdir()
    (copy / "tools" / "__pycache__" / "toolchain.cpython-311.pyc").touch()
    program = ["setup.py", "--quiet", "sdist", "--dist-dir", "dist"]
    env = {**os.environ, "OTFACE_CUDA": "0"}
    subprocess.run([sys.executable, *program], cwd=copy, env=env, check=True, capture_output=True)
    (made,) = (copy / "dist").iterdir()
    assert made.name == f"otface_cuda-{otface_cuda.__version__}.tar.gz"
    with tarfile.open(made) as packed:
        return packed.getnames()


def test_the_sdist_is_complete(sdist):
    assert wheel_contents.missing_in_sdist(tracked(), sdist) == []
    assert not [name for name in sdist if "__pycache__" in name or "/.ci" in name]


def test_a_file_that_is_not_packed_is_noticed(sdist):
    without = [name for name in sdist if not name.endswith("csrc/common/simt.h")]
    assert wheel_contents.missing_in_sdist(tracked(), without) == ["csrc/common/simt.h"]


def test_contents_of_a_wheel():
    source = ["otface_cuda/__init__.py", "otface_cuda/py.typed", "tests/test_build.py"]
    wheel = [*source[:2], "otface_cuda/_C.abi3.so", "otface_cuda-0.1.0.dist-info/METADATA"]
    assert wheel_contents.wrong_in_wheel(source, wheel) == []
    wheel[1] = "tests/test_build.py"
    assert wheel_contents.wrong_in_wheel(source, wheel) == [
        "otface_cuda/py.typed is missing",
        "tests/test_build.py does not belong there",
    ]


# Printed by objdump -T.
SYMBOLS = """\
0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.2.5) memcmp
0000000000000000      DF *UND*	0000000000000000 (GLIBC_2.29) exp
0000000000000000      DO *UND*	0000000000000000 (GLIBC_2.32) __libc_single_threaded
0000000000000000      DF *UND*	0000000000000000 (GLIBCXX_3.4.21) _ZNSt13runtime_errorC1ERKNSt7__cxx1112basic_string
0000000000000000  w   DF *UND*	0000000000000000 (CXXABI_1.3.15) __cxa_call_terminate
"""


def test_a_wheel_that_needs_a_newer_system_than_torch():
    assert wheel_contents.too_new(SYMBOLS) == [
        "__cxa_call_terminate needs CXXABI_1.3.15, torch's wheels no more than 1.3.11",
        "exp needs GLIBC_2.29, torch's wheels no more than 2.28",
        "__libc_single_threaded needs GLIBC_2.32, torch's wheels no more than 2.28",
    ]
    assert wheel_contents.too_new(SYMBOLS.splitlines()[0]) == []
    assert wheel_contents.too_new("") == ["objdump lists no symbol of glibc, so nothing was checked"]


def test_the_package_list_is_complete():
    """Every folder with an __init__.py is a package of pyproject.toml, and so in a wheel."""
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("otface_cuda/**/__init__.py")}
    (line,) = re.findall(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(re.findall(r'"([\w.]+)"', line)) == folders


def test_the_version_is_the_same_everywhere():
    version = otface_cuda.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


# What ptxas says of the kernels

# Printed by CUDA 13.0: a kernel that spills, and one with a function that was not inlined.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6otface12register_fwdINS_6MatrixILi100EfEEEEvPKfPf' for 'sm_80'
ptxas info    : Function properties for _ZN6otface12register_fwdINS_6MatrixILi100EfEEEEvPKfPf
    672 bytes stack frame, 2556 bytes spill stores, 2852 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 672 bytes cumulative stack size, 368 bytes cmem[0]
ptxas info    : Compile time = 170.744 ms
ptxas info    : Compiling entry function '_ZN6otface10stream_fwdEPf' for 'sm_90'
ptxas info    : Function properties for _ZN6otface10stream_fwdEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compile time = 1.847 ms
ptxas info    : Function properties for _ZN6otface4slowIfEET_S2_
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
SPILLING, CLEAN = kernel_resources.parse(PTXAS)


def nvcc_that_says(folder: Path, status: int = 0) -> str:
    said = folder / "said"
    said.write_text(PTXAS + "x.cu(3): warning #177-D: variable was never referenced\n")
    return str(executable(folder / "nvcc", f"cat '{said}' >&2", f"echo \"$@\" >> '{folder}/asked'", f"exit {status}"))


def test_parse_the_report_of_ptxas():
    assert (SPILLING.architecture, SPILLING.registers, SPILLING.shared) == ("sm_80", 32, 0)
    assert (SPILLING.stack, SPILLING.spill_stores, SPILLING.spill_loads) == (672, 2556, 2852)
    assert kernel_resources.Kernel("_ZN6otface10stream_fwdEPf", "sm_90", 12, 0, 0, 0, 128) == CLEAN


def test_a_kernel_that_must_stay_in_registers():
    framed = dataclasses.replace(CLEAN, stack=16)
    assert kernel_resources.failures([SPILLING, CLEAN], "stream") == []
    assert kernel_resources.failures([SPILLING, CLEAN], "no_such") == [
        "no kernel's name matches 'no_such', so nothing was checked."
    ]
    (spills,) = kernel_resources.failures([SPILLING, CLEAN], "register_|stream_")
    assert spills.endswith("must stay in registers, but it spills registers (2556 bytes stored, 2852 bytes loaded).")
    (frame,) = kernel_resources.failures([framed], "stream_")
    assert frame.endswith("must stay in registers, but it has a stack frame of 16 bytes.")


def test_names_are_for_people(monkeypatch):
    assert (
        kernel_resources.short("void otface::(anonymous namespace)::fwd<otface::Matrix<7, (int)13>, float>(P, int)")
        == "fwd<Matrix<7, (int)13>, float>"
    )
    assert kernel_resources.short("void f<A<B<C<1>> > >(int)") == "f<A<B<C<1>>>>"
    lines = kernel_resources.table([SPILLING, CLEAN]).splitlines()
    assert lines[0].split() == ["arch", "registers", "spill", "stores", "spill", "loads", "stack", "shared", "kernel"]
    if shutil.which("c++filt"):
        assert lines[1].split()[:6] == ["sm_80", "32", "2556", "2852", "672", "0"]
        assert lines[1].endswith("  register_fwd<Matrix<100, float>>")
    monkeypatch.setenv("PATH", "")
    assert lines[1].index("32") == kernel_resources.table([SPILLING]).splitlines()[1].index("32")
    assert "_ZN6otface12register_fwd" in kernel_resources.table([SPILLING])


def test_nvcc_report_is_a_file_beside_the_object(tmp_path, capfd):
    (tmp_path / "csrc" / "common").mkdir(parents=True)
    made = tmp_path / "csrc" / "common" / "x.o"
    assert nvcc_report.main([nvcc_that_says(tmp_path), "-c", "x.cu", "-o", str(made)]) == 0
    assert capfd.readouterr().err == "x.cu(3): warning #177-D: variable was never referenced\n"
    assert (tmp_path / "asked").read_text() == f"-c x.cu -o {made} --resource-usage\n"
    assert kernel_resources.read(tmp_path, ["common/x.cu"]) == [SPILLING, CLEAN]
    with pytest.raises(SystemExit, match=r"holds no report on common/y\.cu; build with CUDA first"):
        kernel_resources.read(tmp_path, ["common/y.cu"])


def test_nvcc_that_fails_leaves_no_report(tmp_path):
    assert nvcc_report.main([nvcc_that_says(tmp_path, 2), "-c", "x.cu", "-o", str(tmp_path / "x.o")]) == 2
    assert not (tmp_path / "x.o.ptxas").exists()


def test_a_spill_ends_with_status_1_and_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "sources.json").write_text('{"kernels_cpu": ["a.cpp"], "kernels_cuda": ["b.cu"]}')
    (tmp_path / "csrc" / "b.o.ptxas").write_text(PTXAS)
    monkeypatch.setattr(kernel_resources, "ROOT", tmp_path)
    assert kernel_resources.main([str(tmp_path)]) == 0
    assert kernel_resources.main([str(tmp_path), "--registers-only", "stream_"]) == 0
    assert kernel_resources.main([str(tmp_path), "--registers-only", "register_"]) == 1
    said = capsys.readouterr()
    assert said.out.count("stream_fwd") == 3
    assert said.err.startswith("kernel_resources: ")
    assert said.err.count("\n") == 1
