# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# VENV=DIR chooses the environment, PYTHON=python3.12 the interpreter (3.11 or newer) that makes it.

PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
INSTALLED = $(VENV)/.installed-$(shell (cat pyproject.toml; pwd) | cksum | cut -d' ' -f1)
TESTABLE = $(subst .installed,.testable,$(INSTALLED))
PEERS = $(VENV)-peers

# make image: IMAGE=registry.example/opensloth:1.0 EXTRAS=train,gpu BASE_IMAGE=... (docker/README.md)
IMAGE ?= localhost/opensloth:dev
EXTRAS ?= train
BASE_IMAGE ?=
BUILDER = $(if $(shell docker info >/dev/null 2>&1 && echo yes),docker build,BUILDAH_ISOLATION=chroot buildah bud --layers)

.PHONY: demo test test-slow test-gpu lint e2e bench bench-train image lock install clean

demo: $(INSTALLED) ## install, then teach a small model a task and show it before and after
	$(BIN)/python examples/quickstart/run.py

test: $(TESTABLE) ## install, then run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/pytest

test-slow: $(TESTABLE) ## the tests that train real models, kill processes and time commands
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --timeout 900 -o addopts="--import-mode=importlib --strict-markers -ra"

test-gpu: $(TESTABLE) ## the tests that need a CUDA device; some need two
	OMP_NUM_THREADS=1 $(BIN)/pytest -m gpu --timeout 600 -o addopts="--import-mode=importlib --strict-markers -ra"

lint: $(INSTALLED) ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

e2e: $(TESTABLE) ## end-to-end tests on the cluster of KUBECONFIG, whose admin you are (docs/development.md)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m e2e --timeout 900 -p no:randomly $(E2E_ARGS) \
	  -o addopts="--import-mode=importlib --strict-markers -ra"

bench: $(INSTALLED) ## time the preparation of data
	$(BIN)/python benchmarks/prepare.py

# BENCH_ARGS=--cases 0.5b,7b chooses among the cases; a second call goes on where the first stopped.
# The peers have pins of their own, so they get an environment of their own; without Unsloth the others are timed.
bench-train: ## time training beside the peers on one GPU, and draw it
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -e '.[train,gpu,unsloth,bench]' || \
	  $(PEERS)/bin/python -m pip install --quiet -e '.[train,gpu,bench]'
	$(PEERS)/bin/python benchmarks/train.py --results build/bench-train.json $(BENCH_ARGS)
	$(PEERS)/bin/python benchmarks/plot.py build/bench-train.json build/bench-train.svg

image: ## build the training image, with docker where its daemon answers, else with buildah
	$(BUILDER) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) --build-arg EXTRAS=$(EXTRAS) \
	  --label org.opencontainers.image.version=$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	  --label org.opencontainers.image.revision=$(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown) \
	  -f docker/train.Dockerfile -t $(IMAGE) .

lock: ## renew the image's locked dependencies, all to the newest that pyproject.toml allows
	docker/lock

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,quickstart,dev]'
	rm -f $(VENV)/.installed-* $(VENV)/.testable-*
	touch $@

# bitsandbytes quantises on a CPU too; the demo does without, and need not read what it says of its kernels there.
$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gpu]'
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info
