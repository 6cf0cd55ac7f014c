# Two commands: `make quickstart` and `make test`. Both set themselves up; they need Python 3.11, make and a package index.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3
RUN_DIR ?= runs/quickstart
MINUTES ?= 15
SEED ?= 1
UV_VERSION := 0.13.9
UV := .tools/bin/uv
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
DEV_LOCK := requirements/dev.txt
# A local folder of wheels where one is named, the public index of PyTorch's CPU builds otherwise.
TORCH_SOURCE := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--extra-index-url https://download.pytorch.org/whl/cpu)
UV_FLAGS := --quiet $(TORCH_SOURCE) --index-strategy unsafe-best-match

# Engines and workers are processes that import a great deal: what Python has compiled once is kept, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test chaos families cluster soak bench lint lock clean
.DEFAULT_GOAL := help

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Create .venv from the locks, when it is missing or they changed.

quickstart: setup ## Distil on this machine, end to end. RUN_DIR=PATH runs elsewhere than runs/quickstart.
	$(BIN)/plad run examples/quickstart.yaml run.dir="$(RUN_DIR)"

test: setup ## Run the tests, the one on the real engines included.
	$(BIN)/python -m pytest

chaos: setup ## Run the tests that kill engines, nodes and drivers; long.
	$(BIN)/python -m pytest tests/chaos

families: setup ## Run models of five families, several rounds and a watched one through the whole pipeline; long.
	$(BIN)/python -m pytest tests/families

cluster: setup ## Run jobs on a real Ray head with token authentication, and the doctor over two nodes; ten minutes.
	$(BIN)/python -m pytest tests/cluster

soak: setup ## Disturb whole pipelines at random. MINUTES=15 SEED=1; needs root and iproute2.
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --seed $(SEED) --json

bench: setup ## Run the benchmarks, peers beside; long. Each prints one JSON line.
	for name in pool store sampling training logprob_memory gpu_training recovery quality; do $(BIN)/python -m benchmarks.$$name --json || exit 1; done

lint: setup ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: $(UV) ## Resolve the locks anew from pyproject.toml.
	./requirements/lock $(UV) $(TORCH_SOURCE)

clean: ## Remove what the targets made, but for runs/.
	rm -rf $(VENV) .tools .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
		{ echo "plad-dist needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv .tools
	@.tools/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.ready: $(LOCK) $(DEV_LOCK) pyproject.toml | $(UV)
	@echo "setting up $(VENV) from $(LOCK) and $(DEV_LOCK)"
	@$(UV) venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	@$(UV) pip sync --python $(BIN)/python $(UV_FLAGS) $(LOCK) $(DEV_LOCK)
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@
