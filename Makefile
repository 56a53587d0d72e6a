# Each target builds what it needs: `make demo` and `make test` both work alone on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Another pair of PyTorch and Triton: make test VENV=build/newest CONSTRAINTS=other.txt
CONSTRAINTS ?= constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo race test test-all check docs bench gpu codegen clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable ".[$*]"
	@touch $@

demo: $(VENV)/.installed-demo  ## train the MNIST autoencoder with K-FAC, Adam and SGD; table and picture
	$(BIN)/kfac-triton demo --output demo.png $(DEMO)

race: $(VENV)/.installed-demo  ## KFACAdam and K-FAC against AdamW, SGD, Muon (SOAP, Shampoo if given) on six problems: an hour and a half, goes on where it stopped; table and picture
	$(BIN)/python -m benchmarks.convergence $(RACE)

# Files of tests run side by side in processes, each with PyTorch in its memory. PROCESSES=0 is one process, which --pdb needs.
PROCESSES ?= $(shell getconf _NPROCESSORS_ONLN)
SIDE_BY_SIDE := --numprocesses $(PROCESSES) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The site clips code beyond some 80 characters.
PAGES := README.md docs/*.md

check: $(VENV)/.installed-test $(VENV)/.installed-demo  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff format --check --isolated --line-length 78 $(PAGES)
	$(BIN)/mypy

test: check  ## the checks, then every test that is not slow
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(PYTEST)

# Trainers have an environment of their own: where torchvision is installed they import it, and the one that an oracle of the
# other tests brings may be of another build than PyTorch.
TRAINERS := tests/integrations "tests/test_docs.py::test_blocks_run[docs/trainers.md]"

.venv-trainers/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-trainers
	.venv-trainers/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[trainers]" pytest pytest-benchmark
	@touch $@

test-all: check .venv-trainers/.installed  ## the checks, then every test, those of the trainers in an environment of their own
	.venv-trainers/bin/python -m pytest -m slow $(TRAINERS) $(PYTEST)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --hypothesis-profile default -m "slow or not slow" --ignore tests/integrations --deselect "tests/test_docs.py::test_blocks_run[docs/trainers.md]" $(PYTEST)

# The variable keeps mkdocs-material from printing an advertisement.
docs: $(VENV)/.installed-docs  ## pages and API reference into build/site; a warning is an error, and no network is needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f .mkdocs.yml

bench: $(VENV)/.installed-bench  ## models of costs and steps, the time of the host, then kernel benchmarks on this machine
	$(BIN)/python -m benchmarks.kernels.cost_model
	$(BIN)/python -m benchmarks.steps.step_model
	PYTHONPATH=tests $(BIN)/python -m benchmarks.steps.host_time
	$(BIN)/python -m pytest benchmarks --benchmark-enable -m "slow or not slow" $(PYTEST)

# For a GPU machine without network: the PyTorch and Triton that it has, nothing installed. The report is written whatever failed.
gpu:  ## on a GPU machine: results checked, operations, steps and training timed; report in benchmarks/results/
	rm -rf build/gpu
	$(PYTHON) -m benchmarks.gpu all --out build/gpu $(GPU); status=$$?; \
	$(PYTHON) -m benchmarks.gpu report build/gpu/hour.jsonl && exit $$status

# Every Triton that kernels may meet has its golden table: 3.6.0 comes with PyTorch 2.11, 3.7.1 with 2.13, 3.8.0 with 2.14, and
# 3.9.0 is the newest.
CODEGEN := $(patsubst %,codegen-%,3.6.0 3.7.1 3.8.0 3.9.0)

.venv-codegen-%/.installed: constraints.txt
	$(PYTHON) -m venv .venv-codegen-$*
	.venv-codegen-$*/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-codegen-$*/bin/python -m pip install --quiet --no-deps triton==$*
	@touch $@

$(CODEGEN): codegen-%: .venv-codegen-%/.installed
	PYTHONPATH=tests:. .venv-codegen-$*/bin/python -m codegen $(UPDATE)

.PHONY: $(CODEGEN)
codegen: $(CODEGEN)  ## compile every kernel for four GPUs under four Tritons and read the assembly (UPDATE=--update)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) .venv-codegen-* .venv-trainers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks demo.png convergence.json fewer_rows.json derivatives.json derivatives.png race.png
