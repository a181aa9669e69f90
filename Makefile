# PYTHON makes the environment; VENV says where it is.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup test lint

setup: $(BIN)/python
	$(BIN)/python -m pip install -c constraints-ci.txt -e ".[dev]"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One thread a worker: two workers with two threads each would fight over two cores.
test:
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --dist worksteal $(ARGS)

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
