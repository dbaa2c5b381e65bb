# `make demo` needs only Python >= 3.11; everything else is set up in $(VENV), once.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0
PYTEST_ARGS ?=
# Tiny models run on one thread, so the fast tests take as many processes as there are cores.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BENCH ?= $(sort $(wildcard benchmarks/[a-z]*.py))
PROMPT ?= Fix the spelling mistakes and print the whole text again: The old lighthouse on the \
northern cape was built in 1884 by a crew of forty masons. The lighthouse keeper livd in a stone \
cottage beside the tower. Every evning the keeper climbed the two hundred and twelve steps of the \
tower to light the great oil lamp.

.PHONY: help demo test test-fast test-real test-slow lint format bench venv clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.stamp-core  ## Answer a prompt with the default model, plainly and with its draft
	$(BIN)/dspark generate "$(PROMPT)" --side-by-side --stats

test: test-fast test-real  ## Run the fast tests, then those on real weights

test-fast: $(VENV)/.stamp-dev  ## Run the tests that need neither network nor weights
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not real and not slow and not gpu" $(PYTEST_ARGS)

test-real: $(VENV)/.stamp-dev  ## Run the tests on real weights (fetched on first use)
	$(BIN)/python -m pytest -m "real and not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(VENV)/.stamp-dev  ## Run the tests that take minutes, and properties on new examples
	HYPOTHESIS_PROFILE=random $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
	  -m "(slow or hypothesis) and not real and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev  ## Check format, style, types and the arrows between modules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev  ## Format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.stamp-dev  ## Run the benchmarks (BENCH=benchmarks/NAME.py for one)
	@set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script; done

venv: $(VENV)/.stamp-dev  ## Set up the environment for development

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: dspark needs Python 3.11 or newer, but '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
	  echo "hint: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and alone: it is the largest download, and what follows must not replace it.
$(VENV)/.stamp-torch: $(VENV)/.stamp-python
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.stamp-core: $(VENV)/.stamp-torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(BIN)/python tests/compile_kernels.py
	@touch $(VENV)/.stamp-core $@
