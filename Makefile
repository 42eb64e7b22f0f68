# `make serve` starts a one-node cluster, `make test` runs the fast tests; both install what they need first.
# Written for GNU make 3.81 and later. Variables may be set on the command line: make serve PORT=9000 MODEL=/models/llama

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := engine cluster tests benchmarks deploy dashboards

MODEL ?= deploy/models/demo.yaml
HOST ?= 127.0.0.1
PORT ?= 8000

# The interpreter that makes the virtual environment; deploy/install.sh looks for one unless it is given.
PYTHON ?=

# The version of torch is pinned in constraints.txt; its build (CPU or CUDA) is chosen by deploy/install.sh. A
# requirement given here, such as TORCH=torch==2.12.1 or a path to a wheel, is installed instead.
TORCH ?=

# The part of `make gpu` to run (default: all), a folder of planned schedules for it to run, and further arguments,
# such as ARGS="--out DIR --seconds 570".
PART ?=
SCHEDULES ?=
ARGS ?=
GPU_ARGS = $(addprefix --part ,$(PART)) $(if $(SCHEDULES),--schedules "$(SCHEDULES)") $(ARGS)
# Where they are: those of the engine need neither Ray nor a web server.
GPU_TESTS = $(or $(ARGS),tests/engine)

.PHONY: help install serve test test-slow test-all test-gpu gpu lint format types imports check constraints clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS="|" read -r target text; do printf '  make %-12s %s\n' "$$target" "$$text"; done

install: $(INSTALLED)  ## make .venv with the project (editable) and its development tools

$(INSTALLED): pyproject.toml constraints.txt deploy/install.sh
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' deploy/install.sh dev
	@touch $@

serve: install  ## start a one-node cluster that serves MODEL on http://HOST:PORT
	$(BIN)/nanoserve serve $(MODEL) --host $(HOST) --port $(PORT)

test: install  ## run the fast tests
	$(BIN)/python -m pytest -m "not slow and not gpu and not multi_gpu"

test-slow: install  ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu and not multi_gpu"

test-all: install  ## run every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not multi_gpu"

gpu:  ## measure on one CUDA device; PART=ceilings runs a part of it; PYTHON=python3 uses that Python, installs nothing
ifeq ($(origin PYTHON),command line)
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(GPU_ARGS)
else
	$(MAKE) install
	PYTHONPATH=. $(BIN)/python benchmarks/gpu.py $(GPU_ARGS)
endif

test-gpu:  ## run the tests that need a GPU, and with two of them those of two ranks; PYTHON=python3 as for gpu
ifeq ($(origin PYTHON),command line)
	$(PYTHON) -m pytest -m "gpu or multi_gpu" $(GPU_TESTS)
else
	$(MAKE) install
	$(BIN)/python -m pytest -m "gpu or multi_gpu" $(GPU_TESTS)
endif

lint: install  ## check formatting and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install  ## format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install  ## check types
	$(BIN)/mypy

imports: install  ## check the layers between packages
	$(BIN)/lint-imports

check: lint types imports test  ## lint, types, imports and test

constraints: install  ## pin newly declared dependencies in constraints.txt; UPGRADE=--upgrade renews every pin
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile -q --python-version 3.11 --python-platform linux --extra dev --extra gpu --no-annotate --no-header \
	  $(UPGRADE) pyproject.toml -o constraints.txt

clean:  ## remove caches and build products, but not .venv
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
