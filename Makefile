# make demo | make test | make faults | make setup | make lint | make bench — each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo setup test faults lint bench clean

help:
	@sed -n '1s/^# //p' Makefile

# The whole job on a generated data set: no download, a few minutes on two cores.
demo: .venv/.installed
	$(BIN)/unetrkit demo

setup: .venv/.installed
	@echo 'done: activate with `source .venv/bin/activate`, then `unetrkit --help`'

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --durations=15 $(TESTS)

# Kill -9, damage, full disks: an hour or so; KILLS=3 of each of 20 runs.
faults: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'faults or not faults' $(or $(TESTS),tests/faults)

lint: .venv/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/data.py

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: unetrkit needs Python 3.11 or newer; try `make PYTHON=python3.12 $(MAKECMDGOALS)`' >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python requirements.lock pyproject.toml
	$(BIN)/python -m pip install --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.lock
	$(BIN)/python -m pip install --quiet -r requirements-dev.lock
	@touch $@
