# Everything a person does with a checkout. The first target that needs the environment builds it; later ones reuse it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-by-make
# Telemetry and download notices have no place in these commands.
export HF_HUB_DISABLE_TELEMETRY := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check format lint types docs docs-serve tests test-all test-comfyui build bench bench-align clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## the environment in .venv, from constraints.txt (the other commands do this when needed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"$(PYTHON) is Python {v[0]}.{v[1]}, but deradiff needs 3.11, 3.12 or 3.13. Name one: make PYTHON=python3.12 ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "==> Making a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> Installing deradiff and the versions of constraints.txt (once; needs a package index and a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## turn the dial on the digits model that ships with the package; images in demo/
	@echo "==> Realigning the digits (about a minute on two cores)"
	@$(BIN)/deradiff demo --out demo

test: lint types docs tests ## everything that has to hold: format, lint, types, documentation, tests

lint: $(STAMP) ## ruff (rules and formatting), import-linter (which room may import which), vermin (no newer Python)
	@echo "==> ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "==> import-linter"
	@$(BIN)/lint-imports --no-logo --no-cache
	@echo "==> vermin"
	@$(BIN)/vermin --quiet --no-tips --violations --target=3.11- src studies benchmarks examples tests

types: $(STAMP) ## mypy
	@echo "==> mypy"
	@$(BIN)/mypy

docs: $(STAMP) ## the documentation, strictly, into site/
	@echo "==> mkdocs build --strict"
	@$(BIN)/mkdocs build --strict --quiet

docs-serve: $(STAMP) ## the documentation in a browser, rebuilt as you write
	@$(BIN)/mkdocs serve

# Two workers with one thread each fill two cores better than one with two.
tests: $(STAMP) ## pytest alone
	@echo "==> pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(STAMP) ## every case of every test, the slow ones too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --all-cases

# ComfyUI's own packages must be there, in .venv or named by PYTHONPATH: einops torchsde aiohttp yarl av spandrel kornia
# alembic SQLAlchemy psutil pydantic-settings. torchvision has a stand-in; nothing of ComfyUI is changed.
test-comfyui: $(STAMP) ## the nodes in a checkout of ComfyUI: make test-comfyui COMFYUI=path (minutes)
	@test -n "$(COMFYUI)" || { echo "Name the checkout: make test-comfyui COMFYUI=path"; exit 2; }
	@OMP_NUM_THREADS=1 COMFYUI="$(COMFYUI)" $(BIN)/python -m pytest tests/integrations/comfyui

format: $(STAMP) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

build: $(STAMP) ## wheel and source distribution into dist/
	@echo "==> Building into dist/"
	@$(BIN)/python -m build --no-isolation

bench: $(STAMP) ## the costs, as ratios measured side by side (minutes)
	@$(BIN)/python benchmarks/realignment.py

bench-align: $(STAMP) ## what aligning costs, in the same way
	@$(BIN)/python benchmarks/alignment.py

clean: ## remove what the other commands made, the environment included
	rm -rf $(VENV) build demo dist site .mypy_cache .pytest_cache .ruff_cache
