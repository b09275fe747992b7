# Needs Python 3.11 or later and make. Each target sets up its own .venv when it is missing or out of date.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format docs bench bench-large wheel clean

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 16

demo: .venv/.ready ## Build a datastore from the sample book, query it, and compare perplexities
	$(BIN)/knnstore demo

test: .venv/.ready ## Tests without the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.ready ## All tests
	$(BIN)/python -m pytest

lint: .venv/.ready ## ruff, mypy --strict, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready ## Rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.ready ## Write the command-line reference again from --help
	$(BIN)/python tools/cli_reference.py

bench: .venv/.bench ## Measure speed, size and memory beside peers, and write docs/benchmarks.md again: an hour
	$(BIN)/python -m benchmarks

bench-large: .venv/.bench ## The same for what takes hours and some tens of GB of disk
	$(BIN)/python -m benchmarks --large

wheel: .venv/.ready ## Build the wheel into dist/
	rm -rf build
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean: ## Remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + sys.version.split()[0] + "; 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,gguf,harness,plot]"
	@touch $@

.venv/.bench: .venv/.ready
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@touch $@
