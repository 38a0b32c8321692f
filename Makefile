# `make run` and `make test` do all their set-up on a fresh machine: Python 3.11 or later with venv is enough.
# A CUDA toolkit (nvcc) is used where there is one.
#
#   make run         the demo: thinking with and without early exit, side by side
#   make test        lint, and the tests that take seconds each
#   make test-full   every test
#   make lint        ruff and mypy
#   make bench       every benchmark on this machine; on a CPU in tiny shapes, which say nothing of a GPU
#   make bench-full  every cell of every benchmark, for a GPU: hours
#   make aot         the kernels as compiled for GPUs that need not be here: registers, spills; aot-full: all variants
#   make gpu         on a machine with an NVIDIA GPU: build, test, measure (benchmarks/README.md)
#   make results     benchmarks/RESULTS.md from what `make gpu` has written
#   make clean       remove what was built, and the virtual environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -P -m pytest --numprocesses auto --maxprocesses 4
INSTALLED := $(VENV)/.installed
BENCHMARKS := step scaling tree_attention draft_head step_ops end_to_end

.PHONY: run test test-full lint bench bench-full aot aot-full gpu results clean
.DELETE_ON_ERROR:

run: $(INSTALLED)
	$(BIN)/specexit demo

test: export OMP_NUM_THREADS = 1
test: lint
	$(PYTEST)

test-full: export OMP_NUM_THREADS = 1
test-full: lint
	$(PYTEST) -m ""

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# One that fails does not stop the others.
bench bench-full: $(INSTALLED)
	@status=0; for name in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/bench_$$name.py $(if $(filter bench-full,$@),--all) || status=1; \
	done; exit $$status

aot: $(INSTALLED)
	$(BIN)/python benchmarks/aot_native.py
	$(BIN)/python benchmarks/aot.py

aot-full: $(INSTALLED)
	$(BIN)/python benchmarks/aot.py --full

# The system's Python, which has torch for this GPU already; nothing is installed or downloaded.
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(PARTS),--parts $(PARTS)) $(if $(RESUME),--resume) $(if $(COMMIT),--commit $(COMMIT))

results: $(INSTALLED)
	$(BIN)/python benchmarks/results_page.py

clean:
	rm -rf $(VENV) build dist *.egg-info specexit_kernels/_C.*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The package is built in this environment, with its pinned build tools: an isolated build would download them again.
$(INSTALLED): pyproject.toml setup.py CMakeLists.txt specexit_kernels/_version.py $(wildcard requirements/*) $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --requirement requirements/dev.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --quiet --requirement requirements/triton.txt
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --quiet --no-build-isolation --editable .
	$(BIN)/python -c 'from specexit_kernels import native; print(native.absent() or "the native module is built")'
	@touch $@
