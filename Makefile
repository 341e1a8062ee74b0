# `make demo` compiles and runs the model in examples/picocode; `make test` is what CI runs.
# Another interpreter: make PYTHON=python3.13 test

PYTHON ?= python3.11
BIN := .venv/bin
# One place says which torch: the dev dependencies.
TORCH := $(shell grep -o -m 1 'torch==[0-9.]*' pyproject.toml)

.PHONY: demo test lint test-gpu clean

demo: .venv/default
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Where a GPU is, with a Python that has torch, Triton and pytest-xdist: nothing is installed, and no TVM is needed.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_TESTS ?= 8
test-gpu:
	@if [ -e /dev/nvidiactl ]; then \
	LLMC_TEST_GPU=1 $(GPU_PYTHON) -m pytest -o minversion=7 -W default -n $(GPU_TESTS) -m 'not static' \
	tests/backends/triton tests/e2e/test_gpu.py; \
	else echo "No CUDA device on this machine (/dev/nvidiactl is absent): the GPU tests were not run."; fi

clean:
	rm -rf .venv build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/default: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

# torch on its own and first: asked for together with transformers, pip may choose a newer one with all of CUDA.
.venv/dev: .venv/default
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
