# Two commands do everything: `make demo` runs the main job, `make test` checks the code.
# `make demo DATA=folder` runs it on real radar files instead of synthetic SEVIR.

PYTHON ?= python3
BIN := .venv/bin
EARTHFORMER := $(BIN)/earthformer

.PHONY: demo test bench clean

ifdef DATA
HOME_OF_DEMO := demo/radar
TASK := radar
PRESET := earthformer_radar_tiny
SOURCE := $(DATA)
else
HOME_OF_DEMO := demo
TASK := sevir-lr
PRESET := earthformer_sevir_lr_tiny
SOURCE := demo/raw
endif
ARCHIVE := $(HOME_OF_DEMO)/archive.zarr
RUN := $(HOME_OF_DEMO)/runs/earthformer
FORECASTS := $(HOME_OF_DEMO)/forecasts
BOTH := --forecast $(FORECASTS)/persistence.zarr --forecast $(FORECASTS)/earthformer.zarr --archive $(ARCHIVE)

demo: .venv/installed
ifndef DATA
	$(EARTHFORMER) synthesize sevir --out $(SOURCE) --events 72
endif
	$(EARTHFORMER) prepare $(TASK) --source $(SOURCE) --archive $(ARCHIVE)
	$(EARTHFORMER) train earthformer --task $(TASK) --preset $(PRESET) --archive $(ARCHIVE) --run $(RUN)
	$(EARTHFORMER) forecast --run $(RUN) --archive $(ARCHIVE) --split test --out $(FORECASTS)/earthformer.zarr
	$(EARTHFORMER) forecast --forecaster persistence --task $(TASK) --archive $(ARCHIVE) --split test --out $(FORECASTS)/persistence.zarr
	$(EARTHFORMER) report $(BOTH) --out $(HOME_OF_DEMO)/report.html
	$(EARTHFORMER) score $(BOTH)

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict earthformer
	$(BIN)/mypy pipelines
	$(BIN)/pytest

bench: .venv/installed-test
	$(BIN)/python tests/benchmarks/bench_model.py
	$(BIN)/python tests/benchmarks/bench_prepare.py

clean:
	rm -rf demo .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@ .venv/installed
