# Everything happens in .venv beside this file; nothing outside the checkout is touched (but the caches of pip and of privinf itself).

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
MODEL ?= models/pylib
PROMPT ?= def read_lines(path):

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs train clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## set everything up, then let three local parties continue a line of Python that the server never sees
	$(BIN)/privinf run $(MODEL) --prompt "$(PROMPT)" --max-new-tokens 16 $(ARGS)

test: $(VENV)/.installed-dev ## set everything up, then run the tests; ARGS="tests/cli/test_cli.py -x" narrows them
	$(BIN)/python -m pytest -n 3 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, mypy --strict, and the import rules between the rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev ## measure everything at small sizes into runs/bench/report.html; ARGS="ladder --json FILE" and the like choose otherwise
	$(BIN)/python -m benchmarks $(or $(ARGS),all --quick --model $(MODEL) --out runs/bench)
	$(if $(ARGS),,$(BIN)/python -m pytest benchmarks/test_micro.py --benchmark-autosave --benchmark-storage=runs/bench/micro --benchmark-columns=median,iqr)

docs: $(VENV)/.installed-docs ## the documentation as a site, in build/site; a link that leads nowhere is an error
	$(BIN)/python -m mkdocs build --strict

train: $(VENV)/.installed ## train the shipped model from scratch on a CPU, in runs/pylib; interrupted, the same command goes on
	$(BIN)/privinf train $(ARGS)

clean: ## remove .venv, build output and caches; training runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# TORCH, the requirement that a registry has a CPU build under, is installed first, and then not replaced.
torch := $(if $(TORCH),$(BIN)/python -m pip install --disable-pip-version-check '$(TORCH)' && )

# A stamp is touched when an installation is complete, so that the next call does nothing, and an interrupted one starts again.
$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/.created
	$(torch)$(BIN)/python -m pip install --disable-pip-version-check --editable '.[gateway,training]'
	@touch $@

$(VENV)/.installed-dev: setup.cfg pyproject.toml | $(VENV)/.created
	$(torch)$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: setup.cfg pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[docs]'
	@touch $@

# A .venv that is there and works is kept. Any of the Pythons may be missing, too old, a shim without a Python, or lack `venv` (Debian splits it off).
USABLE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))

$(VENV)/.created:
	@if $(BIN)/python -c '$(USABLE)' >/dev/null 2>&1 && $(BIN)/python -m pip --version >/dev/null 2>&1; then touch $@; exit 0; fi; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	    if $$python -c '$(USABLE)' >/dev/null 2>&1; then \
	        echo "making $(VENV) with $$python"; \
	        $$python -m venv --clear $(VENV) && touch $@; \
	        exit; \
	    fi; \
	done; \
	echo "no Python 3.11 or later with the venv module was found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1
