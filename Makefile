# Every target does its own set-up, in a fresh clone too: it needs a Python from 3.11 on, with venv, and a package index.

VENV := .venv
BIN := $(VENV)/bin
PYTHON :=
VERSIONS := 3.11 3.12 3.13
URL :=
ROUNDS := 1
CONSTRAINTS := tests/constraints.txt
# By name, since a comma in a call of make's own would part its arguments.
BACKENDS := redis,kafka,celery
# What the installation copies or reads; the rest of the package is used where it is.
SETUP := pyproject.toml $(CONSTRAINTS) brokerkit/_kombu.py
RESULTS := $(abspath $(VENV))/results.jsonl
FEATURES := $(abspath $(VENV))/features.jsonl
# On real servers tests mostly wait: many at a time, whatever the number of cores is.
WAITING := $(addprefix tests/conformance/test_,redis.py valkey.py kafka.py kafka_old.py)
# Brokers that differ little from newer ones.
MORE := tests/conformance/test_kafka_oldest_sharing.py
MANY := -n 16 --dist loadgroup
# Which is how much longer than on an idle machine things may take on Kafka, beside so many others.
PATIENCE := 1.5
# Each of their tests kills and freezes brokers of its own, three at a time: too much for every day.
LONG := $(addprefix tests/kafka/test_,publish_faults.py fetch_faults.py)
# What has a run of its own, or is not for every day.
APART := $(addprefix --ignore=,$(WAITING) $(MORE) $(LONG))
# Or each process of the tests, and of the workers that they start, would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help demo test test-all test-celery test-faults check bench mutants promises features servers clean lock
# Parts of these.
.PHONY: pytest compile here there suites tables sample lint mypy pyright

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

INSTALLED := $(VENV)/$(if $(filter redis%,$(URL)),.redis,$(if $(filter kafka%,$(URL)),.kafka,.run))

demo: $(INSTALLED) ## Run the example service on real orders; URL=redis://... or kafka://... for another broker than memory://
	@$(BIN)/python examples/orders.py $(URL)

# Runs the targets $(1) side by side.  What one of them prints comes in one piece, when it has ended.
beside = $(MAKE) --no-print-directory --jobs --output-sync=target $(1)

test: $(VENV)/.dev ## Run everything: lint, types, unit, conformance, examples, mutants
	@$(call beside,compile lint mypy pyright)
	@$(MAKE) --no-print-directory pytest
	@$(MAKE) --no-print-directory sample

test-all: check ## The same on each Python of 3.11, 3.12 and 3.13 that is found
	@found=; for version in $(VERSIONS); do \
		python=$$($(call find,$$version)); \
		[ -n "$$python" ] || { echo "Python $$version: not found"; continue; }; \
		found="$$found $$version"; \
		echo "Python $$version: $$python"; \
		$(MAKE) --no-print-directory VENV=.venv-$$version PYTHON=$$python pytest || exit 1; \
	done; echo "passed on Python$$found"

# Runs the tests $(2) in the manner $(1).  Real brokers are late on a machine that has many of them: what fails beside all others
# runs once more, by itself.  What has failed is noted for each target, as several run at a time.
twice = pytest="$(BIN)/python -m pytest --override-ini cache_dir=.pytest_cache/$@"; \
	$$pytest $(1) $(2) || { echo "once more, by itself, what has failed:"; \
	$$pytest --last-failed --last-failed-no-failures none $(2); }

pytest: $(VENV)/.dev
	@rm -f $(RESULTS) $(FEATURES)
	@$(call beside,here)
	@$(call beside,there suites)
	@$(MAKE) --no-print-directory tables

# All but what mostly waits.
here: $(VENV)/.dev
	@export BROKERKIT_RESULTS=$(RESULTS) BROKERKIT_CELERY_RESULTS=$(FEATURES); $(call twice,-n 8 --dist loadgroup,$(APART))

there: $(VENV)/.dev
	@export BROKERKIT_RESULTS=$(RESULTS) BROKERKIT_PATIENCE=$(PATIENCE); $(call twice,$(MANY),$(WAITING))

suites: $(VENV)/.dev
	@$(BIN)/python -m tests.celery.suites --short --jobs 6

tables: $(VENV)/.dev
	@$(BIN)/python -m brokerkit.testing.conformance.promises --check $(RESULTS) README.md
	@$(BIN)/python -m tests.celery.features --check $(FEATURES) docs/celery.md

# Once, before many processes do so at a time.
compile: $(VENV)/.dev
	@said=$$($(BIN)/python -m pytest --collect-only -qq $(APART) 2>&1) || { echo "$$said"; exit 1; }

test-faults: $(VENV)/.dev ## Kill, freeze and cut off processes and servers, ROUNDS=1 times each, and break every byte
	@BROKERKIT_FAULTS=$(ROUNDS) $(BIN)/python -m pytest -n 2 --dist loadgroup tests/faults $(LONG)
	@BROKERKIT_PATIENCE=$(PATIENCE) $(BIN)/python -m pytest $(MANY) $(MORE)

test-celery: $(VENV)/.dev ## Run the suites of Kombu and Celery themselves, unmodified, on Redis and Kafka: this takes an hour
	@$(BIN)/python -m tests.celery.suites

promises: $(VENV)/.dev ## Write README's table of promises from a run of the conformance suite on all systems
	@rm -f $(RESULTS)
	@BROKERKIT_RESULTS=$(RESULTS) $(BIN)/python -m pytest -n 2 tests/conformance $(addprefix --ignore=,$(WAITING) $(MORE))
	@BROKERKIT_RESULTS=$(RESULTS) BROKERKIT_PATIENCE=$(PATIENCE) $(BIN)/python -m pytest $(MANY) $(WAITING)
	@$(BIN)/python -m brokerkit.testing.conformance.promises $(RESULTS) README.md

features: $(VENV)/.dev ## Write the tables of docs/celery.md from a run of the tests of Celery
	@rm -f $(FEATURES)
	@BROKERKIT_CELERY_RESULTS=$(FEATURES) $(BIN)/python -m pytest -n 2 --dist loadgroup tests/celery
	@$(BIN)/python -m tests.celery.features $(FEATURES) docs/celery.md

# All of them take minutes: this is the same part of them each time.
sample: $(VENV)/.dev
	@$(BIN)/python -m tests.mutants --sample 80 --seed 1 --workers 4

mutants: $(VENV)/.dev ## Plant faults and print which test catches each
	@$(BIN)/python -m tests.mutants

check: lint mypy pyright ## Lint, format, mypy --strict, pyright

lint: $(VENV)/.dev
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "not formatted: run $(BIN)/ruff format"; exit 1; }

mypy: $(VENV)/.dev
	@$(BIN)/mypy

pyright: $(VENV)/.dev
	@$(BIN)/pyright --pythonpath $(BIN)/python --warnings

bench: $(VENV)/.bench ## Measure the speed on memory://, Redis and Kafka and of Celery, beside other libraries
	@$(BIN)/python -m tests.benchmarks

servers: $(VENV)/.dev ## Run a development Redis and a development Kafka and print their URLs; Ctrl-C ends them
	@$(BIN)/python -m tests.servers

clean: ## Remove what the targets made
	rm -rf .venv .venv-3.* .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find brokerkit tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

lock: $(VENV)/.dev $(VENV)/.bench ## Write down the versions of all tools, for reproducible set-ups
	@{ echo '# Versions that the tests have passed with; made by `make lock`.'; \
		$(BIN)/pip freeze --exclude-editable | grep -v -i -E '^(pip|setuptools)\b'; } > $(CONSTRAINTS)

# Prints the first Python of version $(1) that works and can make virtual environments.
find = for python in python$(1) "$$HOME"/.pyenv/versions/$(1).*/bin/python; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' $(1) 2>/dev/null \
		&& { echo "$$python"; break; }; done; true

$(VENV)/bin/activate:
	@set -e; python="$(PYTHON)"; \
	for version in $(VERSIONS); do [ -n "$$python" ] || python=$$($(call find,$$version)); done; \
	[ -n "$$python" ] || { \
		echo "brokerkit needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt install python3.11-venv)" >&2; exit 1; }; \
	echo "making $(VENV) with $$python ..."; \
	"$$python" -m venv --clear $(VENV)

install = echo "installing $(1) into $(VENV) ..."; \
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) $(2) || { \
		echo "cannot install $(1): see above; is a package index reachable?" >&2; exit 1; }; \
	touch $@

$(VENV)/.run: $(SETUP) | $(VENV)/bin/activate
	@$(call install,brokerkit,--editable .)

$(VENV)/.redis: $(SETUP) | $(VENV)/bin/activate
	@$(call install,brokerkit for Redis,--editable '.[redis]')
	@touch $(VENV)/.run

$(VENV)/.kafka: $(SETUP) | $(VENV)/bin/activate
	@$(call install,brokerkit for Kafka,--editable '.[kafka]')
	@touch $(VENV)/.run

# A pip older than 25.1 knows no dependency groups.
$(VENV)/.dev: $(SETUP) | $(VENV)/bin/activate
	@$(BIN)/pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(call install,brokerkit and its tools,--editable '.[$(BACKENDS)]' --group dev)
	@touch $(VENV)/.run $(VENV)/.redis $(VENV)/.kafka

# Its servers are those of the tests.
$(VENV)/.bench: $(VENV)/.dev
	@$(call install,the benchmarks,--editable '.[bench,$(BACKENDS)]')
