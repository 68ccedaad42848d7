# Everything happens in .venv, which the first target builds. `make help` lists the targets.
#
#   make demo PYTHON=python3.12           another interpreter (default: the first that is 3.10 or newer)
#   make demo CONSTRAINTS=my.txt          other versions. constraints.txt names a torch that runs everywhere, and pip takes the
#                                         build that its index serves; for one that matches your driver, copy the file,
#                                         change its torch line and set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL as that build's
#                                         instructions say. `make clean` first.
#   make test PYTEST_ARGS="-k plan -x"    a part of the suite

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

# The oldest transformers we promise, laid over the newest together with what it needs older than the newest does.
FLOOR := build/floor-5.15.0
FLOOR_PACKAGES := transformers==5.15.0 huggingface_hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9
FLOOR_TESTS := $(addprefix tests/test_,import.py mapping.py auto_model.py engine.py other_models.py)

.PHONY: help demo test test-floor test-gpu lint bench venv clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## run notebooks/quickstart.ipynb on a real model; leaves it and its HTML in build/
	@$(BIN)/python tools/demo.py

test: lint test-floor ## lint, the core tests on the oldest transformers, then the whole suite
	@echo "== the whole suite"
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q --durations=10 $(PYTEST_ARGS)

test-gpu: $(STAMP) ## the tests that need a GPU; `make test` compares on the CPU, GPU or not
	@$(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)

test-floor: $(STAMP) $(FLOOR)/installed ## the core tests on transformers 5.15.0
	@echo "== core tests on transformers 5.15.0"
	@CUDA_VISIBLE_DEVICES= PYTHONPATH=$(CURDIR)/$(FLOOR) AIRLLM_NB_EXPECT_TRANSFORMERS=5.15.0 \
	  $(BIN)/python -m pytest -q -p no:cacheprovider $(FLOOR_TESTS)

lint: $(STAMP) ## ruff and mypy
	@echo "== lint"
	@$(BIN)/ruff check --quiet --output-format=concise .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: $$($(BIN)/ruff format --check . 2>/dev/null | sed -n 's/^Would reformat: //p' | tr '\n' ' ')- run $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy --no-error-summary

bench: $(STAMP) ## seconds a token beside AirLLM 4.0.0, on this machine
	@test -f benchmarks/compare.py || { echo "make: benchmarks/compare.py is not there yet" >&2; exit 1; }
	@$(BIN)/python benchmarks/compare.py

venv: $(STAMP) ## only install into .venv

clean: ## remove .venv, build/ and caches
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# python3 is asked first: packages are likeliest to be at hand for a machine's own default. Each candidate is run, not
# looked up, because a version manager's stand-in can exist and not work.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10) none; do \
	    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && break; \
	  done; \
	  if [ $$python = none ]; then \
	    echo "make: no Python 3.10 or newer that can make a venv (tried $(or $(PYTHON),python3 and python3.13 to python3.10));" \
	      "install one (Debian: apt install python3-venv) or name it: make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "== new $(VENV) with $$($$python --version)"; \
	  rm -rf $(VENV) && $$python -m venv $(VENV); \
	fi
	@echo "== installing into $(VENV) (the first time takes minutes: torch is large)"
	@$(PIP_INSTALL) -c $(CONSTRAINTS) -e '.[test,lint]'
	@touch $@

$(FLOOR)/installed: $(STAMP) Makefile
	@echo "== installing transformers 5.15.0 into $(FLOOR)"
	@rm -rf $(FLOOR) && $(PIP_INSTALL) --no-deps --target $(FLOOR) $(FLOOR_PACKAGES)
	@touch $@
