# Two commands do everything: `make demo` runs the main job, `make test` checks the code.
# `make demo DATA=folder` runs it on real radar files instead of synthetic SEVIR.

PYTHON ?= python3
BIN := .venv/bin
EARTHFORMER := $(BIN)/earthformer

.PHONY: demo demo-earthformer demo-prediff test bench clean

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

# PreDiff: an ensemble takes long on a CPU, so that it is made of few windows.
RUNS := $(HOME_OF_DEMO)/runs
TINY := --task $(TASK) --preset prediff_sevir_lr_tiny --archive $(ARCHIVE)
FEW := --archive $(ARCHIVE) --split test --every 18
PREDIFF := $(EARTHFORMER) forecast --run $(RUNS)/denoiser --steps 5 --batch-size 16
GUIDED := $(PREDIFF) --archive $(ARCHIVE) --limit 1 --members 8 --keep-members --alignment $(RUNS)/alignment
ENSEMBLES := $(foreach name,displaced earthformer-few prediff,--forecast $(FORECASTS)/$(name).zarr) --archive $(ARCHIVE)
MU := $(foreach name,mu mu+4sigma,--forecast $(FORECASTS)/$(name).zarr) --archive $(ARCHIVE)

demo: demo-earthformer
ifndef DATA
demo: demo-prediff
endif

demo-earthformer: .venv/installed
ifndef DATA
	$(EARTHFORMER) synthesize sevir --out $(SOURCE) --events 72
endif
	$(EARTHFORMER) prepare $(TASK) --source $(SOURCE) --archive $(ARCHIVE)
	$(EARTHFORMER) train earthformer --task $(TASK) --preset $(PRESET) --archive $(ARCHIVE) --run $(RUN)
	$(EARTHFORMER) forecast --run $(RUN) --archive $(ARCHIVE) --split test --out $(FORECASTS)/earthformer.zarr
	$(EARTHFORMER) forecast --forecaster persistence --task $(TASK) --archive $(ARCHIVE) --split test --out $(FORECASTS)/persistence.zarr
	$(EARTHFORMER) report $(BOTH) --out $(HOME_OF_DEMO)/report.html

demo-prediff: demo-earthformer
	$(EARTHFORMER) train autoencoder $(TINY) --run $(RUNS)/autoencoder
	$(EARTHFORMER) train denoiser $(TINY) --run $(RUNS)/denoiser --autoencoder $(RUNS)/autoencoder
	$(EARTHFORMER) train alignment $(TINY) --run $(RUNS)/alignment --autoencoder $(RUNS)/autoencoder
	$(PREDIFF) $(FEW) --members 64 --keep-members --events pipelines/examples/events.yaml --out $(FORECASTS)/prediff.zarr
	$(EARTHFORMER) forecast --run $(RUN) $(FEW) --out $(FORECASTS)/earthformer-few.zarr
	$(EARTHFORMER) forecast --forecaster displaced --task $(TASK) $(FEW) --members 64 --keep-members --out $(FORECASTS)/displaced.zarr
	$(GUIDED) --deviations 0 --out $(FORECASTS)/mu.zarr
	$(GUIDED) --deviations 4 --out $(FORECASTS)/mu+4sigma.zarr
	$(EARTHFORMER) report $(MU) --out $(HOME_OF_DEMO)/guided.html
	$(EARTHFORMER) report $(ENSEMBLES) --out $(HOME_OF_DEMO)/ensemble.html

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict earthformer
	$(BIN)/mypy pipelines
	$(BIN)/pytest

bench: .venv/installed-test
	$(BIN)/python tests/benchmarks/bench_model.py
	$(BIN)/python tests/benchmarks/bench_prediff.py
	$(BIN)/python tests/benchmarks/bench_prepare.py
	test ! -d demo/runs/denoiser || $(BIN)/python tests/benchmarks/bench_ensemble.py --run demo/runs/denoiser --archive demo/archive.zarr

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
