# Every target works alone on a fresh machine with Python 3.11 or newer: it makes the environment that it needs.
#
#   make demo | test | check | bench | docs | test-nojit | test-boundscheck | test-oldest | coverage | wheel-test |
#        interop | campaign | clean
#
#   PYTHON=python3.13    the interpreter to make the environment with
#   VENV=/some/folder    the environment (default: .venv in this folder)
#   TESTS=tests/kernels  what the test targets run (default: all)
#   WORKERS=0            how many files of tests are run at a time (default: 4, as tests wait a lot); 0 = one by one, in this
#                        process: for a debugger
#   ARGS="-x -k ring"    more arguments for pytest, or for the command of demo and bench

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
WORKERS ?= 4
ARGS ?=

# The tests start some hundred processes, and each would compile every module, and each worker rewrite every test.
unexport PYTHONDONTWRITEBYTECODE

RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist loadfile $(TESTS) $(ARGS)

# The environment is stale if it does not hold this very checkout (it, or the checkout, was moved or copied), if its
# interpreter is gone, or if another one was asked for.
WANT := import sys, vnetdp; print(vnetdp.__file__, "%d.%d" % sys.version_info[:2])
IS := $(shell $(RUN) -I -c '$(WANT)' 2>/dev/null)
ifeq ($(origin PYTHON),file)
VERSION := $(lastword $(IS))
else
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
endif
ifneq ($(IS),$(CURDIR)/vnetdp/__init__.py $(VERSION))
.PHONY: $(STAMP)
endif

.PHONY: demo test check bench docs test-nojit test-boundscheck test-oldest coverage wheel-test campaign interop clean

demo: $(STAMP)
	$(RUN) -m vnetdp demo $(ARGS)

test: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -c 'from importlinter.cli import lint_imports_command as main; main()' --no-cache
	$(RUN) -m tests.project.shape

# One question a file in bench/; then the comparisons with peers.
bench: $(STAMP)
	$(RUN) -m pytest bench --benchmark-enable --benchmark-only --benchmark-columns=median,iqr,rounds \
		--benchmark-group-by=fullfunc --quiet
	for what in ring link peers migration; do $(RUN) -m vnetdp bench $$what $(ARGS) || exit; done

# The API reference, from the docstrings of the public names: docs/reference/vnetdp.html. A warning is an error.
docs: $(STAMP)
	$(RUN) -W error -m tests.project.reference docs/reference

# The kernels as plain Python: the other half of every function that has two bodies.
test-nojit: $(STAMP)
	NUMBA_DISABLE_JIT=1 $(PYTEST)

# Compiled with bounds checks. The cache is its own: Numba does not keep checked code apart from other code.
test-boundscheck: $(STAMP)
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(CURDIR)/.numba-boundscheck $(PYTEST)

# With the oldest versions that pyproject.toml allows, in an environment of their own: the part of the suite that leans on
# other packages the most. The kernels are compiled first, as no test is to wait for that.
OLDEST_TESTS ?= tests/endpoints tests/kernels/wire/test_reflect.py tests/kernels/wire/test_hostile_capture.py
test-oldest: $(STAMP)
	@set -eu; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	$(RUN) -m tests.project.oldest | tee "$$dir/oldest" | paste -sd ' ' >&2; \
	$(RUN) -m venv "$$dir/venv"; \
	"$$dir/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$$dir/oldest" --editable '.[test]'; \
	export NUMBA_CACHE_DIR="$$dir/cache"; \
	"$$dir/venv/bin/python" -c 'from vnetdp.warmup import warm_up; warm_up(print)'; \
	"$$dir/venv/bin/python" -m pytest $(OLDEST_TESTS) $(ARGS)

# Uncompiled, since compiled code leaves no trace; each package must reach 90 % by itself. Benchmarks are left out: they would
# take hours uncompiled, and `make test` runs them compiled.
coverage: $(STAMP)
	$(RUN) -m coverage erase
	NUMBA_DISABLE_JIT=1 $(RUN) -m coverage run -m pytest $(TESTS) $(ARGS)
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report --include='kernels/*' --fail-under=90
	$(RUN) -m coverage report --include='vnetdp/*' --omit='vnetdp/bench/*' --fail-under=90

# What is published, in an environment of its own, away from the checkout: does the wheel hold all that it needs?
WHEEL_TESTS ?= tests/kernels tests/project/test_package.py tests/testing/test_plugin.py tests/cli/test_cli.py
wheel-test: $(STAMP)
	@set -eu; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir "$$dir" .; \
	$(RUN) -m venv "$$dir/venv"; \
	"$$dir/venv/bin/python" -m pip install --quiet "$$(ls "$$dir"/vnetdp-*.whl)[test]"; \
	cp -r tests pyproject.toml "$$dir"; cd "$$dir"; \
	venv/bin/python -c 'import vnetdp, vnetdp_kernels; print(vnetdp.__file__, vnetdp_kernels.__file__, sep="\n")' \
		| tee /dev/stderr | (! grep --quiet --invert-match "$$dir/venv/"); \
	venv/bin/python -m pytest $(WHEEL_TESTS) $(ARGS)

# Real peers: DPDK, and Linux guests in QEMU and User Mode Linux. What is missing is named and skipped.
interop: $(STAMP)
	$(RUN) -m pytest -m interop tests/interop $(ARGS)

# The long one, two hours or so: all that `make test` and `make interop` run a slice of. Each test that is shorter by default
# looks at VNETDP_CAMPAIGN; a new one that takes seconds does too.
campaign: $(STAMP)
	VNETDP_CAMPAIGN=1 $(PYTEST) --timeout=7200
	VNETDP_CAMPAIGN=1 $(RUN) -m pytest -m interop tests/interop --timeout=7200 $(ARGS)

clean:
	rm -rf .venv .numba-boundscheck .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* docs/reference
	find vnetdp kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

# --- the environment ---

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'vnetdp needs Python 3.11 or newer; "$(PYTHON)" is not that. Name another: make $(MAKECMDGOALS) PYTHON=python3.13' >&2; \
		exit 1; }
	@$(RUN) -I -c 'import pip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(or $(VERSION),none)")' 2>/dev/null || { \
		$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
			echo '"$(PYTHON)" cannot make environments: it lacks ensurepip. On Debian: apt-get install python3-venv' >&2; \
			exit 1; }; \
		if test -e $(VENV)/pyvenv.cfg; then rm -rf $(VENV); fi; \
		$(PYTHON) -m venv $(VENV); }
	@echo 'installing vnetdp and what its development needs into $(VENV)' >&2
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' || { \
		if ! command -v cc >/dev/null; then \
			echo 'There is no C compiler here, and python-pytun may need one. On Debian: apt-get install gcc python3-dev' >&2; \
		elif ! $(RUN) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then \
			echo 'Python.h is missing, and python-pytun may need it. On Debian: apt-get install python3-dev' >&2; \
		fi; exit 1; }
	@touch $(STAMP)
