# Each target builds what it needs: `make demo` and `make test` both work alone on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo  ## train the MNIST autoencoder with K-FAC, Adam and SGD; table and picture
	$(BIN)/kfac-triton demo --output demo.png $(DEMO)

check: $(VENV)/.installed-test $(VENV)/.installed-demo  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check  ## the checks, then every test that is not slow
	$(BIN)/python -m pytest $(PYTEST)

test-all: check  ## the checks, then every test
	$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST)

bench: $(VENV)/.installed-bench  ## kernel benchmarks on this machine
	$(BIN)/python -m pytest benchmarks --benchmark-enable -m "slow or not slow" $(PYTEST)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks demo.png
