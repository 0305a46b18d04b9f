# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Real GLUE files lie beside the checkout on some machines; everything works without them.
FASTSPEC_GLUE_DIR ?= $(wildcard $(abspath ../shared/glue))
ifneq ($(FASTSPEC_GLUE_DIR),)
export FASTSPEC_GLUE_DIR
endif
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests run a file at a time in as many processes as there are cores, at most four. Their threads share
# the cores, so a waiting thread sleeps instead of spinning.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-all test-versions lint bench cuda-check clean

help:
	@echo "make demo    install, build, and adapt a real pretrained model: a table and a picture"
	@echo "make test    install, build, lint and test"
	@echo "make test-all    the same with the slow tests, near copies of others: minutes more"
	@echo "make test-versions   the core and the kernels with other torch and Triton (downloads 10 GB)"
	@echo "make bench   the benchmarks (pytest bench/), machine otherwise idle"
	@echo "make lint    ruff, mypy and clang-format alone"
	@echo "make cuda-check   compile the CUDA part (nvcc, no GPU; downloads a 5 GB torch), into docs/cuda.md"
	@echo "make clean   remove the virtual environment and build products"

install: $(VENV)/.installed

# torch is pinned: an unpinned one would pull the CUDA build. Build isolation is off so that the
# compiled part builds against this very torch.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "setuptools>=77" wheel ninja numpy torch==2.13.0
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]" triton
	$(BIN)/fastspec backends
	touch $@

demo: install
	$(BIN)/fastspec demo

test: install lint
	$(PYTEST) -m "not slow"

test-all: install lint
	$(PYTEST)

# The oldest torch and Triton, those of pyproject.toml's lower bounds, those of the cards at hand, and newer ones. What can
# run without a GPU: the core, tracing, compilation ahead of time for sm_90; from a copy that is not installed,
# its compiled part built with that torch.
VERSIONS := 2.8.0-3.4.0 2.11.0-3.6.0 2.14.1-3.8.0
CORE := ops ops_autograd second_backward nn svd csrc_svd plan reference precision extension tasks_op tasks_bank
test-versions: $(VERSIONS:%=test-version-%)

test-version-%:
	test -x build/torch-$*/bin/python || $(PYTHON) -m venv build/torch-$*
	build/torch-$*/bin/python -m pip install -q "setuptools>=77" wheel ninja numpy safetensors pytest hypothesis transformers tqdm \
	  torch==$(firstword $(subst -, ,$*)) triton==$(lastword $(subst -, ,$*))
	rm -rf build/copy-$* && mkdir -p build/copy-$*
	cp -r fastspec kernels csrc tests bench tools setup.py pyproject.toml README.md LICENSE build/copy-$*
	rm -f build/copy-$*/fastspec/*.so
	cd build/copy-$* && $(abspath build/torch-$*)/bin/python setup.py -q build_ext --inplace
	cd build/copy-$* && PYTHONPATH=. $(abspath build/torch-$*)/bin/python -m pytest -q -m "not slow" \
	  $(CORE:%=tests/test_%.py) tests/test_kernels/test_tracing.py tests/test_kernels/test_launch.py
	cd build/copy-$* && PYTHONPATH=. $(abspath build/torch-$*)/bin/python -m pytest -q \
	  tests/test_kernels/test_compile.py -k "not sm_80 and not sm_100"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

bench: install
	$(BIN)/python -m pytest bench

# A copy of the sources, so that the compiled part of the checkout stays the one of its own torch.
CUDA_VENV := build/cuda-venv
CUDA_COPY := build/cuda-check
# nvcc on the path may be a wrapper, beside which torch would look for the toolkit's libraries
cuda-check: export CUDA_HOME ?= $(abspath $(shell nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's,.*TOP=,,p'))
cuda-check:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -q "setuptools>=77" wheel ninja numpy safetensors torch==2.14.1
	rm -rf $(CUDA_COPY) && mkdir -p $(CUDA_COPY)
	cp -r fastspec kernels csrc tools setup.py pyproject.toml README.md LICENSE $(CUDA_COPY)
	rm -f $(CUDA_COPY)/fastspec/*.so
	cd $(CUDA_COPY) && TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0" $(abspath $(CUDA_VENV))/bin/python setup.py -q build_ext --inplace
	cd $(CUDA_COPY) && PYTHONPATH=. $(abspath $(CUDA_VENV))/bin/python tools/cuda_check.py > cuda.md
	cp $(CUDA_COPY)/cuda.md docs/cuda.md
	cat docs/cuda.md

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f fastspec/*.so
