# Each target works as the only command typed on a fresh machine: it makes the virtual environment it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check faults format bench clean

demo: $(INSTALLED)          ## the whole pipeline, on a tiny Llama and Python's standard library
	$(BIN)/granary demo

test: $(INSTALLED)          ## every test that needs no GPU
	$(BIN)/python -m pytest

check: $(INSTALLED)         ## what CI runs before the tests: lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layering.py

faults: $(INSTALLED)        ## the whole fault campaign, as a table: about half an hour
	$(BIN)/python tests/faults/campaign.py
	GRANARY_CORRUPTIONS=2200 $(BIN)/python -m pytest -q -s tests/faults/test_corruption.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)         ## the measurements of benchmarks/, one after the other
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.objects
	$(BIN)/python -m benchmarks.verify
	$(BIN)/python -m benchmarks.harvest
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.padding
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.storage_types
	$(BIN)/python -m benchmarks.planning --tokens
	$(BIN)/python -m benchmarks.resampling
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.step --curve
	$(BIN)/python -m benchmarks.short_runs
	$(BIN)/python -m benchmarks.frontier

$(INSTALLED): pyproject.toml infra/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt --editable '.[dev,readers,s3]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) granary-demo
