# `make help` lists the targets. Everything is installed into .venv; nothing else on the machine changes.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SERVE  ?=
TEST   ?=
BENCH  ?=

# llama.cpp without what the server does not use (vision, downloads, subprocess tools): a quarter less to compile.
CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_SUBPROCESS=OFF
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: help serve test test-clients test-hostile test-faults check bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(VENV)/.serve ## Install what serving needs, then serve models.yaml on port 8000 (SERVE="...": further arguments)
	@exec $(BIN)/quantserve serve $(SERVE)

test: $(VENV)/.dev ## Install what the tests need, then run them, two files at a time (TEST="...": arguments for pytest)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(TEST)

test-clients: $(VENV)/.dev $(VENV)-clients/.done ## Client libraries (Python, and node where there is one) against a server
	@$(BIN)/python -m tests.clients $(VENV)-clients/bin/python

test-hostile: $(VENV)/.dev $(VENV)-hostile/.done ## schemathesis over /openapi.json, 1,000 odd schemas, 10,000 spoilt requests (20 minutes)
	@$(BIN)/python -m tests.hostile $(CURDIR)/$(VENV)-hostile/bin/schemathesis

test-faults: $(VENV)/.dev ## Faults with all their figures: kills, disconnects, spoilt files, soaks (hours); figures go to faults.txt
	@QUANTSERVE_FAULTS=full QUANTSERVE_FAULTS_REPORT=$(CURDIR)/faults.txt $(BIN)/python -m pytest tests/faults $(TEST)

check: $(VENV)/.dev ## Lint, formatting, types and the floors between packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.dev ## Measure tokens/s and latencies on the bundled model (BENCH="...": arguments)
	@$(BIN)/python -m benchmarks.serving $(BENCH)

docs: $(VENV)/.dev ## Write the generated parts of docs/ again
	@$(BIN)/python -m docs.build

clean: ## Remove what builds and tools leave behind (.venv and the model cache stay)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -print0 | xargs -0 rm -rf

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantserve needs Python 3.11 or newer (make PYTHON=... chooses one)")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV). The first time, pip compiles llama.cpp: 5 to 10 minutes on two cores ("still running...").'
	@echo 'It keeps the compiled wheel, so that the next environment takes a minute.'
	@CMAKE_ARGS="$(CMAKE_ARGS)" $(PIP_INSTALL) llama-cpp-python
	@$(PIP_INSTALL) --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	@echo 'Installing the tools of the tests into $(VENV) (with torch, about a gigabyte).'
	@$(PIP_INSTALL) --quiet --editable '.[dev]'
	@touch $@

$(VENV)-%/.done: tests/%/requirements.txt
	@$(PYTHON) -m venv $(VENV)-$*
	@$(VENV)-$*/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	@touch $@
