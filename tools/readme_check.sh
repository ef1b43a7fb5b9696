#!/usr/bin/env bash
# What README says under "Install" and "Use", line by line as it stands there, in a copy of the sources and in an
# environment that has nothing else.
#
#   tools/readme_check.sh PYTHON TORCH
#   tools/readme_check.sh python3 torch==2.13.0
#
# TORCH is the one that the lines get where they ask for any.
set -euo pipefail
unset PYTHONPATH
cd "$(dirname "$0")/.."

python=$(realpath --no-symlinks "$(command -v "$1")")
work=$PWD/build/readme_check
rm -rf "$work"
mkdir -p "$work/source"
git ls-files -z | xargs -0 cp --parents --target-directory="$work/source"
"$python" -m venv "$work/env"
echo "$2" > "$work/constraints"
export PIP_CONSTRAINT=$work/constraints PATH=$work/env/bin:$PATH VIRTUAL_ENV=$work/env
cd "$work/source" # where a user is who has followed the lines so far

lines=$(awk '/^## /{here = /^## Install$/} here && /^```$/{exit} code; here && /^```bash$/{code = 1}' README.md)
grep -q '^pip install .* \.$' <<< "$lines"
bash -euxc "$lines"
python -W error -m otface_cuda > /dev/null # without a warning

python - << 'END'
import re
import sys
from pathlib import Path

import otface_cuda

package, library = (Path(sys.modules[name].__file__).parent for name in ("otface_cuda", "otface_cuda._C"))
assert package == Path("otface_cuda").resolve(), package
assert library.is_relative_to(sys.prefix), library
blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
blocks = [block for block in blocks if "# pip install " not in block]  # which is how a block says what else it needs
for block in blocks:
    exec(compile(block, "README.md", "exec"), {})
print(f"readme_check: {len(blocks)} blocks of Python; the library of {library}")
END
cd / && python -m otface_cuda > /dev/null
