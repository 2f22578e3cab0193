# Each target works as the only command typed on a fresh machine: it makes the virtual environment it needs.
# PYTHON=python3.12 takes that Python; without, the first that will do of python3.11, 3.12, 3.13 (infra/environment.sh).
PYTHON ?=
BIN := .venv/bin
# A process a core, up to four; a file's tests in one of them, as they share what they make, in the order of the folders.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-rest test-all check faults format bench environment clean

demo: environment           ## the whole pipeline, on a tiny Llama and Python's standard library
	$(BIN)/granary demo

test: environment           ## every part of the product once
	$(PYTEST) -m "not slow"

test-rest: environment      ## the tests that `make test` leaves out
	$(PYTEST) -m slow

test-all: environment       ## every test that needs no GPU
	$(PYTEST)

check: environment          ## what CI runs before the tests: lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layering.py

faults: environment         ## the whole fault campaign, as a table: about half an hour
	$(BIN)/python tests/faults/campaign.py
	GRANARY_CORRUPTIONS=2200 $(BIN)/python -m pytest -q -s tests/faults/test_corruption.py

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: environment          ## the measurements of benchmarks/, one after the other
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.objects
	$(BIN)/python -m benchmarks.verify
	$(BIN)/python -m benchmarks.harvest
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.padding
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.storage_types
	$(BIN)/python -m benchmarks.columns
	$(BIN)/python -m benchmarks.planning --tokens
	$(BIN)/python -m benchmarks.long_texts --megabytes 20 --tokenizer gpt4 --tokenizer llama2 --text words --text letters
	$(BIN)/python -m benchmarks.resampling
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.step --curve
	$(BIN)/python -m benchmarks.short_runs
	$(BIN)/python -m benchmarks.frontier

environment:                ## .venv with the pinned packages; nothing where it is ready
	@PYTHON='$(PYTHON)' sh infra/environment.sh

clean:
	rm -rf .venv granary-demo
