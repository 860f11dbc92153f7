# demo and test set everything up in .venv first; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BUILD_INPUTS := pyproject.toml setup.py _build_backend.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
GPU_RESULTS := bench/results/gpu
CPU_RESULTS := bench/results/cpu
RUNS ?= 5

.PHONY: help demo test bench lint format gpu-check clean

help:
	@echo "make demo       train a Ladder network on real digits and compare it with the plain network"
	@echo "make test       run all tests"
	@echo "make bench      measure the kernels and write $(CPU_RESULTS).md and the README's table (RUNS=$(RUNS) processes)"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make format     let ruff and clang-format rewrite the sources"
	@echo "make gpu-check  on a machine with an NVIDIA GPU: build for it, run its tests and benchmarks"
	@echo "make clean      remove .venv and everything built"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The build requirements come first: the extension is then built against this torch, without isolation.
$(VENV)/.build: $(BUILD_INPUTS) | $(BIN)/python
	$(PIP) torch setuptools wheel pybind11 ninja numpy
	@touch $@

$(VENV)/.train: $(VENV)/.build
	$(PIP) --no-build-isolation --editable ".[train]"
	@touch $@

$(VENV)/.test: $(VENV)/.build
	$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@ $(VENV)/.train

$(VENV)/.lint: $(VENV)/.test
	$(PIP) ruff mypy clang-format
	@touch $@

demo: $(VENV)/.train
	$(BIN)/ladderfast train digits --compare digits_baseline --out runs/demo --overwrite

test: $(VENV)/.test
	$(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest bench -k "not compile"

# Figures differ from process to process, by where memory lies and what else a machine does: hence several.
bench: $(VENV)/.test
	@mkdir -p bench/results && rm -f $(CPU_RESULTS)-*.json
	for run in $$(seq $(RUNS)); do \
	  $(BIN)/python -m pytest bench --benchmark-enable --benchmark-json=$(CPU_RESULTS)-$$run.json || exit 1; \
	done
	$(BIN)/python bench/table.py $(CPU_RESULTS)-*.json --out $(CPU_RESULTS).md --readme README.md

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

# Uses the Python it finds and what is installed there: such machines come with their own CUDA build of torch.
gpu-check:
	LADDERFAST_CUDA=1 $(PYTHON) -m pip install --no-build-isolation --no-deps --editable .
	$(PYTHON) -m ladderfast.info
	@mkdir -p bench/results
	$(PYTHON) -m pytest tests/ops tests/training tests/test_devices.py -m gpu
	$(PYTHON) -m pytest bench -k cuda --benchmark-enable --benchmark-json=$(GPU_RESULTS).json
	$(PYTHON) bench/table.py $(GPU_RESULTS).json --out $(GPU_RESULTS).md

clean:
	rm -rf $(VENV) build dist *.egg-info ladderfast/_C.*.so ladderfast/_autograd.*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
