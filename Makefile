# make demo | make test | make test-launch | make faults | make setup | make lint | make bench — each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo setup test test-launch faults lint bench clean

help:
	@sed -n '1s/^# //p' Makefile

# The whole job on a generated data set: no download, a few minutes on two cores.
demo: .venv/.installed
	$(BIN)/unetrkit demo

setup: .venv/.installed
	@echo 'done: activate with `source .venv/bin/activate`, then `unetrkit --help`'

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --durations=15 $(TESTS)

# What skips without its extra: Ray, Azure, Synapse, object stores, trackers; in .venv-launch, 3 GB.
LAUNCH := tests/deployment tests/fetch tests/data/test_copies.py tests/data/test_remote.py \
  tests/training/test_folder.py tests/training/test_trackers.py
test-launch: .venv-launch/.installed
	OMP_NUM_THREADS=1 .venv-launch/bin/python -m pytest -q --durations=15 $(or $(TESTS),$(LAUNCH))

# Kill -9, damage, full disks: an hour or so; KILLS=3 of each of 20 runs.
faults: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'faults or not faults' $(or $(TESTS),tests/faults)

lint: .venv/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/data.py

clean:
	rm -rf .venv .venv-launch demo .pytest_cache .mypy_cache .ruff_cache

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

.venv-launch/.installed: .venv/bin/python requirements.lock requirements-dev.lock requirements-launch.lock
	$(BIN)/python -m venv .venv-launch
	.venv-launch/bin/python -m pip install --quiet -r requirements-launch.lock
	.venv-launch/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@
