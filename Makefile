# `make train` and `make test` each do all their own set-up: they need Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= resnet_w4a8
BIN := $(VENV)/bin

.PHONY: train test lint format slow zoo board clean

train: $(VENV)/.installed
	$(BIN)/python train.py recipe=$(RECIPE)

test: $(VENV)/.tested lint
	$(BIN)/python -m pytest

lint: $(VENV)/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.tested
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

slow: $(VENV)/.tested
	$(BIN)/python -m pytest -m slow

zoo: $(VENV)/.tested
	$(BIN)/python scripts/zoo.py --into docs/zoo.md

board: $(VENV)/.installed
	$(BIN)/tensorboard --logdir runs

clean:
	rm -rf $(VENV) build dist

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable .[dev]
	touch $@
