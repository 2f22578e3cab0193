# Each target works as the only command typed on a fresh machine: it makes the virtual environment it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format bench clean

demo: $(INSTALLED)          ## the whole pipeline, on a tiny Llama and Python's standard library
	$(BIN)/granary demo

test: $(INSTALLED)          ## every test that needs no GPU
	$(BIN)/python -m pytest

check: $(INSTALLED)         ## what CI runs before the tests: lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layering.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)         ## the measurements of benchmarks/, one after the other
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.harvest

$(INSTALLED): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt --editable '.[dev,readers]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) granary-demo
