# Everything happens in .venv, which the first target builds. `make help` lists the targets.
#
#   make demo PYTHON=python3.12           another interpreter (default: the first that is 3.10 or newer)
#   make demo CONSTRAINTS=my.txt          other versions. constraints.txt names a torch that runs everywhere, and pip takes the
#                                         build that its index serves; for one that matches your driver, copy the file,
#                                         change its torch line and set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL as that build's
#                                         instructions say. `make clean` first.
#   make test PYTEST_ARGS="-k plan -x"    a part of the suite; with WORKERS=0 in one process

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 600
# Processes that test files are shared out to, each with one thread: one more than CI has cores, as many tests wait for a
# kernel, a browser or another process.
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

# The oldest transformers we promise, laid over the newest together with what it needs older than the newest does.
FLOOR := build/floor-5.15.0
FLOOR_PACKAGES := transformers==5.15.0 huggingface_hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9
FLOOR_TESTS := tests/test_import.py $(addprefix tests/,checkpoint/test_mapping.py engine/test_auto_model.py \
  engine/test_facade.py whole/test_other_models.py)

# Kernels as notebooks elsewhere have them, laid over .venv for the kernel's process alone (tests/kernel_stacks.py).
# Colab and Kaggle: what their images bring. The numbers: ipykernel's own ways of reading messages; .venv has the newest.
KERNELS := colab kaggle 6.31 7.0 7.1 7.3
COLAB_BASE := ipython==7.34.0 ipykernel==6.17.1 backcall==0.2.0 decorator==5.2.1 nest-asyncio==1.6.0 pickleshare==0.7.5
KERNEL_colab := $(COLAB_BASE) ipywidgets==7.7.1 ipython-genutils==0.2.0
KERNEL_kaggle := $(COLAB_BASE) ipywidgets==8.1.5
KERNEL_6.31 := ipykernel==6.31.0 nest-asyncio==1.6.0
KERNEL_7.0 := ipykernel==7.0.1 nest-asyncio==1.6.0
KERNEL_7.1 := ipykernel==7.1.0 nest-asyncio==1.6.0
KERNEL_7.3 := ipykernel==7.3.0 nest-asyncio2==1.7.4

# Libraries that make GPTQ and AWQ checkpoints, and dequantise them, for the tests. Without what they need for a GPU,
# and from source, as their wheels are for one.
FORMATS := build/formats
FORMAT_PACKAGES := autoawq==0.2.9 auto-gptq==0.7.1 gptqmodel==7.7.0

# The compiler of our GPU kernels, which PyTorch for CUDA brings along: it interprets and compiles them without a GPU. Not in
# .venv, where a PyTorch for CUDA wants a version of its own.
TRITON := build/triton

.PHONY: help demo test fuzz test-floor test-gpu lint browser kernels formats triton bench venv clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## run notebooks/quickstart.ipynb on a real model; leaves it and its HTML in build/
	@$(BIN)/python tools/demo.py

test: lint browser test-floor kernels formats triton ## lint, the core tests on the oldest transformers, then the whole suite
	@echo "== the whole suite"
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q --durations=10 -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  $(PYTEST_ARGS)

test-gpu: $(STAMP) ## the tests that need a GPU; `make test` compares on the CPU, GPU or not
	@$(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)

fuzz: $(STAMP) ## damage everything that is read, for FUZZ_SECONDS (600); findings name their seed
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(FUZZ_SECONDS)

test-floor: $(STAMP) $(FLOOR)/installed ## the core tests on transformers 5.15.0
	@echo "== core tests on transformers 5.15.0"
	@CUDA_VISIBLE_DEVICES= PYTHONPATH=$(CURDIR)/$(FLOOR) AIRLLM_NB_EXPECT_TRANSFORMERS=5.15.0 \
	  $(BIN)/python -m pytest -q -p no:cacheprovider -n $(WORKERS) --dist loadfile $(FLOOR_TESTS)

browser: ## Chromium for the tests marked `browser`: where there is none, by apt-get as root; else they are skipped
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit 0; \
	done; \
	[ -z "$$AIRLLM_NB_CHROMIUM" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "== installing chromium (a minute)"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium \
	    fonts-dejavu-core >/dev/null || echo "make: apt-get cannot install chromium; the tests in a browser are skipped" >&2; \
	else \
	  echo "make: no chromium, and installing it takes root and apt-get; the tests in a browser are skipped" >&2; \
	fi

lint: $(STAMP) ## ruff and mypy
	@echo "== lint"
	@$(BIN)/ruff check --quiet --output-format=concise .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: $$($(BIN)/ruff format --check . 2>/dev/null | sed -n 's/^Would reformat: //p' | tr '\n' ' ')- run $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy --no-error-summary

formats: $(FORMATS)/installed ## AutoAWQ, AutoGPTQ and GPTQModel, for the tests

$(FORMATS)/installed: $(STAMP) Makefile
	@echo "== installing AutoAWQ, AutoGPTQ and GPTQModel into $(FORMATS)"
	@rm -rf $(FORMATS) && BUILD_CUDA_EXT=0 $(PIP_INSTALL) --no-deps --no-binary auto-gptq --target $(FORMATS) $(FORMAT_PACKAGES)
	@touch $@

triton: $(TRITON)/installed ## Triton, for the tests of GPU kernels

$(TRITON)/installed: $(STAMP) Makefile
	@if [ "$$(uname -s)" = Linux ]; then \
	  echo "== installing Triton into $(TRITON)"; \
	  rm -rf $(TRITON) && $(PIP_INSTALL) --no-deps --target $(TRITON) triton==3.8.0 && touch $@; \
	else \
	  echo "make: there is no Triton but for Linux; the tests of GPU kernels are skipped" >&2; \
	fi

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
	@$(PIP_INSTALL) -c $(CONSTRAINTS) -e '.[test,lint,browser]'
	@touch $@

$(FLOOR)/installed: $(STAMP) Makefile
	@echo "== installing transformers 5.15.0 into $(FLOOR)"
	@rm -rf $(FLOOR) && $(PIP_INSTALL) --no-deps --target $(FLOOR) $(FLOOR_PACKAGES)
	@touch $@

kernels: $(KERNELS:%=build/kernel-%/installed) ## the kernels of Colab, Kaggle and older Jupyters, for the tests

build/kernel-%/installed: $(STAMP) Makefile
	@echo "== installing the kernel of $* into $(@D)"
	@rm -rf $(@D) && $(PIP_INSTALL) --no-deps --target $(@D) $(KERNEL_$*)
	@touch $@
