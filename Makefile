# `make demo` shows what this project does, `make test` checks it. Both make .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo study test test-oldest lint bench docs dist clean

help:
	@echo "make demo         train small networks with sparse weights, a bad batch, wrong labels, attacked inputs and compressed gradients (three minutes)"
	@echo "make study        train what the claims in studies/ miss, and write the page of evidence; BUDGET=20 stops after 20 minutes,"
	@echo "                  DATA=FOLDER trains on CIFAR-10 and a text, ONLY=\"clipping data-pruning\" runs some claims, RESULTS=FOLDER keeps them apart"
	@echo "make test         run the tests"
	@echo "make test-oldest  run the tests with the oldest supported versions, in an environment of their own (2.3 GB)"
	@echo "make lint         check style and types"
	@echo "make bench        measure speed and memory, and write docs/benchmarks.md (35 minutes); ONLY=\"clipping memory\" runs some scripts"
	@echo "make docs         write the tables, and build the documentation into docs/_build/html"
	@echo "make dist         build the wheel and the source distribution into dist, and check them"

# torch comes first and pinned: left to another package's requirements, pip may fetch gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python studies/demo.py

study: $(INSTALLED)
	@$(BIN)/python -m studies $(if $(BUDGET),--budget $(BUDGET)) $(if $(DATA),--data $(DATA)) $(if $(ONLY),--only $(ONLY)) $(if $(RESULTS),--results $(RESULTS))

# Empty, the variable lets each worker keep its compiled tests: compiling them again is four seconds of a run.
test: $(INSTALLED)
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

# --no-deps: torch 2.6 from PyPI is the CUDA build, and its libraries are gigabytes that the tests do not need.
# Where PyTorch's own index is reached, `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` takes the CPU build.
$(OLDEST_INSTALLED): pyproject.toml requirements-oldest.txt .ci/torch_without_cuda.py
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "Installing into $(OLDEST) (a few minutes, once; fetches 1 GB) ..."
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-oldest.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(OLDEST)/bin/python .ci/torch_without_cuda.py
	@$(OLDEST)/bin/python -c "import torch, lightning; print('torch', torch.__version__, 'and lightning', lightning.__version__)"
	@touch $@

test-oldest: $(OLDEST_INSTALLED)
	@CUDA_VISIBLE_DEVICES= $(OLDEST)/bin/python -m pytest

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks $(ONLY)

docs: $(INSTALLED)
	@$(BIN)/python docs/tables.py
	@$(BIN)/sphinx-build -W -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

dist: $(INSTALLED)
	@rm -rf dist
	@$(BIN)/python -m build
	@$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(OLDEST) runs dist docs/_build
