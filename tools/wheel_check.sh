#!/usr/bin/env bash
# From the sources to a wheel that works elsewhere: `python -m build` makes an sdist, and the CPU wheel from it, in
# environments that hold nothing but what pyproject.toml asks for; the wheel is then used in another one, with another
# torch and outside of the sources.
#
#   tools/wheel_check.sh PYTHON BUILD_TORCH [USE_TORCH]
#   tools/wheel_check.sh .venv/bin/python torch==2.13.0
#   tools/wheel_check.sh .venv/bin/python torch==2.13.0 torch==2.11.0
#
# PYTHON has the extras test and dev and a torch. The environment that uses the wheel sees its packages, and so its torch
# unless USE_TORCH is installed there; that brings its own CUDA libraries and takes minutes.
# The sdist and the wheel are left in build/wheel_check/dist.
set -euo pipefail
unset PYTHONPATH
cd "$(dirname "$0")/.."

python=$(realpath --no-symlinks "$1")
build_torch=$2
use_torch=${3:-}
work=$PWD/build/wheel_check
dist=$work/dist
rm -rf "$work"
mkdir -p "$work/source"
outside=$(mktemp -d) # where no parent folder is the source tree
trap 'rm -rf "$outside"' EXIT

step() {
  printf -- '--- %s (after %d s)\n' "$1" "$SECONDS"
}

step 'sdist, and wheel from the sdist'
git ls-files -z | xargs -0 cp --parents --target-directory="$work/source"
echo "$build_torch" > "$work/constraints"
OTFACE_CUDA=0 OTFACE_WERROR=1 PIP_CONSTRAINT=$work/constraints "$python" -m build --outdir "$dist" "$work/source" \
  > "$work/build.log" 2>&1 || {
  tail -n 30 "$work/build.log"
  exit 1
}
ls -sh "$dist"
wheels=("$dist"/otface_cuda-*-cp310-abi3-linux_*.whl)
[ -e "${wheels[0]}" ] || {
  echo 'wheel_check: there is no wheel for cp310-abi3'
  exit 1
}
"$python" tools/wheel_contents.py "$work/source" "$dist"

step "another environment, ${use_torch:-the torch of $1}"
"$python" -m venv "$outside/env"
there=$outside/env/bin/python
site='import sysconfig; print(sysconfig.get_path("purelib"))'
of_python=$("$python" -c "$site")
of_there=$("$there" -c "$site")
echo "$of_python" > "$of_there/of_python.pth"
if [ -n "$use_torch" ]; then
  "$there" -m pip install --quiet --ignore-installed "$use_torch"
fi
"$there" -m pip install --quiet --no-deps --ignore-installed "${wheels[0]}"

step 'the wheel in use'
cp -r tests "$outside/tests"
cp pyproject.toml "$outside" # for pytest
cd "$outside"
"$there" -m otface_cuda
"$there" -c '
import sys
import torch, otface_cuda
assert otface_cuda.__file__.startswith(sys.prefix), otface_cuda.__file__
used, built = (version.split("+")[0] for version in (torch.__version__, otface_cuda.info().built_with_torch))
assert used == sys.argv[2].split("=")[-1] if sys.argv[2] else used != built, (used, built)
assert built == sys.argv[1].split("=")[-1], built
' "$build_torch" "$use_torch"
"$there" -m pytest -q -p no:cacheprovider tests/test_info.py tests/test_against_reference.py tests/test_modules.py \
  tests/test_margin_modules.py tests/test_compat_*.py
"$there" -m mypy --strict --cache-dir="$outside/mypy" tests/typed_use.py
