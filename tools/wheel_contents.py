"""Checks what is in the sdist and in the wheel: `wheel_contents.py SOURCE DIST`.

The sdist has every file of SOURCE but what only the repository needs; the wheel has the package, its marker for type
checkers and one library, and neither sources nor tests. The library loads wherever torch's own wheels do.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

# Of the repository alone: what works with git or with its CI.
NOT_IN_SDIST = (".ci/", ".clang-format", ".gitignore")
LIBRARY = "otface_cuda/_C.abi3.so"

# The newest versions that torch's wheels for Linux ask of glibc and of the C++ library.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 22), "CXXABI": (1, 3, 11)}


def missing_in_sdist(source: Iterable[str], sdist: Iterable[str]) -> list[str]:
    """Files of the repository that the sdist lacks; its names begin with the folder that it unpacks to."""
    packed = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in sdist}
    return sorted(name for name in source if not name.startswith(NOT_IN_SDIST) and name not in packed)


def wrong_in_wheel(source: Iterable[str], wheel: Iterable[str]) -> list[str]:
    """What the wheel lacks or has too much, one sentence each."""
    files = [name for name in wheel if ".dist-info/" not in name]
    package = {name for name in source if name.startswith("otface_cuda/")} | {LIBRARY}
    return [f"{name} is missing" for name in sorted(package.difference(files))] + [
        f"{name} does not belong there" for name in sorted(set(files).difference(package))
    ]


def too_new(symbols: str) -> list[str]:
    """What `objdump -T` lists of a library that older systems lack, one sentence each."""
    listed = re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)\s+(\S+)", symbols)
    if not listed:
        return ["objdump lists no symbol of glibc, so nothing was checked"]
    return [
        f"{symbol} needs {kind}_{version}, torch's wheels no more than {'.'.join(map(str, NEWEST[kind]))}"
        for kind, version, symbol in sorted(set(listed))
        if tuple(map(int, version.split("."))) > NEWEST[kind]
    ]


def symbols_of(library: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(library)
        file.flush()
        return subprocess.run(["objdump", "-T", file.name], capture_output=True, text=True, check=True).stdout


def main(source: Path, dist: Path) -> int:
    files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as packed:
        failures = [f"{sdist.name}: {name} is missing" for name in missing_in_sdist(files, packed.getnames())]
    with zipfile.ZipFile(wheel) as installed:
        names = installed.namelist()
        wrong = wrong_in_wheel(files, names)
        if LIBRARY in names:
            wrong += too_new(symbols_of(installed.read(LIBRARY)))
        failures += [f"{wheel.name}: {sentence}" for sentence in wrong]
        (metadata,) = (installed.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        failures.append(f"{wheel.name}: the licence is missing")
    if "License-Expression: MIT" not in metadata:
        failures.append(f"{wheel.name}: its metadata does not name the licence")
    for sentence in failures:
        print(f"wheel_contents: {sentence}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
