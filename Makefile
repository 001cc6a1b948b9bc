# make install     an environment in .venv with the tested versions
# make check       style, types, layers, doctests and the fast tests; under two minutes on two cores
# make test        everything
# make quickstart  its own environment, then `trimtab quickstart`
# make snapshots   rewrite the snapshots of the public API and of the command line
# make clean       remove what these targets made
#
# PYTHON, VENV, WORKERS and TORCH_INDEX can be set on the command line, for example
#   make install PYTHON=python3.12 TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
QUICKSTART_VENV ?= .venv-quickstart
WORKERS ?= 2
TORCH_INDEX ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.trimtab-installed
QUICKSTART_INSTALLED := $(QUICKSTART_VENV)/.trimtab-installed
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --progress-bar off
# torch goes in first and alone, so that nothing after it can choose another build of it.
INSTALL_TORCH := $(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch

# Tests reach no model hub, and run as several processes of one thread each.
check test snapshots: export HF_HUB_OFFLINE := 1
check test snapshots: export SETUPTOOLS_USE_DISTUTILS := stdlib
check test snapshots: export OMP_NUM_THREADS := 1
check test snapshots: export TOKENIZERS_PARALLELISM := false

.PHONY: install check test static quickstart snapshots clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL_TORCH)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[test,dev,peers]'
	touch $@

static: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: static
	$(BIN)/pytest -q --doctest-modules src
	$(BIN)/pytest -n $(WORKERS) -m "not slow" tests

test: static
	$(BIN)/pytest -q --doctest-modules src
	$(BIN)/pytest -n $(WORKERS) tests

snapshots: $(INSTALLED)
	$(BIN)/pytest tests/test_public_surface.py --update-snapshots -k test_snapshot

$(QUICKSTART_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(QUICKSTART_VENV)
	$(QUICKSTART_VENV)/bin/python $(INSTALL_TORCH)
	$(QUICKSTART_VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e .
	touch $@

quickstart: $(QUICKSTART_INSTALLED)
	$(QUICKSTART_VENV)/bin/trimtab quickstart

clean:
	rm -rf .venv .venv-quickstart build dist src/trimtab.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
