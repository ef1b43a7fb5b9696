"""Compiles what runs on the host executor into build/simt/: again only what has changed, two at a time.

As a program: python -m tests.simt.build [module|address|thread]..., to see how long it takes and what g++ says.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")

# No contraction to fused multiply-adds: the same bits in every build.
COMMON = [
    "-std=c++20",
    "-g1",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-DOTFACE_SIMT_HOST",
]
VARIANTS = {
    "plain": ["-O2", "-fPIC", "-fvisibility=hidden"],
    # Without what takes long to compile and the address sanitizer sees anyway.
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
DAY = 24 * 3600
EXECUTOR = HERE / "host_executor.cpp"
EXECUTOR_THREAD = ["-O2", "-DSIMT_THREAD_SANITIZER"]  # itself not instrumented


class Build:
    """Objects, executables and the module, each in a file that is named after the content of all it is made from."""

    def __init__(self, csrc: Path = ROOT / "csrc", out: Path = ROOT / "build" / "simt") -> None:
        self.csrc = csrc
        self.out = out
        out.mkdir(parents=True, exist_ok=True)

    def executable(self, sources: list[Path], variant: str) -> Path:
        """An executable of the variant from these sources and the executor."""
        return self._link(sources[0].stem, [*sources, EXECUTOR], variant)

    def module(self) -> Path:
        """The Python module otface_simt, with all kernels."""
        return self._link("otface_simt", [HERE / "module.cpp", *self._kernels(), EXECUTOR], "plain", ["-shared"], ".so")

    def driver(self, variant: str) -> Path:
        """The executable that runs cases from a file, with all kernels."""
        return self._link("driver", [HERE / "driver.cpp", *self._kernels(), EXECUTOR], variant)

    def _kernels(self) -> list[Path]:
        listed = json.loads((self.csrc / "sources.json").read_text())["kernels_cuda"]
        kernels = [self.csrc / name for name in listed if not name.startswith("common/")]
        return [HERE / "case.cpp", HERE / "margin_case.cpp", HERE / "near_case.cpp", *kernels]

    def _link(self, name: str, sources: list[Path], variant: str, flags: Sequence[str] = (), suffix: str = "") -> Path:
        with (self.out / f"lock.{name}.{variant}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: self._compile(source, variant), sources))
            command = [COMPILER, *VARIANTS[variant], *flags, *map(str, objects)]
            return self._make(f"{name}.{variant}", " ".join(command), suffix, command)

    def _compile(self, source: Path, variant: str) -> Path:
        flags = VARIANTS[variant]
        if source == EXECUTOR and variant == "thread":
            flags = EXECUTOR_THREAD
        includes = [self.csrc, HERE]
        if source.name == "module.cpp":
            import pybind11

            includes += [Path(sysconfig.get_path("include")), Path(pybind11.get_include())]
        prefixes = [f"-ffile-prefix-map={root}/=" for root in (self.csrc.parent, ROOT)]
        command = [COMPILER, *COMMON, *flags, *prefixes, *(f"-I{path}" for path in includes)]
        content = "".join([_compiler_version(), *COMMON, *flags, *self._content(source, set())])
        if source.name == "module.cpp":
            content += sys.version + pybind11.__version__
        return self._make(f"{source.stem}.{variant}", content, ".o", [*command, "-x", "c++", "-c", str(source)])

    def _content(self, path: Path, seen: set[Path]) -> list[str]:
        """The text of a file and of every file of ours that it includes."""
        seen.add(path)
        text = path.read_text()
        result = [text]
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            for folder in (path.parent, self.csrc, HERE):
                if (folder / name).exists() and folder / name not in seen:
                    result += self._content(folder / name, seen)
        return result

    def _make(self, name: str, content: str, suffix: str, command: list[str]) -> Path:
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        path = self.out / f"{name}.{digest}{suffix}"
        if not path.exists():
            unfinished = path.with_name(f"unfinished.{os.getpid()}.{path.name}")
            result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:20000]}")
            if result.stderr:
                print(result.stderr, file=sys.stderr)
            unfinished.rename(path)
        path.touch()
        for other in self.out.glob(f"{name}.*"):
            if other.stat().st_mtime < time.time() - DAY:  # not used since
                other.unlink()
        return path


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def load_module() -> ModuleType:
    """The module otface_simt, compiled if need be."""
    spec = importlib.util.spec_from_file_location("otface_simt", Build().module())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["module", "address", "thread"]:
        start = time.perf_counter()
        made = Build().module() if wanted == "module" else Build().driver(wanted)
        print(f"{made} in {time.perf_counter() - start:.1f} s")
