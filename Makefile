# make demo    the main job on a small checkpoint: inspect, convert, load, run, compare, export
# make test    lint and the test suite (no torch needed)
# make kernels the Hopper kernels without a GPU: interpreted, compiled for an abstract H100, their PTX run
# make parity  live comparison with transformers (Python 3.11, torch on the CPU)
# make newest  the Hopper kernels once more, with the newest JAX that is known to work
# make extended  further cases of what these prove: hours
# make bench   CPU speed beside transformers
# Each makes the environment that it needs.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

export JAX_PLATFORMS ?= cpu
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

# The first of these interpreters that starts. A version manager's shim may exist and still not start.
works = $(shell for p in $(1); do "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo "$$p" && break; done)
PYTHON ?= $(call works,python3.12 python3.11 python3.13 python3)
PYTHON_311 ?= $(call works,python3.11)

# What pip takes on Python 3.12 where nobody says another; all else is as in constraints.txt.
NEWEST_JAX = 0.12.0.1

.PHONY: help demo test kernels newest lint parity extended bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed, none was found" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[plan,test]"
	touch $@

.venv-parity/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON_311)" || { echo "live parity needs Python 3.11, none was found" >&2; exit 1; }
	"$(PYTHON_311)" -m venv --clear .venv-parity
	.venv-parity/bin/python -m pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	.venv-parity/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[test,parity]"
	touch $@

.venv-newest/ready: pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.12 with venv is needed, none was found" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear .venv-newest
	sed 's/^\(jax\|jaxlib\|jax-cuda13-[a-z]*\)==.*>=.*/\1==$(NEWEST_JAX)/' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --no-compile --constraint .venv-newest/constraints.txt --editable ".[plan,test]"
	touch $@

demo: .venv/ready
	.venv/bin/python -m experiments.demo

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# For the CPU, code of less quality in half the time: LLVM does not optimise, a module is compiled in one piece, and
# fusions are not MLIR first. XLA's passes, which decide the order of operations, are the same, and so are kernels for
# GPUs. Parity and demo compile as users do.
test kernels newest: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 \
	--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true

# A file goes to one worker, which compiles for all of its tests; files begin in the order of tests/conftest.py.
WORKERS = --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint
	.venv/bin/python -m pytest -m "not extended" --ignore tests/parity --ignore tests/kernels_h100 \
		--ignore tests/kernels_ptx --ignore-glob '*_mosaic.py' $(WORKERS)

KERNEL_TESTS = tests/kernels_h100 tests/kernels_ptx tests/pallas_kernels/test_*_mosaic.py
kernels: .venv/ready
	.venv/bin/python -m pytest -m "not extended" $(KERNEL_TESTS) $(WORKERS)

newest: .venv-newest/ready
	.venv-newest/bin/python -m pytest -m "not extended" $(KERNEL_TESTS) $(WORKERS)

parity: .venv-parity/ready
	.venv-parity/bin/python -m pytest -m "not extended" tests/parity $(WORKERS)

extended: .venv/ready .venv-parity/ready
	.venv/bin/python -m pytest -m extended --ignore tests/parity $(WORKERS)
	.venv-parity/bin/python -m pytest -m extended tests/parity $(WORKERS)

bench: .venv/ready .venv-parity/ready
	.venv/bin/python -m experiments.bench_forward

clean:
	rm -rf .venv .venv-parity .venv-newest .pytest_cache .ruff_cache .hypothesis out
