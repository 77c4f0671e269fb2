# Needs python3 (3.11 or newer) and make; everything else is installed into $(VENV).
PYTHON := python3
VENV := .venv
# Appended to the command: make train ARGS="debug seed=7", make test ARGS="tests/data -x"
ARGS :=
# Two test processes: the tests compute on one thread each, and a laptop has two cores to spare.
TEST_PROCESSES := 2

# Not the Markdown: its registry snippets stand as the contract writes them, one line a builder.
CODE := src tests benchmarks examples

# One stamp an installation: it is repeated only when the requirements changed.
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
REQUIREMENTS := pyproject.toml constraints.txt
INSTALL := $(VENV)/bin/python -m pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-all lint docs clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo '  Arguments go in ARGS: make train ARGS="debug seed=7", make test ARGS="tests/data -x".'

train: $(RUN_STAMP) ## Train the default model (or ARGS), going on where an interrupted run stopped.
	$(VENV)/bin/truthgpt train --resume auto $(ARGS)

test: $(DEV_STAMP) ## Run the tests.
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) $(ARGS)

test-all: $(DEV_STAMP) ## Run the tests, the long reliability runs included.
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) -m "" $(ARGS)

lint: $(DEV_STAMP) ## Check style, types and the generated files.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m truthgpt.cli.reference --check

docs: $(RUN_STAMP) ## Write the generated files: references and the comments of llm_default.yaml.
	$(VENV)/bin/python -m truthgpt.cli.reference --write

clean: ## Remove the environment and all caches; runs/ stays.
	rm -rf $(VENV) build dist src/truthgpt.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing `python -m venv` installs, so its presence says that the environment is whole.
$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: $(PYTHON) is not installed; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; \
		exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); 3.11 or newer is needed, name one: make PYTHON=python3.12" >&2; \
		exit 2; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "make: $(PYTHON) -m venv failed; on Debian and Ubuntu it needs the package python3-venv" >&2; exit 2; }

$(RUN_STAMP): $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo "installing truthgpt into $(VENV) (once; PyTorch is the big part)"
	$(INSTALL) -e .
	@touch $@

$(DEV_STAMP): $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo "installing truthgpt and its development tools into $(VENV) (once; PyTorch is the big part)"
	$(INSTALL) -e '.[dev]'
	@touch $@ $(RUN_STAMP)
