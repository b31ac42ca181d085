# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin

.PHONY: demo test lint format site wheel clean

demo: $(VENV)/ready
	$(BIN)/owl2-hf describe

test: $(VENV)/ready
	$(BIN)/python -m pytest -q

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

site: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Build the wheel, and run it where nothing else is installed.
wheel: $(VENV)/ready
	rm -rf dist build/wheel
	$(BIN)/python -m build --quiet --outdir dist
	find dist -name '*.whl' -size -15M | grep whl
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	cd build && wheel/bin/owl2-hf describe

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
