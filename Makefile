# Two commands do everything on a fresh machine: `make demo` and `make test`. Only Python >= 3.11 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint benchmark clean

demo: $(INSTALLED)
	$(BIN)/hyperfade demo --output runs/demo

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/fit_memory.py
	$(BIN)/python benchmarks/fade.py
	$(BIN)/python benchmarks/calibration.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
