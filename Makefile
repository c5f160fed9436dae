# SPDX-License-Identifier: MIT
# Short targets over one virtualenv, .venv, which each target builds for itself with python3, its venv module and pip.

PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
CRASH_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?= --seconds 3600
SIEGE_ARGS ?=

.PHONY: help run test lint types bench crash fuzz siege interop docs changes dist clean

help:
	@echo "make run      a complete server on loopback, in ./var"
	@echo "make test     the whole suite (PYTEST_ARGS='-k word' for a part)"
	@echo "make lint     ruff;  make types: mypy;  make docs: Sphinx;  make interop: real peers"
	@echo "make bench    ratios to Postfix (BENCH_ARGS=--quick to try);  make crash: power cuts and faults (both as root)"
	@echo "make fuzz     an hour of hostile octets (FUZZ_ARGS='--seconds 60');  make siege: a minute under attack, with honest mail"

# The stamps are named after what is installed; a changed setup.cfg installs again.
.venv/core: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "polarismail needs Python 3.11 or later"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/%: .venv/core
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

run: .venv/core
	@exec $(BIN)/python -m polarismail.demo

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/lint
	$(BIN)/mypy

interop: .venv/test
	$(BIN)/python -m pytest tests/interop $(PYTEST_ARGS)

bench: .venv/test
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Every test of the folder, and of workers that are killed, in its long version, then thousands of power cuts. Without root it says that it shows nothing.
crash: .venv/test
	POLARISMAIL_CRASH=long $(BIN)/python -m pytest tests/crash tests/e2e/test_workers.py::test_workers_killed_at_random_under_load_lose_nothing -q -rs $(PYTEST_ARGS)
	$(BIN)/python -m tests.crash $(CRASH_ARGS)

fuzz: .venv/fuzz
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

siege: .venv/test
	$(BIN)/python -m tests.siege $(SIEGE_ARGS)

docs: .venv/docs
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

changes: .venv/docs
	$(BIN)/towncrier build --version "$$($(BIN)/python -c 'import polarismail; print(polarismail.__version__)')"

dist: .venv/test
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .venv docs/_build
