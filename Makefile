# Every target sets up .venv itself when it is missing or older than pyproject.toml.
PYTHON ?= python3
# Requirements beside those of pyproject.toml when .venv is made: make setup WITH="torch==2.9.1 torchao==0.15.0"
WITH ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
DEMO := demo
TUNE := $(BIN)/tune run torchfuse/recipes
CONFIGS := recipes/configs/digits

# Python keeps bytecode, whatever the environment says: recipes and tests start many processes, and each would
# compile thousands of files.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo compare test test-long check format docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP) ## make the virtual environment, with everything in it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "torchfuse needs Python 3.11 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]' $(WITH)
	@touch $@

demo: $(STAMP) ## make data and checkpoints, finetune two architectures, ask them, draw the answers
	$(BIN)/python -m torchfuse.recipes.prepare_digits $(DEMO)
	$(TUNE)/finetune.py --config $(CONFIGS)/cross_attention.yaml
	$(TUNE)/finetune.py --config $(CONFIGS)/joint_decoder.yaml
	$(TUNE)/generate.py --config $(CONFIGS)/generate.yaml
	$(BIN)/python -m torchfuse.recipes.draw_digits $(DEMO)

compare: $(STAMP) | $(DEMO)/questions ## finetune five architectures on one budget, draw how they fare
	$(TUNE)/compare.py --config $(CONFIGS)/compare.yaml

$(DEMO)/questions: | $(STAMP)
	$(BIN)/python -m torchfuse.recipes.prepare_digits $(DEMO)

PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: $(STAMP) ## run the tests, on all cores
	$(PYTEST)

test-long: $(STAMP) ## run the tests that are marked long: many random cases, kills, wheels, whole trainings
	$(PYTEST) -m long

check: $(STAMP) ## lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layers.py

format: $(STAMP) ## format the code and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove everything that was made, the virtual environment too
	rm -rf $(VENV) $(DEMO) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
