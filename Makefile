# One virtual environment, .venv, serves every target; each target builds what it needs.
#   make demo   train a small network with a Lipschitz margin, certify it, write demo/
#   make test   lint, types, Python tests, C++ tests
#   make cuda   rebuild the extension with the CUDA kernels; needs nvcc, a few minutes on two cores
# Needs Python >= 3.10 with venv, a C++20 compiler, and a package index that pip can reach.
# For another build of torch: make TORCH="torch==2.13.0 --index-url <url>".

PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= demo
PYTEST_ARGS ?= --numprocesses 2
BENCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
SOURCES := $(shell find csrc kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu')
C_FILES := $(shell find csrc tests/csrc -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu')
# The stamp's name carries the request, so that another TORCH installs again.
TORCH_STAMP := $(VENV)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1).stamp
STAMP := $(VENV)/lmtfast.stamp

.DEFAULT_GOAL := test
.NOTPARALLEL:
.PHONY: demo test install cuda lint types pytest ctest slow bench wheel format clean

demo: install
	$(BIN)/lmtfast demo --out $(OUT)

test: lint types ctest pytest

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python >= 3.10 is needed; say which: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# torch comes first and by itself, so that nothing else chooses its version or its index.
$(TORCH_STAMP): | $(BIN)/python
	$(PIP) $(TORCH)
	@rm -f $(VENV)/torch-*.stamp
	@touch $@

# pip builds lmtfast._C in an isolated environment (setuptools, pybind11, cmake, ninja; never torch).
$(STAMP): $(TORCH_STAMP) pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	PYTHONWARNINGS=ignore $(PIP) --editable '.[attack,cli,plot,demo,dev]'
	@touch $@

# Every other target leaves the CUDA kernels out: they take minutes.
cuda: install
	CMAKE_ARGS=-DLMTFAST_CUDA=ON PYTHONWARNINGS=ignore $(PIP) --no-deps --editable .

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

types: install
	$(BIN)/python -m mypy

# -ra (pyproject.toml) prints why a test was skipped.
pytest: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

slow: install
	$(BIN)/python -m pytest --slow -m slow $(PYTEST_ARGS)

# A few minutes on a quiet machine; BENCH_ARGS="--suite quick" shows in seconds that it runs.
bench: install
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

# The compiled core without Python, and the CUDA kernels compiled for the CPU, which pytest uses.
ctest: install
	$(BIN)/cmake -S . -B build/ctest -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_BUILD_TYPE=Release --log-level=WARNING -DLMTFAST_EMULATED_PYTHON=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/ctest
	$(BIN)/ctest --test-dir build/ctest --output-on-failure

wheel: install
	$(BIN)/python -m build --wheel

format: install
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(C_FILES)

clean:
	rm -rf build dist demo lmtfast.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f lmtfast/_C*.so
	rm -f $(STAMP)
