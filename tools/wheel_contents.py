"""Checks what is in the sdist and in the wheel: `wheel_contents.py SOURCE DIST`.

The sdist has every file of SOURCE but what only the repository needs; the wheel has the package, its marker for type
checkers and one library, and neither sources nor tests.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

# Of the repository alone: what works with git or with its CI.
NOT_IN_SDIST = (".ci/", ".clang-format", ".gitignore")


def missing_in_sdist(source: Iterable[str], sdist: Iterable[str]) -> list[str]:
    """Files of the repository that the sdist lacks; its names begin with the folder that it unpacks to."""
    packed = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in sdist}
    return sorted(name for name in source if not name.startswith(NOT_IN_SDIST) and name not in packed)


def wrong_in_wheel(source: Iterable[str], wheel: Iterable[str]) -> list[str]:
    """What the wheel lacks or has too much, one sentence each."""
    files = [name for name in wheel if ".dist-info/" not in name]
    package = {name for name in source if name.startswith("otface_cuda/")} | {"otface_cuda/_C.abi3.so"}
    return [f"{name} is missing" for name in sorted(package.difference(files))] + [
        f"{name} does not belong there" for name in sorted(set(files).difference(package))
    ]


def main(source: Path, dist: Path) -> int:
    files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as packed:
        failures = [f"{sdist.name}: {name} is missing" for name in missing_in_sdist(files, packed.getnames())]
    with zipfile.ZipFile(wheel) as installed:
        names = installed.namelist()
        failures += [f"{wheel.name}: {sentence}" for sentence in wrong_in_wheel(files, names)]
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
