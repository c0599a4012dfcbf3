# Needs Python 3.10 or later (with venv) and make; everything else is installed into .venv.
#   make demo    a video transformer, dense and sparse, side by side
#   make test    lint, types and the test suite, without what is slow
#   make slow    the slow tests: several processes, the interpreter of GPU kernels, the newest Triton
#   make lint    ruff and mypy alone
#   make sanitize   the tests of native code under the address, undefined-behaviour and thread sanitizers
#   make neon    native code for ARM under an emulator, against what it gives here
#   make bench   the CPU benchmarks; results in bench/results/
#   make bench-gpu   on a machine with a CUDA device: kernels against dense attention and the peers

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := diffusers,plots,quality
# What tests need besides, in the same place.
TEST_STAMP  := $(VENV)/.installed-for-tests
TEST_EXTRAS := $(EXTRAS),test,compose
# Models in tests and demo are built from configurations: nothing is to be fetched at run time.
RUN    := HF_HUB_OFFLINE=1 $(BIN)/python

# Tests run in as many processes as there are cores, each with its share of threads (tests/conftest.py).
PYTEST := $(RUN) -m pytest -n auto --dist worksteal

# Kernels are checked with the pinned Triton and with this one, which is installed beside it and not into .venv.
NEWEST_TRITON := 3.9.0
NEWEST_STAMP  := .triton-newest/.installed-$(NEWEST_TRITON)

.PHONY: demo test slow lint types unit newest-triton sanitize neon bench bench-gpu install clean
.DEFAULT_GOAL := test

# Installed once, and again when what is to be installed has changed. The demo needs nothing of the tests.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or later is needed; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]' --constraint constraints.txt
	@touch $(STAMP)

$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[$(TEST_EXTRAS)]' --constraint constraints.txt
	@touch $(TEST_STAMP)

install: $(TEST_STAMP)

demo: $(STAMP)
	$(RUN) -m svg2_compile.cli demo

test: lint
	$(PYTEST) -m "not slow"

slow: newest-triton
	$(PYTEST) -m slow

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST_STAMP)
	$(BIN)/python .ci/typecheck.py

$(NEWEST_STAMP): $(TEST_STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .triton-newest triton==$(NEWEST_TRITON)
	@touch $@

ifeq ($(shell uname -s),Linux)
newest-triton: $(NEWEST_STAMP)
	PYTHONPATH=.triton-newest $(PYTEST) tests/kernels/triton/test_resources.py \
		tests/kernels/triton/test_rehearsal.py tests/kernels/triton/test_interpreted.py
else
newest-triton:
	@echo "Triton is on PyPI for Linux only: its kernels are not checked here"
endif

# Each with a library of its own; Python is not instrumented, so that the sanitizer is loaded before it.
CXX ?= g++
PRELOAD = $(foreach library,$(1) libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))
NATIVE_TESTS := native and not random and not processes and not dtypes

sanitize: $(TEST_STAMP)
	SVG2_NATIVE_FLAGS="-g -fsanitize=address -fsanitize=undefined -fno-sanitize-recover=undefined" \
		LD_PRELOAD="$(call PRELOAD,libasan.so libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest -q tests/kernels/cpu -k "$(NATIVE_TESTS)"
	SVG2_NATIVE_FLAGS="-g -fsanitize=thread" LD_PRELOAD="$(call PRELOAD,libtsan.so)" \
		TSAN_OPTIONS=halt_on_error=1:suppressions=$(CURDIR)/.ci/tsan-suppressions.txt \
		$(BIN)/python -m tests.kernels.cpu.exercise_threads

# Compiled for NEON and run under an emulator (Debian: g++-aarch64-linux-gnu, qemu-user), against this machine's results.
neon: $(TEST_STAMP)
	$(BIN)/python -m tests.kernels.cpu.emulated

unit: $(TEST_STAMP)
	$(PYTEST)

bench: $(TEST_STAMP)
	$(RUN) -m bench

bench-gpu: $(STAMP)
	$(RUN) -m bench.gpu

clean:
	rm -rf $(VENV) .triton-newest .typecheck build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
