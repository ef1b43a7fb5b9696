#!/usr/bin/env bash
# Everything that only an NVIDIA GPU can tell. Each part runs even if one before it failed; the end says which did.
#
#   tools/gpu_check.sh                  all parts
#   tools/gpu_check.sh build tests      these parts
#   tools/gpu_check.sh --list           their names
#
#   build      compile for the GPU that is present, print what each kernel needs, solve one problem, one margin loss
#   tests      the whole test suite, with CUDA graphs and several streams
#   memcheck racecheck synccheck initcheck
#              the tests of every kernel under that tool of compute-sanitizer
#   bench      all benchmarks, their JSON into benchmarks/results/
#
# OTFACE_NO_INSTALL=1   no network, nothing is installed: the python3 on PATH with what it has; the library is compiled
#                       in place. Otherwise the parts use .venv, which make fills.
# OTFACE_FACES=PATH     the Sinkhorn benchmark is run a second time with costs from these faces
# OTFACE_PART_SECONDS   how long one part may take, 1800 by default: a kernel that hangs is a failure, not a wait
#
# It ends with 0 if nothing failed, 1 if a part failed, 2 if it could not start. What is not there to run a part with is
# reported as NOT RUN and is no failure. The output of each part is kept in build/gpu_check/.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

all_parts=(build tests memcheck racecheck synccheck initcheck bench)
logs=build/gpu_check
part_seconds=${OTFACE_PART_SECONDS:-1800}
not_run=77  # the status of a part that lacks what it needs

stop() {
  echo "gpu_check: $1" >&2
  exit 2
}

# What a part lacks. The last such line of its output appears in the summary.
lacks() {
  echo "gpu_check: NOT RUN: $1"
  return "$not_run"
}

can_import() {
  "$python" -c "import $1" > /dev/null 2>&1
}

build() {
  local status=0
  nvidia-smi
  if [ "${OTFACE_NO_INSTALL:-}" = 1 ]; then
    "$python" setup.py build_ext --inplace egg_info || status=1
  else
    make .venv/test .venv/bench || status=1
  fi
  [ "$status" = 0 ] || return 1
  "$python" -m otface_cuda || status=1
  "$python" tools/kernel_resources.py --registers-only 'RegisterMatrix<' || status=1
  "$python" -c '
import torch, otface_cuda
assert otface_cuda.info().cuda_architectures, "the library was built without CUDA"
cost = torch.rand(3, 20, 30)
difference = otface_cuda.sinkhorn(cost.cuda(), 0.1).f.cpu() - otface_cuda.sinkhorn(cost, 0.1).f
assert difference.abs().max() < 1e-4, "the GPU and the CPU differ by %g" % difference.abs().max()
print("One problem solved on", torch.cuda.get_device_name())' || status=1
  "$python" -c '
import torch, otface_cuda
x, weight, labels = torch.randn(5, 16), torch.randn(300, 16), torch.randint(300, (5,))
settings = dict(margin=otface_cuda.ArcFace(0.5), scale=64.0)
loss = otface_cuda.margin_softmax_loss(x, weight, labels, **settings)
on_gpu = otface_cuda.margin_softmax_loss(x.cuda(), weight.cuda(), labels.cuda(), **settings).cpu()
assert torch.allclose(loss, on_gpu, rtol=1e-4), "the margin loss is %g on the CPU, %g on the GPU" % (loss, on_gpu)
print("One margin loss computed on", torch.cuda.get_device_name())' || status=1
  return "$status"
}

tests() {
  can_test || return
  local without=()
  if ! can_import ot.batch; then
    echo 'gpu_check: POT is not installed; the comparison with it is left out'
    without=(--ignore=tests/test_against_pot.py)
  fi
  "$python" -m pytest -q -rs "${without[@]}"
}

can_test() {
  can_import pytest || lacks 'pytest is not installed' || return
  can_import hypothesis || lacks 'hypothesis is not installed'
}

# Every tensor gets an allocation of its own, so that its end is known to the tool. API errors are not reported: torch
# tries calls that an older driver does not have.
sanitize() {
  can_test || return
  local sanitizer
  sanitizer=$(find_sanitizer) || lacks 'compute-sanitizer was not found; it is part of the CUDA toolkit' || return
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$@" --report-api-errors no --error-exitcode 99 \
    "$python" -m pytest -q -m sanitize tests
}

find_sanitizer() {
  command -v compute-sanitizer && return
  local place
  for place in "${CUDA_HOME:-/usr/local/cuda}/bin" /usr/local/cuda*/bin; do
    if [ -x "$place/compute-sanitizer" ]; then
      echo "$place/compute-sanitizer"
      return
    fi
  done
  return 1
}

bench() {
  local status=0 script name
  for script in benchmarks/bench_*.py; do
    name=$(basename "$script" .py)
    name=benchmarks/results/${name#bench_}_$1
    "$python" "$script" --device cuda --json "$name.json" || status=1
  done
  if [ -n "${OTFACE_FACES:-}" ]; then
    "$python" benchmarks/bench_sinkhorn.py --device cuda --faces "$OTFACE_FACES" \
      --json "benchmarks/results/sinkhorn_$1_faces.json" || status=1
  fi
  return "$status"
}

# Without what makes a file name awkward: "NVIDIA GeForce RTX 4090" is geforce_rtx_4090.
device_slug() {
  echo "$1" | tr '[:upper:]' '[:lower:]' | sed -e 's/^nvidia //' -e 's/[^a-z0-9]\{1,\}/_/g' -e 's/^_//' -e 's/_$//'
}

# --- a part by itself, in a process that can be stopped ---

if [ "${1:-}" = --part ]; then
  python=$3
  [ "$2" = build ] || [ -x "$python" ] || lacks 'there is no .venv yet; run the part build' || exit
  case $2 in
    build) build ;;
    tests) tests ;;
    # Not for our kernels alone: what torch's kernels write would then count as never written.
    initcheck) sanitize initcheck ;;
    bench) bench "$4" ;;
    *) sanitize "$2" --kernel-name kernel_substring=otface ;;
  esac
  exit
fi

# --- all of them ---

if [ "${1:-}" = --list ]; then
  printf '%s\n' "${all_parts[@]}"
  exit
fi
parts=("$@")
[ $# -gt 0 ] || parts=("${all_parts[@]}")
for part in "${parts[@]}"; do
  case " ${all_parts[*]} " in
    *" $part "*) ;;
    *) stop "no part is called '$part'; there are: ${all_parts[*]}" ;;
  esac
done

names=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null) || stop 'nvidia-smi finds no NVIDIA GPU'
name=${names%%$'\n'*}
[ -n "$name" ] || stop 'nvidia-smi finds no NVIDIA GPU'
if [ "${OTFACE_NO_INSTALL:-}" = 1 ]; then
  python=$(command -v python3) || stop 'OTFACE_NO_INSTALL=1, but there is no python3 on PATH'
  can_import torch || stop "OTFACE_NO_INSTALL=1, but $python has no torch"
  "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || stop "the torch of $python sees no GPU"
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
else
  python=$PWD/.venv/bin/python
fi
export OTFACE_CUDA=1
export OTFACE_NEED_GPU=1  # a test for a GPU that finds none fails, instead of being left out
export NVCC_APPEND_FLAGS="-lineinfo ${NVCC_APPEND_FLAGS:-}"  # the sanitizer then names lines

mkdir -p $logs
summary=()
failed=0
for part in "${parts[@]}"; do
  printf '\n=== %s\n' "$part"
  begin=$SECONDS
  timeout --kill-after=30 "$part_seconds" "$BASH" tools/gpu_check.sh --part "$part" "$python" "$(device_slug "$name")" 2>&1 |
    tee $logs/"$part".log
  status=${PIPESTATUS[0]}
  took="$((SECONDS - begin)) s"
  case $status in
    0) summary+=("passed   $part ($took)") ;;
    "$not_run") summary+=("NOT RUN  $part: $(sed -n 's/^gpu_check: NOT RUN: //p' $logs/"$part".log | tail -n 1)") ;;
    124 | 137) summary+=("FAILED   $part: stopped after $took, see $logs/$part.log") && failed=1 ;;
    *) summary+=("FAILED   $part ($took): status $status, see $logs/$part.log") && failed=1 ;;
  esac
done

printf '\n=== %s\n' "$name"
printf '%s\n' "${summary[@]}"
exit "$failed"
