# make sweep          the embedded sweep: two tiny pretrained Llamas × their datasets, no network
# make test           lint, types and all tests but the slow ones, in parallel
# make test-gpu-compile  every kernel compiled for every card; CI runs it after `make test`
# make test-slow      all slow tests: those, and the largest models planned for their cards
# make test-peers     round trips through transformers, PEFT, bitsandbytes and llama.cpp, in .venv-peers
#
# Each creates its environment if there is none. PYTHON=python3.12 chooses the interpreter of a new one.

PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
BIN := $(VENV)/bin
TESTS ?= tests
WORKERS ?= 2

export JAX_PLATFORMS ?= cpu

.PHONY: sweep test test-gpu-compile test-slow test-peers lint types pytest clean

sweep: $(VENV)/.installed
	$(BIN)/python -m experiments.sweep

test: lint types pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(TESTS)

test-gpu-compile:
	$(MAKE) test-slow TESTS=tests/gpu_compile

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(TESTS)

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest tests/peers

LLAMA_CPP := node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

# torch's own wheel, by version: unpinned it would bring gigabytes of CUDA. llama.cpp comes built, by
# npm; where there is none, its tests are skipped.
$(PEERS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet -e ".[test,peers]"
	npm install --silent --prefix $(PEERS) --ignore-scripts --omit=optional $(LLAMA_CPP) \
		|| echo "llama.cpp is not compared with: npm is missing, or failed"
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# The plugin that compiles for NVIDIA cards, of the same version as jax and without CUDA's libraries
# (140 MB instead of several GB), the assembler and disassembler that read its kernels, and the one
# for TPUs.
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	version=$$($(BIN)/python -c "import jax; print(jax.__version__)"); \
	$(BIN)/python -m pip install --quiet --no-deps \
		jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version libtpu \
		nvidia-cuda-nvcc nvidia-cuda-nvdisasm
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) runs .pytest_cache .ruff_cache .mypy_cache
