"""Runs nvcc and keeps what ptxas says of each kernel: `python nvcc_report.py nvcc ... -o x.o` also writes x.o.ptxas.

setup.py puts it in front of nvcc, and kernel_resources.py reads the files. There is one for each object because ninja
compiles several at a time and only those that changed, and because pip shows nothing of a build that succeeds.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SUFFIX = ".ptxas"  # after the whole name of the object
RESOURCES = re.compile(r"ptxas info\s*:|\s+\d+ bytes stack frame")


def main(command: list[str]) -> int:
    done = subprocess.run([*command, "--resource-usage"], stderr=subprocess.PIPE, text=True, check=False)
    said = done.stderr.splitlines(keepends=True)
    sys.stderr.writelines(line for line in said if not RESOURCES.match(line))
    if done.returncode == 0 and "-o" in command:
        report = Path(command[command.index("-o") + 1] + SUFFIX)
        report.write_text("".join(line for line in said if RESOURCES.match(line)))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
