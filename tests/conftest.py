"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is loaded: threads that wait for one another at the end of a small operation shall sleep, not spin. With
# other work on the machine the suite is ten times slower otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before POT is loaded, which would start every other library that is installed: JAX then takes most of a GPU's memory.
os.environ.setdefault("POT_BACKEND_DISABLE_JAX", "1")
os.environ.setdefault("POT_BACKEND_DISABLE_CUPY", "1")
os.environ.setdefault("POT_BACKEND_DISABLE_TENSORFLOW", "1")

import pytest
import torch
from hypothesis import settings

import otface_cuda

from .problems import CPU_IS_EXECUTOR

# The same examples in every run: a failure can be repeated, and the time is bounded.
settings.register_profile("otface", derandomize=True, database=None, deadline=None, max_examples=20)
settings.load_profile("otface")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "instruction_set: run again for every CPU instruction set")


if CPU_IS_EXECUTOR:
    from . import executor_operators

    _REPLACED = executor_operators.replace_those_of_the_cpu(tier=os.environ["OTFACE_TEST_EXECUTOR"])

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        for what, count in sorted(executor_operators.runs.items()):
            terminalreporter.write_line(f"on the host executor: {what}: {count} times")


def _has_cuda_kernels() -> bool:
    return torch.cuda.is_available() and bool(otface_cuda.info().cuda_architectures)


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not _has_cuda_kernels():
        leave_out = pytest.fail if os.environ.get("OTFACE_NEED_GPU") == "1" else pytest.skip
        leave_out("needs a GPU and a build with CUDA kernels")
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads of torch's pool, and restores it after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Each test compiles on its own, not as a recompilation of the last one."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
