# Works on a machine that has only Python >= 3.11, make and a C library; the only network is the package index.
#
#   PYTHON       the interpreter that .venv is made with            make test PYTHON=/usr/local/bin/python3.11
#   PIP_ARGS     more options for pip, say an index of CPU builds   make demo PIP_ARGS='--extra-index-url URL'
#   PYTEST_ARGS  more options for pytest                            make test PYTEST_ARGS='-k svd -x'
#   JOBS         processes that share the tests; 0: none beside     make test JOBS=0

PYTHON ?= $(shell for p in python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Read by mypy only: where Python finds them, `import tensorrt` gives an empty package.
STUBS := $(VENV)/stubs
DATA := build/demo

# Two BLAS threads on a busy machine of two cores are four times slower than one.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# Models come from packages and classifiers from a package: neither is asked for over the network.
export HF_HUB_OFFLINE ?= 1
export VALIDATE_PYPROJECT_NO_NETWORK ?= 1

# Bytecode is made when a module is first imported, not for all of torch: that halves the time of the install.
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --no-compile --quiet --constraint constraints.txt $(PIP_ARGS)
# First on the command line, at the pinned version: an open torch requirement pulls gigabytes of CUDA packages.
TORCH := $(shell grep -m1 '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all check format build clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environment: two stamps, so that the demo need not wait for the developers' tools -------------------------------

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: make ... PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) $(TORCH) hatchling
	$(INSTALL) $(TORCH) --no-build-isolation --editable '.[cpu,torch]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt .ci/stubs.sed | $(BIN)/python
	$(INSTALL) $(TORCH) hatchling setuptools
	$(INSTALL) $(TORCH) --no-build-isolation --editable '.[cpu,torch,tensorrt-rtx,dev]'
	$(INSTALL) --upgrade --no-deps --target $(STUBS) tensorrt-stubs==10.13.0.35.1
	sed -E -i -f .ci/stubs.sed $(STUBS)/tensorrt_bindings/tensorrt.pyi
	@touch $(VENV)/.installed $@

# --- what there is to see --------------------------------------------------------------------------------------------

demo: $(VENV)/.installed  ## set up, compile all-MiniLM-L6-v2, verify it, print the table; leaves demo-out/
	$(BIN)/python models/minilm.py -o $(DATA) --cache build/cache --size 128
	$(BIN)/lrcompile compile $(DATA)/model.onnx -o demo-out --force --target ort-cpu \
		--data $(DATA)/calib.npz --verify-data $(DATA)/heldout_other.npz --keep 0.9

# --- what must hold --------------------------------------------------------------------------------------------------

check: $(VENV)/.installed-dev  ## set up and run the static checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/towncrier build --draft --version next >/dev/null

test: check  ## set up, run every check and the fast tests
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(JOBS) $(PYTEST_ARGS)

test-all: check  ## the same with the slow tests (SmolLM2, the 1.6 GB model)
	$(BIN)/python -m pytest -m "not gpu" -n $(JOBS) $(PYTEST_ARGS)

# --- what a developer needs now and then -----------------------------------------------------------------------------

format: $(VENV)/.installed-dev  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/.installed-dev  ## sdist and wheel, in build/dist
	$(BIN)/pyproject-build --no-isolation --outdir build/dist

clean:  ## remove what was built; .venv stays
	rm -rf build demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)
