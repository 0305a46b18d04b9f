#!/usr/bin/env bash
# What travels with the checkout to a machine where nothing can be installed:  bash bench/gpu/pack.sh
#
# Into build/gpu, which git ignores: the compiled parts for sm_90, MiniLM in bfloat16, 4,000 rows of SST-2 with
# its dev split, and EigenTune. $CARD_PYTHON builds the parts: its torch must be the one of that machine; nvcc is needed, a GPU
# is not. $PYTHON has the extras [bench] and [demo]; $FASTSPEC_GLUE_DIR is the folder of GLUE files. Prints
# the size of it all.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
CARD_PYTHON=${CARD_PYTHON:-build/cuda-venv/bin/python}
into=build/gpu
rm -rf $into/ext $into/source $into/minilm $into/glue $into/site
mkdir -p $into/ext $into/source $into/glue $into/site

# a copy of the sources, so that the compiled parts of the checkout stay those of its own torch
cp -r fastspec kernels csrc setup.py pyproject.toml README.md LICENSE $into/source
rm -f $into/source/fastspec/*.so
# nvcc on the path may be a wrapper, beside which torch would look for the toolkit's libraries
export CUDA_HOME=${CUDA_HOME:-$(realpath -m "$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's,.*TOP=,,p')")}
card_python=$(command -v "$CARD_PYTHON")
case $card_python in /*) ;; *) card_python=$PWD/$card_python ;; esac
(cd $into/source && TORCH_CUDA_ARCH_LIST=9.0 "$card_python" setup.py -q build_ext --inplace)
cp $into/source/fastspec/_C.so $into/source/fastspec/_C_cuda.so $into/ext
strip --strip-unneeded $into/ext/*.so
rm -rf $into/source

PYTHONPATH=.:bench "$PYTHON" -m gpu.pack $into
source=${FASTSPEC_GLUE_DIR:?the folder of GLUE files}/SST-2
mkdir -p $into/glue/SST-2
head -n 4001 "$source/train.tsv" > $into/glue/SST-2/train.tsv
cp "$source/dev.tsv" $into/glue/SST-2
du -sh $into/*
checkout=$(git ls-files -z | du -c --bytes --files0-from=- | tail -1 | cut -f1)
packed=$(du -s --bytes $into | cut -f1)
echo "checkout $((checkout >> 20)) MiB + $into $((packed >> 20)) MiB = $(((checkout + packed) >> 20)) MiB"
