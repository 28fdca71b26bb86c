# make demo   sets everything up and runs the main job: solve, launch 16 local ranks, verify
# make test   sets everything up and runs the tests; make test-all those that take their time, too
# make lint   ruff and mypy;  make format  rewrites
#
# PYTHON is any Python 3.11 or newer. TORCH is what pip installs for the runtime; on a machine
# without a GPU the CPU build is much smaller:
#   make demo TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO ?= build/demo
# Few at a time: some tests start 16 ranks.
SIDE_BY_SIDE := -q -n auto --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint format clean

demo: $(READY)
	@mkdir -p $(DEMO)
	$(BIN)/epplan solve --topology dgx-h100-2 --model reference --scale 0.03125 --ep 16 \
		--experts-per-gpu 1 --load lognormal:1,1 -o $(DEMO)/plan.json
	$(BIN)/epplan launch $(DEMO)/plan.json --to local

test: $(READY)
	$(BIN)/pytest $(SIDE_BY_SIDE)

test-all: $(READY)
	$(BIN)/pytest $(SIDE_BY_SIDE) --slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "epplan needs Python 3.11 or newer: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[runtime,metrics]' --group dev
	@touch $@

clean:
	rm -rf $(VENV) build epplan.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
