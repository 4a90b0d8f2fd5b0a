# Each target makes what it needs, beginning with .venv. CONTRIBUTING.md says more.
#   make serve ARGS="--gpu-blocks 512"       more flags for quire serve
#   make test PYTEST_ARGS="-k block_pool"    more flags for pytest
#   make test TEST_JOBS=8                    so many files of tests at once, for machines of more than two cores
SHELL := /bin/bash
.DEFAULT_GOAL := help

BIN := .venv/bin
BUF := tools/buf/node_modules/.bin/buf
LISTEN ?= 127.0.0.1:50051
ARGS ?=
PYTEST_ARGS ?=
TEST_JOBS ?= 2
# Our own Python, each file once: src/quire holds links to the folders, and mypy follows them.
PYTHON_FILES := bench cli client cluster common deploy kernels worker tests tools

.PHONY: help serve demo test lint style types proto format stubs chart proto-baseline pytest pytest-parts pytest-clusters clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

serve: .venv/.server-ready  ## set up, and serve the built-in model on LISTEN (127.0.0.1:50051)
	@exec $(BIN)/quire serve --listen $(LISTEN) $(ARGS)

demo: .venv/.server-ready  ## set up, start, stream 8 prompts at once, print timings, stop
	@exec $(BIN)/quire demo $(ARGS)

test: lint pytest  ## everything that must pass before a change is merged

lint: style types proto  ## style, types and the message definitions

style: .venv/.dev-ready
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)

types: .venv/.dev-ready
	$(BIN)/mypy -p quire
	$(BIN)/mypy tests

# Without npm the checks of proto/ are left out, except under CI.
proto:
	@if command -v npm >/dev/null; then \
	  $(MAKE) --no-print-directory proto-checks; \
	elif [ -n "$$CI" ]; then \
	  echo "npm is not there, and the checks of proto/ need it: install Node.js 18 or newer"; exit 1; \
	else \
	  echo "LEFT OUT: the checks of proto/ need npm (Node.js 18 or newer)"; \
	fi

.PHONY: proto-checks
proto-checks: $(BUF)
	$(BUF) lint proto
	$(BUF) format --diff --exit-code proto
	$(BUF) breaking proto --against proto/baseline.binpb

PYTEST := $(BIN)/pytest -m "not slow and not chaos and not gpu"
ifeq ($(PYTEST_ARGS),)
pytest: pytest-parts pytest-clusters
else
pytest: .venv/.dev-ready
	$(PYTEST) $(PYTEST_ARGS)
endif

pytest-parts: .venv/.dev-ready
	$(PYTEST) --numprocesses $(TEST_JOBS) --dist loadfile --ignore tests/end_to_end

# Clusters have the machine for themselves: they keep deadlines.
pytest-clusters: .venv/.dev-ready
	$(PYTEST) tests/end_to_end

format: .venv/.dev-ready $(BUF)  ## rewrite Python and proto files in the house style
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BUF) format --write proto

stubs: .venv/.dev-ready  ## generate src/quire/v1 and src/quire/internal/v1 from proto/
	PYTHON=$(BIN)/python tools/generate_stubs.sh

chart: .venv/.dev-ready  ## write what helm/quire has of other parts: the values' schema, rules and dashboards
	$(BIN)/python tools/chart_files.py

proto-baseline: $(BUF)  ## accept proto/ as it is: what later changes must stay compatible with
	$(BUF) build proto --exclude-source-info --output proto/baseline.binpb

clean:  ## remove .venv, node_modules and what the tools left
	rm -rf .venv tools/buf/node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/quire.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.server-ready: pyproject.toml deploy/constraints.txt
	@tools/setup_venv.sh server
	@touch $@

.venv/.dev-ready: .venv/.server-ready
	@tools/setup_venv.sh dev
	@touch $@

$(BUF): tools/buf/package.json tools/buf/package-lock.json
	npm ci --prefix tools/buf --ignore-scripts --no-audit --no-fund --loglevel error
	@touch $@
