# make quickstart   install, pre-train a tiny GPT-2, fine-tune it with TRAM on 2 ranks, print the table
# make test         install, run the tests
# make test-slow    install, run the slow ones: every recipe on 2 ranks, a real SLURM, kills, a browser
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

.PHONY: venv quickstart test test-slow check format bench clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

quickstart: venv
	$(BIN)/python launch/quickstart.py

test: venv
	$(BIN)/python -m pytest -q -m 'not bench and not slow' $(PYTEST_FLAGS) tests

test-slow: venv
	$(BIN)/python -m pytest -q -m 'slow and not bench' $(PYTEST_FLAGS) tests

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -k shellcheck tests/jobs/test_job_script.py

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python -m pytest -q -m bench $(PYTEST_FLAGS) tests/bench

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
