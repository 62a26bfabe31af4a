# Every target that needs the environment makes it first, so `make demo` and `make test` are
# enough on a fresh machine: python3 (3.11 or newer, with venv), make and a network are assumed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
MOEPACK := $(VENV)/bin/moepack

# A machine without a network: its own Python with what is installed there, and no .venv, as in
# make -k test-gpu bench-gpu OWN_PYTHON=python3 (docs/gpu/README.md says what must be there).
OWN_PYTHON ?=
ifneq ($(OWN_PYTHON),)
SOURCES := $(CURDIR):$(CURDIR)/runtime:$(CURDIR)/formats
PY := PYTHONPATH="$(SOURCES)$${PYTHONPATH:+:$$PYTHONPATH}" $(OWN_PYTHON)
STAMP := own-python
MOEPACK := $(PY) -m moepack
endif

# The environment's own cmake where there is one: the machine need not have any.
CMAKE := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake
NATIVE := runtime/moepack_runtime/_native/libmoepack_native.$(if $(filter Darwin,$(shell uname)),dylib,so)
NATIVE_SOURCES := CMakeLists.txt $(wildcard runtime/csrc/*)
BUILD_NATIVE = $(CMAKE) -S . -B build/native && $(CMAKE) --build build/native --parallel
ifneq ($(OWN_PYTHON),)
# Where there may be no cmake: the compiler alone.
BUILD_NATIVE = sh runtime/build_native.sh $(NATIVE)
endif

TINY := tests/assets/tiny-moe
DEMO_PACK := build/demo/tiny-moe-pack
# A part of the 48 experts, so that records really stream in.
DEMO_SLOTS ?= 20
PROMPT ?= And the king said unto

# What `make bench-convert` converts; SHAPE=olmoe-1b-7b LAYERS=16 is the whole 13.8 GB model.
SHAPE ?= olmoe-1b-7b
LAYERS ?= 2

# More options for pytest, e.g. TESTFLAGS="-k journal".
TESTFLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup native test-native test-neon demo test test-slow test-explore test-gpu check bench bench-gpu \
	bench-convert bench-memory quality docs-cli clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) $(NATIVE)  ## create .venv and install moepack and the development tools in it

ifneq ($(OWN_PYTHON),)
.PHONY: own-python
own-python:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moepack needs Python 3.11 or newer" >&2; exit 1; }
	@$(PY) -c 'import hypothesis, numpy, pytest, pytest_timeout, safetensors, torch, transformers, triton, \
		wrapt, xdist, xxhash, zstandard' || { echo "OWN_PYTHON lacks what docs/gpu/README.md names" >&2; exit 1; }
else
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moepack needs Python 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) (about a minute; the log is build/setup.log)" >&2
	@mkdir -p build
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
# hqq's setup.py compiles CUDA kernels unless told not to; nothing here uses them.
	@DISABLE_CUDA=1 $(PY) -m pip install --disable-pip-version-check -c constraints.txt \
		-e '.[dev]' >build/setup.log 2>&1 || \
		{ tail -n 40 build/setup.log >&2; echo "setup failed: see build/setup.log" >&2; exit 1; }
	@touch $@
endif

# Without a compiler it stays absent, and is tried again.
$(NATIVE): $(NATIVE_SOURCES) | $(STAMP)
	@$(MAKE) --no-print-directory native

native:  ## build the native kernels into the source tree (MOEPACK_REQUIRE_NATIVE=1: or fail)
	@mkdir -p build
	@{ $(BUILD_NATIVE) && touch $(NATIVE); } >build/native.log 2>&1 || \
		{ tail -n 20 build/native.log >&2; \
		echo "no native kernels: see build/native.log; packs will run on torch, slowly" >&2; \
		test -z "$(MOEPACK_REQUIRE_NATIVE)"; }

test-native: $(STAMP)  ## run the kernels' tests under the address and undefined behaviour sanitizers
	@mkdir -p build
	@{ $(CMAKE) -S . -B build/sanitized -DMOEPACK_SANITIZE=ON && \
		$(CMAKE) --build build/sanitized --parallel --target all isa_parity; } \
		>build/sanitized.log 2>&1 || \
		{ tail -n 40 build/sanitized.log >&2; exit 1; }
	@build/sanitized/isa_parity
# Python's own allocations at exit are not what is tested, hence no leak detection.
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
		MOEPACK_NATIVE_LIBRARY=$(CURDIR)/build/sanitized/runtime/csrc/libmoepack_native.so \
		$(PY) -m pytest -q -p no:cacheprovider -k 'not every_family or olmoe' \
		--ignore tests/runtime/kernels/triton_gpu \
		tests/moepack/quant/test_native_solver.py tests/runtime/kernels \
		tests/runtime/tape/test_tape.py tests/runtime/tape/test_tape_kv.py \
		tests/runtime/tape/test_tape_overlap.py tests/runtime/tape/test_tape_latent.py $(TESTFLAGS)

test-neon:  ## run the Arm kernels in an emulator (Debian: g++-aarch64-linux-gnu, qemu-user)
	@mkdir -p build
	@{ $(CMAKE) -S . -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ && \
		$(CMAKE) --build build/neon --parallel --target isa_parity; } >build/neon.log 2>&1 || \
		{ tail -n 40 build/neon.log >&2; exit 1; }
	@qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/isa_parity

demo: $(STAMP) $(NATIVE)  ## convert the small model in tests/assets and stream text from the pack
	@$(MOEPACK) convert $(TINY) $(DEMO_PACK) --attn-bits 4 --expert-bits 3 --force
	@printf '\n%s' "$(PROMPT)"
	@$(MOEPACK) generate $(DEMO_PACK) --prompt "$(PROMPT)" --greedy --max-new-tokens 80 \
		--slots $(DEMO_SLOTS)

test: $(STAMP) $(NATIVE)  ## run the tests (all but the slow ones and those that need a GPU)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m "not slow and not gpu" $(TESTFLAGS)

test-slow: $(STAMP) $(NATIVE)  ## run the slow tests
	@$(PY) -m pytest -q -m "slow and not gpu" $(TESTFLAGS)

test-explore: $(STAMP) $(NATIVE)  ## run the property tests on examples that no run before has seen
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m "hypothesis and not slow" \
		--hypothesis-profile explore $(TESTFLAGS)

test-gpu: $(STAMP) $(NATIVE)  ## run the tests that need a GPU, Triton's kernels among them
	@$(PY) tests/bench/gpu/need.py
	@TRITON_INTERPRET=0 $(PY) -m pytest -q -n auto --maxprocesses 8 -m "gpu and not slow" \
		tests/runtime/kernels/triton_gpu tests/runtime/gpu/test_cuda.py $(TESTFLAGS)

bench-gpu: $(STAMP) $(NATIVE)  ## measure this machine's GPU, into docs/gpu/REPORT-<gpu>.md
	@TRITON_INTERPRET=0 $(PY) -m tests.bench.gpu.report

check: $(STAMP)  ## lint, formatting, types and the direction of imports
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-logo

bench: $(STAMP) $(NATIVE)  ## decode and prefill speed, cache hits and recall of the demo pack, as JSON
	@test -f $(DEMO_PACK)/moepack.json || \
		$(MOEPACK) convert $(TINY) $(DEMO_PACK) --attn-bits 4 --expert-bits 3 --force >&2
	@$(MOEPACK) bench $(DEMO_PACK) --json

bench-convert: $(STAMP) $(NATIVE)  ## conversion speed and peak memory (SHAPE=, LAYERS=), as JSON
	@$(PY) tests/bench/convert_speed.py --shape $(SHAPE) --layers $(LAYERS)

# Folders and texts of your own: MODEL=path TEXT=held-out.txt CALIBRATE=other.txt
MODEL ?= $(TINY)
TEXT ?= tests/assets/text/tiny-moe-valid.txt
CALIBRATE ?= tests/assets/text/tiny-moe-valid.txt

quality: $(STAMP) $(NATIVE)  ## size against quality of a model's experts (MODEL=, TEXT=, CALIBRATE=)
	@$(PY) tests/bench/quality.py $(MODEL) --text $(TEXT) --calibrate $(CALIBRATE) $(QUALITYFLAGS)

bench-memory: $(STAMP) $(NATIVE)  ## a model larger than memory against llama.cpp (as root: under a real limit)
	@$(PY) tests/bench/memory.py $(MEMORYFLAGS)

docs-cli: $(STAMP)  ## write docs/cli.md from the command line's own help
	@$(PY) docs/generate_cli.py

clean:  ## remove build outputs and caches (the environment stays: rm -r .venv)
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find moepack runtime formats tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
