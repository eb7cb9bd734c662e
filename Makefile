# make demo | test | asan | bench | bench-report | trl-1.12 | lint | wheel | clean
#
# Needs python3 (3.10 to 3.13), git and a package index; each target makes .venv first if need be.
# A C++ compiler and nvcc are used where they are found; what is missing is said, and survived.
#
#   make demo ARGS="--help"              arguments for `fastrlhf demo`
#   make test TEST_ARGS="-k gae -x"      arguments for pytest; WORKERS=4 for pytest-xdist
#   make bench ARGS="gae whiten"         arguments for `fastrlhf bench`
#   make PYTHON=python3.12 test          another Python for .venv

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
TEST_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILT := .venv/.built
INSTALLED := .venv/.installed
PEERS := .venv/.peers
TRL_1_12 := .venv/.trl-1.12
NATIVE := setup.py $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.py)
OPS := $(basename $(notdir $(wildcard kernels/fastrlhf_kernels/[a-z]*.py)))
ASAN_TESTS := $(OPS:%=tests/test_%.py) $(wildcard tests/test_linear_heads.py) tests/test_build.py \
  tests/test_decode_step.py tests/test_llama_block.py \
  tests/test_errors_table.py tests/test_traps.py tests/test_sanitizer.py
library = $(shell $${CXX:-c++} -print-file-name=$(1))
SAY_PARTS := import json; \
  parts = json.load(open("kernels/fastrlhf_kernels/_build_info.json")); \
  [print(f"fastrlhf: {name} part:", "built" if part["built"] else "NOT built: " + part["reason"]) \
   for name, part in parts.items()]

.PHONY: demo test asan bench bench-report trl-1.12 lint wheel clean

demo: $(BUILT)
	$(BIN)/fastrlhf demo $(ARGS)

test: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(TEST_ARGS)

# The op tests of the C++ kernels on a build of their own, under AddressSanitizer and UBSan. Python
# does not load their run-time library, so it is loaded first; leaks are not looked for, since
# neither Python nor torch frees everything at its end.
asan: $(INSTALLED)
	FASTRLHF_SANITIZE=address $(BIN)/python setup.py -q build --build-lib build/asan
	LD_PRELOAD="$(call library,libasan.so) $(call library,libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  PYTHONPATH=build/asan OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -m "not slow" -k "cpu or baseline or avx2 or avx512 or pool" \
	  -n $(WORKERS) --dist loadfile $(ASAN_TESTS) $(TEST_ARGS)

# Results and plots to bench/results/<machine>/, and from them the README's tables.
bench: $(BUILT) $(PEERS)
	$(BIN)/fastrlhf bench $(ARGS)

# The README's tables again; ARGS=--check says whether they are up to date.
bench-report: $(INSTALLED)
	$(BIN)/python bench/report.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A wheel with the CPU core, for machines of this platform that have no compiler.
wheel: $(INSTALLED)
	$(PIP) wheel . --no-deps --no-build-isolation --wheel-dir dist

clean:
	rm -rf build dist *.egg-info kernels/fastrlhf_kernels/*.so \
	  kernels/fastrlhf_kernels/_build_info.json $(BUILT)

# torch goes first: it is the long download, and what follows then agrees with it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt setuptools wheel pybind11 ninja
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[train,test]"
	touch $@ $(BUILT)
	@$(BIN)/python -c '$(SAY_PARTS)'

# What benchmarks compare with; rows of a peer that cannot be had say so.
$(PEERS): $(INSTALLED)
	-$(PIP) install -c constraints.txt -e ".[bench]" --no-build-isolation && touch $@

# TRL's last release with a PPO trainer wants an environment of its own, with torch as it is here;
# bench/bench_ppo.py compares with it.
trl-1.12: $(TRL_1_12)/.installed

$(TRL_1_12)/.installed: $(INSTALLED)
	test -x $(TRL_1_12)/bin/python || $(BIN)/python -m venv $(TRL_1_12)
	grep -v "^trl==" constraints.txt > $(TRL_1_12)/constraints.txt
	$(TRL_1_12)/bin/python -m pip --disable-pip-version-check install \
	  -c $(TRL_1_12)/constraints.txt torch
	$(TRL_1_12)/bin/python -m pip --disable-pip-version-check install \
	  -c $(TRL_1_12)/constraints.txt trl==1.12.0
	touch $@

# The extensions again, after a change to their sources alone.
$(BUILT): $(INSTALLED) $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
	@$(BIN)/python -c '$(SAY_PARTS)'
