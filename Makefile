# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# VENV=DIR chooses the environment, PYTHON=python3.12 the interpreter (3.11 or newer) that makes it.

PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
INSTALLED = $(VENV)/.installed-$(shell (cat pyproject.toml; pwd) | cksum | cut -d' ' -f1)

.PHONY: demo test test-slow lint e2e bench install clean

demo: $(INSTALLED) ## install, then teach a small model a task and show it before and after
	$(BIN)/python examples/quickstart/run.py

test: $(INSTALLED) ## install, then run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/pytest

test-slow: $(INSTALLED) ## the tests that train real models, kill processes and time commands
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --timeout 900 -o addopts="--import-mode=importlib --strict-markers -ra"

lint: $(INSTALLED) ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

e2e: $(INSTALLED) ## end-to-end tests on one machine: the quickstart, as a user runs it
	$(BIN)/python examples/quickstart/run.py

bench: $(INSTALLED) ## time the preparation of data
	$(BIN)/python benchmarks/prepare.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,quickstart,dev]'
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
