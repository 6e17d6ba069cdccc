# `make demo` and `make test` set up what they need; everything else builds on them.

VENV ?= .venv
# The first interpreter on the PATH that runs and is a supported version.
PYTHON ?= $(firstword $(foreach candidate,python3 python3.11 python3.12,$(shell \
	$(candidate) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && echo $(candidate))))
BIN := $(VENV)/bin
RUNS ?= runs
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
GPU_PYTHON ?= python3
GPUS = $(shell $(BIN)/python -c 'import torch; print(torch.cuda.device_count() or "")')
RANKS ?= $(or $(GPUS),2)
FREE_PORT := import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])

.PHONY: help setup demo test slow test-cluster test-rest check format gpu-bundle gpu-check clean

help:
	@echo "make demo        grow a small BERT on real text, end to end (minutes on 2 cores)"
	@echo "make test        the tests"
	@echo "make check       ruff and mypy"
	@echo "make slow        the tests that take longer"
	@echo "make test-rest   both: the tests that take longer, and beside them those on emulated hosts"
	@echo "make test-cluster  runs on emulated hosts: pdsh, MPI, SLURM, faults (needs root; minutes)"
	@echo "make gpu-bundle  collect what 'make gpu-check' needs on a GPU machine without network"
	@echo "make gpu-check   prove the GPU paths on this machine; writes gpu-check.{json,md}"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found on the PATH; install one, or say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@

setup: $(VENV)/.installed

# every CPU is fast in fp32; in bf16 one without AVX512-BF16 or AMX takes some 15 times as long
demo: setup
	$(BIN)/stacking-ds prepare embedded --out $(RUNS)/embedded-shards --vocab-size 4096
	$(if $(GPUS),,DS_ACCELERATOR=cpu) $(BIN)/deepspeed --num_gpus $(RANKS) --log_level warning \
		--master_port $$($(BIN)/python -c '$(FREE_PORT)') \
		train.py --recipe demo --run-dir $(RUNS)/demo --resume \
		--set data.path=$(RUNS)/embedded-shards $(if $(GPUS),,--set engine.precision=fp32)
	@$(BIN)/stacking-ds report $(RUNS)/demo

test: $(VENV)/.installed-dev
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not cluster and not gpu"

slow: $(VENV)/.installed-dev
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "slow and not cluster and not gpu"

test-cluster: $(VENV)/.installed-dev
	$(PYTEST) -m "cluster and not gpu"

# both: tests of a cluster mostly wait, and each process has emulated hosts of its own
test-rest: $(VENV)/.installed-dev
	$(PYTEST) -n $$(( $(WORKERS) + 1 )) --dist loadgroup -m "(slow or cluster) and not gpu"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-bundle: $(VENV)/.installed
	$(BIN)/python .ci/gpu_wheels.py

# The machine's own Python, which has torch for CUDA.
gpu-check:
	@$(GPU_PYTHON) .ci/gpu_check.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
