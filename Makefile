# Every target makes the environment it needs. VENV=path uses another one.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test check bench clean
demo: $(VENV)/.installed
	$(BIN)/vlmoe demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

bench: $(VENV)/.installed
	$(BIN)/python tools/bench.py layer

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf runs datasets
