PYTHON ?= python3
# Installed first and by itself: where the index offers a CPU build, later ranges are then already satisfied.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test style

demo: .venv/installed  ## Train, save, reload and sample a small model on real text (under 5 minutes on 2 cores).
	$(BIN)/mohge demo

test: .venv/installed  ## Run the tests on CPU.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

style: .venv/installed  ## Check lint and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@
