# `make demo` and `make test` need python3 (3.10 or newer) and nothing else: the first of them to run sets up .venv.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
SMALL := --small
# A process that has done its part takes tests from another's; neighbours stay together, since they share what a module made.
ON_ALL_CORES := --numprocesses auto --dist worksteal

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# Where this is set, each process compiles all of torch anew: ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv check format docs test test-all demo bench bench-small clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed  ## the virtual environment (every other target makes it when it is missing)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "depgraph needs Python 3.10 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PY) -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test,bench]'
	@touch $@

check: $(VENV)/.installed  ## lint, format, types and the staircase of folders
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed  ## put imports and layout in order
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.installed  ## write docs/ops.md from the rules, and the reference of all names to build/reference
	$(PY) -m tools.ops
	$(PY) -m tools.options
	$(PY) -m tools.reference

test: $(VENV)/.installed  ## the tests of every topic but the slow ones, on all cores, in about three minutes
	$(PY) -m pytest $(ON_ALL_CORES) -m "not slow" $(PYTEST_ARGS)

test-all: test  ## all tests: those of `make test`, and the slow ones behind them
	$(PY) -m pytest $(ON_ALL_CORES) -m slow $(PYTEST_ARGS)

demo: $(VENV)/.installed  ## train, prune, verify and fine-tune a small network on real data
	$(PY) examples/demo.py

bench-small: $(VENV)/.installed-bench  ## each benchmark on a few small models, about a quarter of an hour
	$(PY) -m benchmarks.speed $(SMALL)
	$(PY) -m benchmarks.coverage $(SMALL)
	$(PY) -m benchmarks.corruption $(SMALL)
	$(PY) -m benchmarks.store $(SMALL)
	$(PY) -m benchmarks.checkpoint $(SMALL)
	$(PY) -m benchmarks.checkpoint_data $(SMALL)
	$(PY) -m benchmarks.quality $(SMALL)
	$(PY) -m benchmarks.default_call $(SMALL)
	$(PY) -m benchmarks.in_turn $(SMALL)
	$(PY) -m benchmarks.recovery_cost $(SMALL)
	$(PY) -m benchmarks.language_peers $(SMALL)
	$(PY) -m benchmarks.exports $(SMALL)
	$(PY) -m benchmarks.exports --seconds $(SMALL)
	$(PY) -m benchmarks.latency_budget $(SMALL)
	$(PY) -m benchmarks.masks $(SMALL)
	$(PY) -m benchmarks.kinds $(SMALL)
	$(PY) -m benchmarks.elastic $(SMALL)
	$(PY) -m benchmarks.jobs $(SMALL)
	$(PY) -m pytest tests/test_integrations.py

bench: SMALL :=
bench: bench-small  ## the benchmarks in full, hours

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache
