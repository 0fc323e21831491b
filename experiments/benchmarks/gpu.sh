#!/usr/bin/env bash
# The GPU's benchmark, one command on a machine with one GPU, jax and torch:
#
#   experiments/benchmarks/gpu.sh gpu.json
#
# The core's tests on the GPU, train steps beside PEFT, decoding; each part has a limit
# of its own, and what it ended with stays. SIZES=toy rehearses it anywhere; PARTS chooses
# among "tests lorax torch decode", and ROWS among the rows of `gpu/ours.py`.
set -uo pipefail
cd "$(dirname "$0")/../.."

out=$(realpath -m "$1")
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
core="tests/test_adapt.py tests/test_dora.py tests/test_linalg.py tests/test_lapack.py
tests/test_frozen.py tests/test_eight_bits.py tests/test_training.py tests/adapters
tests/optim tests/quantized"
sizes=${SIZES:-1b}
parts=${PARTS:-tests lorax torch decode}
rows=${ROWS:-}
: "${PYTHON:=python3}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_MEM_FRACTION=.92

run() { # seconds part [flags]
  local limit=$1 part=$2
  shift 2
  timeout -k 5 "$limit" "$PYTHON" -m experiments.benchmarks.gpu.parts \
    --part="$part" --sizes="$sizes" --files="$files" --out="$out" "$@" 2>"$files/err" \
    || { echo "$part ended with $?"; tail -n 15 "$files/err"; }
}

for part in $parts; do
  echo "== $part (at $SECONDS s)"
  case $part in
    tests) # several processes share the GPU; float32 is to mean float32
      XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_DEFAULT_MATMUL_PRECISION=highest \
        timeout -s INT -k 10 110 "$PYTHON" -m pytest -q -n "${WORKERS:-12}" -W default \
        -p no:cacheprovider --junitxml="$files/tests.xml" ${TESTS:-$core} | tail -n 40
      run 30 tests
      ;;
    lorax) run 200 lorax --only="$rows" ;;
    torch) XLA_PYTHON_CLIENT_PREALLOCATE=false run 180 torch --only="$rows" ;;
    decode) XLA_PYTHON_CLIENT_PREALLOCATE=false run 60 decode --only="$rows" ;;
  esac
done
echo "== done (at $SECONDS s)"
