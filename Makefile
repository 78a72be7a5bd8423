# make quickstart   install, pre-train a tiny GPT-2, fine-tune it with TRAM on 2 ranks, print the table
# make test         install, run the tests
# make test-slow    install, run the slow ones: every recipe on 2 ranks, a real SLURM, kills, a browser
# make test-all     install, run all of them and the benchmarks' assertions, in one go
# make coverage     install, run the tests with every line counted that they reach
# make check        install, lint, format check, types, shellcheck of every generated script
# Needs: Python 3.11 or newer with venv, make, gcc and g++ (DeepSpeed compiles one small operator at its first start).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
PYTEST_FLAGS ?=

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
# Of this checkout alone: a build that was killed elsewhere leaves a lock that every start waits for without end.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

# Two workers, whole files each (tests/conftest.py); PYTEST_FLAGS="-n 0" for one process.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: venv operator quickstart test test-slow test-all coverage check format bench clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

# DeepSpeed's operator once, before two workers ask for it; begun afresh where a build did not end.
operator: $(VENV)/.operator

$(VENV)/.operator: $(VENV)/.installed
	rm -rf $(TORCH_EXTENSIONS_DIR)
	DS_ACCELERATOR=cpu $(BIN)/python -c \
		'from deepspeed.comm.torch import build_shm_op; build_shm_op()'
	touch $@

quickstart: operator
	$(BIN)/python launch/quickstart.py

test: operator
	$(PYTEST) -m 'not bench and not slow' $(PYTEST_FLAGS) tests

test-slow: operator
	$(PYTEST) -m 'slow and not bench' $(PYTEST_FLAGS) tests

test-all: operator
	$(PYTEST) $(PYTEST_FLAGS) tests

coverage: operator
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -m 'not bench and not slow' $(PYTEST_FLAGS) tests
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -k shellcheck tests/jobs/test_job_script.py
	$(BIN)/python -m pytest -q tests/docs

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: operator
	$(BIN)/python -m pytest -q -m bench $(PYTEST_FLAGS) tests/bench

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
