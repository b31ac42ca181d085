# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
PIP_INSTALL = python -m pip install --quiet
# Other versions than the pinned one would bring several GB of CUDA libraries.
TORCH = $(shell grep '^torch==' constraints.txt)
# What breaks first with another release of transformers; it runs on the oldest and on the newest versions too.
FAST_HALF = @tests/fast_half.txt

.PHONY: demo test test-oldest test-newest coverage mutations constraints lint format site wheel sbom clean

demo: $(VENV)/installed
	@$(BIN)/owl2-hf describe

test: $(VENV)/ready
	$(BIN)/python -m pytest -q

# All tests with the lines that they run, also in the processes that they start. Fails below the floor of pyproject.toml.
coverage: $(VENV)/ready
	rm -rf build/coverage
	mkdir -p build/coverage
	$(BIN)/python -m coverage run -m pytest -q
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet --directory build/coverage/html --fail-under 0
	$(BIN)/python -m coverage report --skip-covered --sort cover

# Whether the tests notice a wrong formula: tests/mutations.
mutations: $(VENV)/ready
	$(BIN)/python -m tests.mutations

# The fast half of the tests on the oldest versions that pyproject.toml admits.
test-oldest: build/oldest/ready
	build/oldest/bin/python -m pytest -q $(FAST_HALF)

# The fast half of the tests on the newest versions of today, nothing pinned but torch.
test-newest:
	rm -rf build/newest
	$(PYTHON) -m venv build/newest
	build/newest/bin/$(PIP_INSTALL) '$(TORCH)' --editable '.[convert,train]' hypothesis pytest trl
	build/newest/bin/python -m pip list --format freeze | grep -iE '^(transformers|peft|tokenizers|huggingface|trl)'
	build/newest/bin/python -m pytest -q $(FAST_HALF)

# Bring constraints.txt up to date: resolve, test everything, then write.
constraints:
	rm -rf build/resolved
	$(PYTHON) -m venv build/resolved
	build/resolved/bin/$(PIP_INSTALL) '$(TORCH)' --editable '.[dev]'
	build/resolved/bin/python -m pytest -q
	{ head -1 constraints.txt; build/resolved/bin/python -m pip list --format freeze --exclude pip --exclude setuptools \
		--exclude owl2_hf | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

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
	build/wheel/bin/$(PIP_INSTALL) --constraint $(CONSTRAINTS) dist/*.whl
	cd build && wheel/bin/owl2-hf describe

# What the wheel was installed with, as CycloneDX: build/sbom.json.
sbom: wheel build/sbom/ready
	build/sbom/bin/python -m cyclonedx_py environment build/wheel/bin/python --pyproject pyproject.toml --mc-type library \
		--output-reproducible --output-file build/sbom.json

build/sbom/ready:
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/$(PIP_INSTALL) 'cyclonedx-bom==7.5.0'
	touch $@

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/$(PIP_INSTALL) --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/ready: $(VENV)/installed
	$(BIN)/$(PIP_INSTALL) --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

build/oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/$(PIP_INSTALL) --constraint constraints-oldest.txt --editable '.[convert]' accelerate hypothesis pytest
	touch $@

clean:
	rm -rf $(VENV) build dist
