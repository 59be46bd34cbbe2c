# `make test` and `make demo` set up everything they need in .venv on first use, and redo what is out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch's builder looks for ninja on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start many processes, each of which would compile refdet anew.
unexport PYTHONDONTWRITEBYTECODE

KERNELS := $(wildcard csrc/*.cpp csrc/*/*)
CUDA_SOURCES := $(wildcard csrc/*/*.cu)
OP_TESTS := tests/ops tests/detector/test_packed_layers.py
PACKAGE := setup.py setup.cfg pyproject.toml $(KERNELS)

.DEFAULT_GOAL := help
.PHONY: help env demo check test lint types cuda-check unit test-asan test-hostile test-browser bench-ops bench-data bench-browse bench-extract bench-pipeline bench-scaling bench-train bench-learning gpu-check gpu-pack parity docs clean
.DELETE_ON_ERROR:

help: ## list the targets
	@echo "make TARGET   (PYTHON=python3.12 selects the Python of .venv)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(VENV)/.installed ## set up .venv with torch, torchvision, refdet and its compiled kernels

demo: env ## run the whole pipeline on a synthetic dataset, into demo/
	@echo "==> demo: replacing demo/, then build-split, audit, train, evaluate, extract, evaluate on REFER"
	@rm -rf demo
	@$(BIN)/refdet demo --out demo

check: lint types ## run linting, type checks and the fast tests, in a minute or two
	@echo "==> check: pytest without the slow tests, $(JOBS) processes"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow"

test: lint types cuda-check unit ## run linting, type checks, CUDA compilation (if nvcc is found) and all tests
	@echo "==> test: all passed"

lint: env
	@echo "==> lint: ruff check, ruff format"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> lint: import layers"
	@$(BIN)/lint-imports --no-logo --no-cache

types: env
	@echo "==> types: mypy"
	@MYPY_NUM_WORKERS=$(JOBS) $(BIN)/mypy refdet refer cli

# One process per core, each with a single thread.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# The order is that of tests/conftest.py, and not by the number of tests in a file.
unit: env
	@echo "==> unit: pytest, $(JOBS) processes"
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The sanitizers must be loaded before Python, together with the C++ library whose exceptions they intercept.
ASAN := build/asan/lib
test-asan: env ## test the compiled kernels with the address and undefined-behavior sanitizers
	@echo "==> test-asan: building the kernels with sanitizers into $(ASAN)"
	@REFDET_SANITIZE=1 REFDET_REQUIRE_EXT=1 REFDET_BUILD_CUDA=0 \
	  $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib $(ASAN) >/dev/null
	@echo "==> test-asan: pytest"
	@libraries="$$(for name in asan stdc++; do $${CXX:-c++} -print-file-name=lib$$name.so; done)"; \
	  LD_PRELOAD="$$(echo $$libraries)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH="$(CURDIR)/$(ASAN)" $(BIN)/pytest --capture=sys $(OP_TESTS)

FUZZ_SECONDS ?= 120
FUZZ_INPUTS ?=
test-hostile: env ## fuzz the readers of all file formats, FUZZ_SECONDS (default 120) or FUZZ_INPUTS per format
	@echo "==> test-hostile: $(if $(FUZZ_INPUTS),$(FUZZ_INPUTS) inputs,$(FUZZ_SECONDS) s) per format, $(JOBS) processes"
	@REFDET_FUZZ_SECONDS=$(FUZZ_SECONDS) REFDET_FUZZ_INPUTS=$(FUZZ_INPUTS) OMP_NUM_THREADS=1 \
	  $(BIN)/pytest -n $(JOBS) tests/fuzz

test-browser: env ## test refdet browse and the report in chromium, with playwright; SCREENSHOTS=docs/images takes pictures
	@$(BIN)/python -c 'import playwright, axe_playwright_python' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet playwright axe-playwright-python
	@echo "==> test-browser: pytest"
	@REFDET_SCREENSHOTS="$(SCREENSHOTS)" $(BIN)/pytest -rs tests/report/browse/test_browser.py tests/report/browse/test_browser_states.py tests/report/test_report_browser.py

bench-ops: env ## benchmark the kernels, compared with torchvision and pycocotools (JSON=1 for JSON)
	@$(BIN)/python benchmarks/ops.py $(if $(JSON),--json)

bench-data: env ## benchmark loading and splitting full-size files
	@echo "==> bench-data: REFER"
	@$(BIN)/python benchmarks/refer_load.py
	@echo "==> bench-data: build-split"
	@$(BIN)/python benchmarks/build_split.py
	@echo "==> bench-data: the store"
	@$(BIN)/python benchmarks/store.py
	@echo "==> bench-data: memory of extract-features"
	@$(BIN)/python benchmarks/memory.py

bench-browse: env ## benchmark refdet browse on a store of 28,000 images (JSON=1 for JSON)
	@$(BIN)/python benchmarks/browse.py $(if $(JSON),--json)

bench-extract: env ## benchmark extract-features, compared with torchvision's detection modules
	@echo "==> bench-extract: synthetic images"
	@$(BIN)/python benchmarks/extract.py

bench-train: env ## benchmark a training step, compared with torchvision's Mask R-CNN (JSON=1 for JSON)
	@echo "==> bench-train: synthetic images"
	@$(BIN)/python benchmarks/train.py $(if $(JSON),--json)

# RESULTS=FILE keeps finished trainings, so that they can be spread over several runs.
bench-learning: env ## compare AP with torchvision after 300 steps, three seeds, in 90 minutes (SHORT=1: one seed of a narrow network, in 5)
	@echo "==> bench-learning: the embedded dataset"
	@$(BIN)/python benchmarks/learning.py $(if $(SHORT),--seeds 0 --small) $(if $(RESULTS),--results $(RESULTS)) $(if $(JSON),--json)
	@$(if $(SHORT),true,echo "==> bench-learning: overfitting real images")
	@$(if $(SHORT),true,$(BIN)/python benchmarks/overfit.py $(if $(JSON),--json))

bench-pipeline: env ## benchmark everything after the detector: shards, merging, the store (JSON=1 for JSON)
	@$(BIN)/python benchmarks/pipeline.py $(if $(JSON),--json)

bench-scaling: env ## benchmark many workers with simulated detectors, extrapolated to 64 GPUs (JSON=1 for JSON)
	@$(BIN)/python benchmarks/scaling.py $(if $(JSON),--json)

# A short-lived GPU machine may have a Python with torch but no network: `make gpu-check PYTHON=python3` uses that
# Python as is. Otherwise .venv is used, and set up first.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
gpu-check gpu-pack: env
endif
DEVICE ?= cuda
OUT ?= build/gpu-check
gpu-check: ## test and benchmark everything on a GPU, in 9 minutes (DEVICE=cpu rehearses, ONLY="STEP ..." selects)
	@$(GPU_PYTHON) benchmarks/gpu/check.py --device $(DEVICE) --out "$(OUT)" $(if $(ONLY),--only $(ONLY))

gpu-pack: ## download the wheels that a GPU machine without a network may lack, into build/gpu-pack
	@$(GPU_PYTHON) benchmarks/gpu/pack.py

parity: env ## compare with the reference, detectron2 (if their golden files are next to the repository) and torchvision
	@echo "==> parity: comparing with outputs of the reference's, detectron2's and torchvision's own code, in minutes"
	@REFDET_THOROUGH=1 $(BIN)/pytest -rP -m slow $(addprefix tests/detector/test_,$(addsuffix _parity.py,reference detectron2 torchvision))

ifneq ($(shell command -v nvcc),)
cuda-check: $(CUDA_SOURCES:csrc/%.cu=build/cuda-check/%.o)
else
cuda-check:
	@echo "==> cuda-check: nvcc not found, skipping csrc/*/*.cu"
endif

# The C++ standard that torch's builder uses (c++17 in 2.11, c++20 later), and torch's include paths.
TORCH_FLAGS = $(BIN)/python -c 'import inspect, re; from torch.utils import cpp_extension as e; \
  print("-std=" + re.search(r"\x27(c\+\+\d+)\x27", inspect.getsource(e))[1], *("-I" + i for i in e.include_paths()))' 2>/dev/null

build/cuda-check/%.o: csrc/%.cu $(wildcard csrc/*/*.h csrc/*/*.cuh) $(VENV)/.torch | env
	@echo "==> cuda-check: compiling $< with nvcc (about a minute)"
	@mkdir -p $(@D)
	@nvcc -Icsrc -O3 -arch=sm_90 --expt-relaxed-constexpr -Xcompiler -fopenmp -c $< -o $@ $$($(TORCH_FLAGS))

$(VENV)/.torch:
	@echo "==> env 1/3: creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: refdet needs Python 3.10 or newer; choose one with make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo "==> env 2/3: installing torch and torchvision (gigabytes, takes a few minutes)"
	@$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel ninja "torch>=2.11" "torchvision>=0.26"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(PACKAGE)
	@echo "==> env 3/3: installing refdet (editable) with its kernels and the development tools"
	@if command -v $${CXX:-c++} >/dev/null; then export REFDET_REQUIRE_EXT=1; \
	  else echo "==> env: no C++ compiler found, installing without the kernels (same results, slower)"; fi; \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

docs: env ## build docs/ and the API reference into build/docs/
	@echo "==> docs: mkdocs"
	@$(BIN)/python -c 'import mkdocs, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install --quiet "mkdocs" "mkdocstrings[python]"
	@$(BIN)/mkdocs build --quiet --strict --site-dir build/docs

clean: ## remove build outputs and demo/; keep .venv
	@echo "==> clean: removing build/, dist/, demo/, caches and the compiled kernels"
	@rm -rf build dist demo *.egg-info refdet/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.installed
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
