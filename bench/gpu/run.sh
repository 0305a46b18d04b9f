#!/usr/bin/env bash
# Everything about a GPU in one call of less than ten minutes:  bash bench/gpu/run.sh [step[=seconds] ...]
#
# Results go to $OUT, or build/gpu/out: results.json, written after every row, and run.log. Nothing is
# installed: the checkout is used where it lies. FASTSPEC_GPU_REHEARSE=1 runs every step on a CPU, tiny.
set -u
cd "$(dirname "$0")/../.."
root=$PWD
export PYTHONPATH="$root:$root/bench:$root/tests:$root/build/gpu/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export FASTSPEC_GPU_OUT="${FASTSPEC_GPU_OUT:-${OUT:-$root/build/gpu/out}}"
exec "${PYTHON:-python3}" -m gpu.run "$@"
