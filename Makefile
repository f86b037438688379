# `make run` trains the smoke recipe, `make test` runs every check; both make .venv first (tools/setup.sh).
# Needs Python 3.11 or newer, make and a C++ compiler. Another interpreter: make PYTHON=/path/to/python3 run

PYTHON ?= python3
WORKERS ?= 2
PIECE ?=
BIN := .venv/bin
# Where this is set (containers often do) every process compiles torch's sources anew: 2.5 of the 6 CPU-seconds of its
# import. Here bytecode is kept, in .venv and in __pycache__ folders that git ignores.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help environment run test trackers nullgpu storm lint doctor bench tables docs gpu gpu-pack clean

help:
	@echo "make run       make .venv, then train the smoke recipe on synthetic images (no download)"
	@echo "make test      make .venv, then ruff, mypy and pytest (WORKERS=$(WORKERS) processes)"
	@echo "make trackers  the tests of Weights & Biases, MLflow and trackio, which it installs beside .venv"
	@echo "make nullgpu   every recipe's GPU path on a device that computes nothing: minutes, no GPU"
	@echo "make storm     thousands of damaged inputs against everything that is read, and one table"
	@echo "make doctor    say what works here, what is missing and its fix"
	@echo "make bench     run all benchmarks and put the results into benchmarks/results/"
	@echo "make tables    write the tables of README.md and benchmarks/README.md from those results"
	@echo "make docs      build the documentation site into site/, strictly"
	@echo "make gpu       on a machine with a GPU: tests, benchmarks and the ladder, in pieces (PIECE=K for one)"
	@echo "make gpu-pack  what a GPU machine without a network needs, in parts under 60 MB, into gpu-pack/"
	@echo "make clean     remove .venv and what tools left behind (not runs/ and not data/)"

environment:
	@PYTHON="$(PYTHON)" bash tools/setup.sh

run: environment
	$(BIN)/fastcifar run smoke

lint: environment
	$(BIN)/ruff check fastcifar tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread per process: two processes share two cores; tests that want more set it themselves. A file stays in one
# process, for its fixtures, and the longest files come first (tests/conftest.py has their order). A process that crashed
# is not replaced: pytest-xdist would hang with this order (its issues 784 and 1323); the others take its files.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Trackers are large and bind other packages' versions, so that no lock holds them: they lie in a folder of their own.
trackers: environment
	$$(command -v uv || echo $(BIN)/uv) pip install --quiet --python $(BIN)/python --target .cache/trackers wandb mlflow-skinny trackio
	PYTHONPATH=.cache/trackers OMP_NUM_THREADS=1 $(BIN)/pytest -q -p no:xdist tests/track

# The CUDA path without a GPU (tests/nullgpu): every recipe compiled, captured and replayed on a device that computes
# nothing. A small part of it is in `make test`.
nullgpu: environment
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m nullgpu -n $(WORKERS) --dist loadscope --max-worker-restart 0 tests/nullgpu

# STORM names subjects or options, such as STORM="recipes --seed 7"; without it every subject with its full count.
storm: environment
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.storm $(STORM)

doctor: environment
	$(BIN)/fastcifar doctor

bench: environment
	$(BIN)/fastcifar bench all

tables: environment
	$(BIN)/python -m tools.tables

docs: environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# No environment here: a GPU machine without a network brings its own Python, or unpacks gpu-pack/ first.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu.py $(if $(PIECE),--piece $(PIECE))

gpu-pack: environment
	$(BIN)/python tools/gpu_pack.py

clean:
	rm -rf .venv site .cache .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find fastcifar tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
