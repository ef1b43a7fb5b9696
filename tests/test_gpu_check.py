"""tools/gpu_check.sh on a machine of stand-ins: what it starts, what it says, and how it ends."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["build", "tests", "memcheck", "racecheck", "synccheck", "initcheck", "bench"]

# Each stand-in writes down how it was called. python3 fails where its arguments hold what FAIL says, and lacks the
# modules in LACK; compute-sanitizer runs what it is given.
PYTHON = """\
echo "python3 $*" >> calls
for module in $LACK; do case "$*" in *"import $module"*) exit 1;; esac; done
if [ -n "$FAIL" ]; then case "$*" in *"$FAIL"*) echo "this went wrong"; exit 3;; esac; fi
if [ -n "$HANG" ]; then case "$*" in *"$HANG"*) sleep 60;; esac; fi
"""
SANITIZER = """\
echo "compute-sanitizer $* caching=$PYTORCH_NO_CUDA_MEMORY_CACHING" >> calls
while [ "$1" != python3 ] && [ "$(basename "$1")" != python3 ]; do shift; done
"$@"
"""


class Machine:
    """A copy of the script in a folder of its own, and a PATH on which only stand-ins and the system's tools are."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder / "project", folder / "bin"
        for name in ("tools", "benchmarks/results"):
            (self.folder / name).mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / "tools" / "gpu_check.sh", self.folder / "tools")
        for name in ("bench_one.py", "bench_two.py", "measure.py"):
            (self.folder / "benchmarks" / name).touch()
        self.has("nvidia-smi", "echo 'NVIDIA H200'")
        self.has("python3", PYTHON)
        self.has("compute-sanitizer", SANITIZER)

    def has(self, name: str, does: str, folder: Path | None = None) -> None:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)

    def run(self, *parts: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}:/usr/bin:/bin"
        given = {
            "PATH": path,
            "OTFACE_NO_INSTALL": "1",
            "CUDA_HOME": "/none",
            "LACK": "",
            "FAIL": "",
            "HANG": "",
            **env,
        }
        return subprocess.run(
            ["bash", str(self.folder / "tools" / "gpu_check.sh"), *parts],
            cwd=self.folder.parent,  # not where the script expects to be
            env=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    @property
    def calls(self) -> str:
        return (self.folder / "calls").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def summary(done: subprocess.CompletedProcess[str]) -> list[str]:
    return done.stdout.partition("=== NVIDIA H200\n")[2].splitlines()


def test_everything_passes(machine):
    done = machine.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in summary(done)] == [["passed", part] for part in PARTS]
    calls = machine.calls
    assert "python3 setup.py build_ext --inplace egg_info" in calls
    assert "python3 tools/kernel_resources.py --registers-only RegisterMatrix<" in calls
    assert "python3 -m pytest -q -rs\n" in calls
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"compute-sanitizer --tool {tool} --kernel-name kernel_substring=otface" in calls
    assert "compute-sanitizer --tool initcheck --report-api-errors no --error-exitcode 99" in calls
    assert calls.count("-m pytest -q -m sanitize tests caching=1\n") == 4
    for name in ("one", "two"):
        assert f"benchmarks/bench_{name}.py --device cuda --json benchmarks/results/{name}_h200.json\n" in calls
    assert "measure.py" not in calls
    assert "_faces" not in calls
    assert {path.stem for path in (machine.folder / "build" / "gpu_check").glob("*.log")} == set(PARTS)


def test_a_failure_does_not_stop_the_others(machine):
    done = machine.run(FAIL="-m pytest -q -rs")
    assert done.returncode == 1
    lines = summary(done)
    assert lines[1].startswith("FAILED   tests (")
    assert lines[1].endswith("status 3, see build/gpu_check/tests.log")
    assert [line.split()[0] for line in lines] == ["passed", "FAILED", *["passed"] * 5]
    assert "this went wrong" in (machine.folder / "build/gpu_check/tests.log").read_text()


@pytest.mark.parametrize(
    ("fail", "failed"),
    [
        ("setup.py", ["build"]),
        ("kernel_resources", ["build"]),
        ("sinkhorn(cost.cuda()", ["build"]),
        ("margin_softmax_loss", ["build"]),
        ("-m sanitize", ["memcheck", "racecheck", "synccheck", "initcheck"]),
        ("bench_one.py", ["bench"]),
    ],
)
def test_each_part_can_fail(machine, fail, failed):
    done = machine.run(FAIL=fail)
    assert done.returncode == 1
    assert [line.split()[1] for line in summary(done) if line.startswith("FAILED")] == failed


def test_both_benchmarks_run_when_the_first_fails(machine):
    machine.run("bench", FAIL="bench_one.py")
    assert "bench_two.py" in machine.calls


def test_what_is_missing_is_said_and_is_no_failure(machine):
    (machine.bin / "compute-sanitizer").unlink()
    done = machine.run("memcheck", "bench")
    assert done.returncode == 0
    if not list(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")):
        said = "NOT RUN  memcheck: compute-sanitizer was not found; it is part of the CUDA toolkit"
        assert summary(done)[0] == said
    assert summary(done)[1].startswith("passed   bench")


@pytest.mark.parametrize("module", ["pytest", "hypothesis"])
def test_without_pytest_only_its_parts_are_left_out(machine, module):
    done = machine.run(LACK=module)
    assert done.returncode == 0
    lines = summary(done)
    assert [line.split()[0] for line in lines] == ["passed", *["NOT"] * 5, "passed"]
    assert lines[1] == f"NOT RUN  tests: {module} is not installed"


def test_without_pot_only_its_comparison_is_left_out(machine):
    done = machine.run("tests", LACK="ot.batch")
    assert done.returncode == 0
    assert "POT is not installed" in done.stdout
    assert "python3 -m pytest -q -rs --ignore=tests/test_against_pot.py\n" in machine.calls


def test_a_part_that_hangs_is_stopped(machine):
    done = machine.run("tests", "bench", HANG="-m pytest", OTFACE_PART_SECONDS="1")
    assert done.returncode == 1
    assert summary(done)[0].startswith("FAILED   tests: stopped after ")
    assert summary(done)[1].startswith("passed   bench")


def test_faces_are_a_second_run(machine):
    machine.run("bench", OTFACE_FACES="faces.tar")
    calls = machine.calls
    assert (
        "bench_sinkhorn.py --device cuda --faces faces.tar --json benchmarks/results/sinkhorn_h200_faces.json" in calls
    )
    assert calls.count("--faces") == 1  # no other benchmark takes faces


def test_a_sanitizer_of_the_toolkit_is_found(machine, tmp_path):
    (machine.bin / "compute-sanitizer").rename(machine.bin / "other")
    machine.has("compute-sanitizer", SANITIZER, tmp_path / "cuda" / "bin")
    done = machine.run("racecheck", CUDA_HOME=str(tmp_path / "cuda"))
    assert summary(done)[0].startswith("passed   racecheck")
    assert "--tool racecheck" in machine.calls


def test_with_a_network_make_prepares_the_environment(machine):
    venv = machine.folder / ".venv" / "bin"
    machine.has("make", f"echo make $* >> calls; mkdir -p {venv}; cp {machine.bin}/python3 {venv}/python")
    done = machine.run("build", "bench", OTFACE_NO_INSTALL="")
    assert done.returncode == 0, done.stdout
    assert "make .venv/test .venv/bench\n" in machine.calls
    assert "setup.py" not in machine.calls


def test_parts_that_need_an_environment_that_is_not_there(machine):
    done = machine.run("tests", OTFACE_NO_INSTALL="")
    assert done.returncode == 0
    assert summary(done) == ["NOT RUN  tests: there is no .venv yet; run the part build"]


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA GeForce RTX 4090", "geforce_rtx_4090"), ("Tesla V100-SXM2 (16 GB)", "tesla_v100_sxm2_16_gb")],
)
def test_results_are_named_after_the_gpu(machine, gpu, name):
    machine.has("nvidia-smi", f"echo '{gpu}'; echo 'NVIDIA H100'")
    machine.run("bench")
    assert f"benchmarks/results/one_{name}.json" in machine.calls


@pytest.mark.parametrize(
    ("nvidia_smi", "env", "parts", "sentence"),
    [
        ("exit 9", {}, [], "gpu_check: nvidia-smi finds no NVIDIA GPU"),
        ("true", {}, [], "gpu_check: nvidia-smi finds no NVIDIA GPU"),
        ("echo X", {"LACK": "torch"}, [], "python3 has no torch"),
        ("echo X", {"FAIL": "is_available"}, [], "sees no GPU"),
        ("echo X", {}, ["speed"], "gpu_check: no part is called 'speed'; there are: build tests memcheck"),
    ],
)
def test_what_cannot_start_is_one_sentence(machine, nvidia_smi, env, parts, sentence):
    machine.has("nvidia-smi", nvidia_smi)
    done = machine.run(*parts, **env)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_list(machine):
    assert machine.run("--list").stdout.split() == PARTS


def test_shellcheck_has_nothing_to_say():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [ROOT / "tools" / "gpu_check.sh", ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
