# The verbs people type. Each one sets up what it needs; Python and make are enough to begin.

PYTHON ?= python3
VENV   := .venv
comma  := ,
BIN    := $(VENV)/bin
FLOOR  := .venv-floor

DEMO_FLAGS  ?= --preset demo --output runs/demo --overwrite
PYTEST_ARGS ?=
# Test processes side by side, one thread each: two cores then take half the time.
WORKERS     ?= 2
PYTEST      := OMP_NUM_THREADS=1 %/bin/python -m pytest -n $(WORKERS) --dist worksteal
BENCH_FLAGS ?= --quick speed
BENCH_GPU_FLAGS ?=

# A waiting thread soon gives up its core. By default GNU's OpenMP spins for long, and beside another busy process that
# made training steps up to fifteen times slower here; on a quiet machine it gains nothing.
export GOMP_SPINCOUNT ?= 1000

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

.PHONY: help setup demo check test test-full test-floor bench bench-gpu clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.stamp  ## make .venv with the pinned environment

demo: setup  ## train a byte-level Reformer on Python's standard library, about three minutes on 2 cores
	$(BIN)/flash-reformer train $(DEMO_FLAGS)

check: setup  ## lint, format, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: check  ## check, then the test suite
	$(subst %,$(VENV),$(PYTEST)) -m "not full" $(PYTEST_ARGS)

test-full: check  ## everything, also the tests that take minutes; log in docs/logs/
	@mkdir -p docs/logs
	$(subst %,$(VENV),$(PYTEST)) $(PYTEST_ARGS) 2>&1 | tee docs/logs/test-full.log

test-floor: $(FLOOR)/.stamp  ## the reduced suite on the oldest supported transformers
	$(subst %,$(FLOOR),$(PYTEST)) -m floor $(PYTEST_ARGS)

bench: setup $(VENV)/.stamp-bench  ## speed and memory in about 10 minutes; BENCH_FLAGS=speed takes 25, BENCH_FLAGS= runs all
	$(BIN)/python -m benchmarks.run $(BENCH_FLAGS)

bench-gpu: setup  ## kernels on a GPU: parity, then speed, in under 10 minutes; BENCH_GPU_FLAGS=--rehearse needs no GPU
	$(BIN)/python -m benchmarks.gpu $(BENCH_GPU_FLAGS)

clean:  ## remove environments, caches and build products; runs/ stays
	rm -rf $(VENV) $(FLOOR) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.stamp: constraints.txt pyproject.toml
	$(call make-venv,$(VENV),constraints.txt,dev)

# One peer of the speed benchmark comes from PyPI. Without it the benchmark runs as well, and says what is missing.
$(VENV)/.stamp-bench: $(VENV)/.stamp
	@if $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[bench]'; \
	  then touch $@; else echo "reformer-pytorch could not be installed; it will be reported as missing" >&2; fi

$(FLOOR)/.stamp: constraints-floor.txt pyproject.toml
	$(call make-venv,$(FLOOR),constraints-floor.txt,test$(comma)triton)

# make-venv: folder, constraints file, extra. The stamp comes last, so an interrupted setup is done again.
define make-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "flash-reformer's pinned environment needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
       "$$($(PYTHON) --version 2>&1 | head -1). Try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(2) --editable '.[$(3)]'
@touch $@
endef
