# `make quickstart` runs the main job, `make test` the tests; both set up everything they need on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-large conformance lint format

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

# The stamp is newer than pyproject.toml only after a complete installation.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed ## Train a zoo, tokenize it, pretrain, embed, generate; writes quickstart/report.html
	$(BIN)/hf-wsl quickstart --output_dir quickstart

test: $(VENV)/.installed ## Run the tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-large: $(VENV)/.installed ## Run the tests that `make test` leaves out: compiled kernels, the largest architectures
	$(BIN)/python -m pytest -q -m large

conformance: $(VENV)/.installed ## Try checkpoints of every kind; writes the table in docs/checkpoints.md
	PYTHONPATH=.:tests/fixtures $(BIN)/python tests/conformance/report.py

lint: $(VENV)/.installed ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed ## Mend style where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
