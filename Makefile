# make install                                set up .venv
# make train                                  train on the digits and evaluate the model
# make train RECIPE=report DATA=cifar10       train on CIFAR-10 (DATA=DIR for your own copy)
# make test                                   run the test suite
# make docs                                   build the documentation site in site/
# make lint                                   check style and types

PYTHON ?= python3
RECIPE ?= quick
DATA ?= digits
ARGS ?=

VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

.PHONY: install train test docs lint clean

install: $(VENV)/.ready

train: $(VENV)/.ready
	$(BIN)/resnet56 train $(RECIPE) --data "$(DATA)" $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.ready-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV)

# The stamp files are created last, so that an interrupted installation starts again.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('resnet56 needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@$(BIN)/python -c "open('$@', 'w').close()"

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -c "open('$@', 'w').close()"

$(VENV)/.ready-docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@$(BIN)/python -c "open('$@', 'w').close()"
