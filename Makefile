# make demo | test | lint | bench | clean. Each sets up what it needs in its own .venv first, once.
#
#   PYTHON=python3.12     the Python to build .venv from, 3.10 to 3.13
#   CONSTRAINTS=          (empty) the newest releases instead of the versions that CI runs
#   PYTEST_ARGS="-x -m slow"   what pytest gets beside its configuration
#   BENCH=benchmarks/one.py    which benchmarks to run
#
# On Linux, PyPI's torch brings 5.7 GB of CUDA along. For a machine without a GPU:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal
BENCH ?= $(wildcard benchmarks/[a-z]*.py)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
WHEEL := $(VENV)/lint

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

setup: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v < (3, 14) or sys.exit("attnc needs Python 3.10 to 3.13, $(PYTHON) is %d.%d: use make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off -e '.[dev]' $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	@touch $@

demo: $(READY)
	$(BIN)/python examples/quickstart.py

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# mypy reads an installed copy: the folders on disk are not laid out as the package is.
# build/ goes first, since setuptools would put files into the wheel that are gone from the tree.
lint: $(READY)
	$(BIN)/ruff check .
	rm -rf build $(WHEEL)
	$(BIN)/python -m pip install --quiet --no-deps --target $(WHEEL) .
	cd $(WHEEL) && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

bench: $(READY)
	@set -e; for file in $(BENCH); do echo "== $$file"; $(BIN)/python $$file; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
