#!/usr/bin/env bash
# The GPU benchmark, in one command, on a machine with one GPU, jax and torch:
#
#   experiments/benchmarks/gpu.sh gpu.json
#
# It compares train steps with PEFT, times decoding, and runs the core tests on the GPU;
# each part has its own time limit, and keeps the rows that it finished in the JSON.
# SIZES=toy is a smoke test that runs anywhere; PARTS chooses among "lorax torch decode
# tests", and ROWS among the rows of `gpu/ours.py`. If the GPU has room for both (100 GiB),
# lorax and torch compile in parallel, JAX in 45 % of the memory; their timed steps exclude
# each other.
set -uo pipefail
cd "$(dirname "$0")/../.."

out=$(realpath -m "$1")
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
core="tests/test_attention.py tests/test_cross_entropy.py tests/test_adapt.py
tests/test_dora.py tests/test_linalg.py tests/test_lapack.py tests/test_eight_bits.py
tests/adapters tests/optim tests/quantized/test_formats.py"
sizes=${SIZES:-1b}
parts=${PARTS:-lorax torch decode tests}
rows=${ROWS:-}
: "${PYTHON:=python3}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=.92

run() { # seconds part [flags]
  local limit=$1 part=$2
  shift 2
  timeout -k 5 "$limit" "$PYTHON" -m experiments.benchmarks.gpu.parts \
    --gpu_part="$part" --gpu_sizes="$sizes" --gpu_files="$files" --gpu_out="$out" "$@" 2>"$files/$part.err" \
    || { echo "$part ended with $?"; tail -n 15 "$files/$part.err"; }
}

one() {
  echo "== $1 (at $SECONDS s)"
  case $1 in
    lorax) run 260 lorax --gpu_only="$rows" ;;
    torch) run 330 torch --gpu_only="$rows" ;;
    decode) run 70 decode --gpu_only="$rows" ;;
    tests) # several processes share the GPU; float32 must mean float32
      JAX_DEFAULT_MATMUL_PRECISION=highest timeout "${TESTS_LIMIT:-110}" "$PYTHON" \
        -m pytest -v -n "${WORKERS:-12}" -W default -p no:cacheprovider \
        ${TESTS:-$core} >"$files/tests.log" 2>&1
      grep -E "^E  |^=.* in " "$files/tests.log" | tail -n 40
      run 30 tests
      ;;
  esac
}

free=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
run 60 files
for part in $parts; do
  if [ "$part" = lorax ] && [ "${free:-0}" -gt 100000 ]; then
    XLA_PYTHON_CLIENT_MEM_FRACTION=.45 one lorax &
  else
    one "$part"
  fi
  [ "$part" = torch ] && wait
done
wait
echo "== done (at $SECONDS s)"
