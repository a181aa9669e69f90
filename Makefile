# PYTHON makes the environment; VENV says where it is.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup demo test lint

# Installed again only when what is to be installed has changed.
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints-ci.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints-ci.txt -e ".[dev]"
	touch $@

# The embedded default: a small model of our own, 20 facts edited by ROME with RECT, all ten tasks. No network.
demo: setup
	HF_HUB_OFFLINE=1 $(BIN)/lm_eval --model edited_hf --tasks rect_suite --batch_size 16

# One thread a worker: two workers with two threads each would fight over two cores.
test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
