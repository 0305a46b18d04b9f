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

.PHONY: help install demo test lint bench clean

help:
	@echo "make demo    install, build, and adapt a real pretrained model: a table and a picture"
	@echo "make test    install, build, lint and run every test"
	@echo "make bench   the benchmarks (pytest bench/), machine otherwise idle"
	@echo "make lint    ruff and mypy alone"
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
	$(BIN)/python -m pytest tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m pytest bench

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f fastspec/*.so
