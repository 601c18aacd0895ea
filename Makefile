# Two commands do everything: `make demo` runs the main job, `make test` checks the code.
# `make demo DATA=folder` runs it on real radar files instead of synthetic SEVIR.

PYTHON ?= python3
BIN := .venv/bin
EARTHFORMER := $(BIN)/earthformer

.PHONY: demo pages test bench clean

ifdef DATA
DEMO := demo/radar
TASK := radar
PRESET := earthformer_radar_tiny
SOURCE := $(DATA)
PAGES := report
else
DEMO := demo
TASK := sevir-lr
PRESET := earthformer_sevir_lr_tiny
SOURCE := demo/raw
PAGES := ensemble guided report
endif
ARCHIVE := $(DEMO)/archive.zarr
RUNS := $(DEMO)/runs
FORECASTS := $(DEMO)/forecasts

# What is there once a stage has finished: its completion record.
DONE := records/complete.json
PREPARED := $(ARCHIVE)/$(DONE)
TRAINED = $(RUNS)/$(1)/run.json
FORECAST = $(FORECASTS)/$(1).zarr/$(DONE)

# An ensemble takes long on a CPU, so that it is made of few windows.
TINY := --task $(TASK) --preset prediff_sevir_lr_tiny --archive $(ARCHIVE)
FEW := --archive $(ARCHIVE) --split test --every 18 --members 64 --keep-members
PREDIFF := $(EARTHFORMER) forecast --run $(RUNS)/denoiser --steps 5 --batch-size 16
GUIDED := $(PREDIFF) --archive $(ARCHIVE) --limit 1 --members 8 --keep-members --alignment $(RUNS)/alignment
REPORT = $(EARTHFORMER) report $(foreach name,$(1),--forecast $(FORECASTS)/$(name).zarr) --archive $(ARCHIVE)

# Stages that need nothing of one another run side by side; no progress bars, which would run into one another.
demo: .venv/installed
	TERM=dumb $(MAKE) --no-print-directory --jobs 2 pages

pages: $(PAGES:%=$(DEMO)/%.html)

demo/raw/CATALOG.csv:
	$(EARTHFORMER) synthesize sevir --out demo/raw --events 48

$(PREPARED): $(if $(DATA),,demo/raw/CATALOG.csv)
	$(EARTHFORMER) prepare $(TASK) --source $(SOURCE) --archive $(ARCHIVE)

$(call TRAINED,earthformer): $(PREPARED)
	$(EARTHFORMER) train earthformer --task $(TASK) --preset $(PRESET) --archive $(ARCHIVE) --run $(RUNS)/earthformer

$(call TRAINED,autoencoder): $(PREPARED)
	$(EARTHFORMER) train autoencoder $(TINY) --run $(RUNS)/autoencoder

$(call TRAINED,denoiser) $(call TRAINED,alignment): $(RUNS)/%/run.json: $(call TRAINED,autoencoder)
	$(EARTHFORMER) train $* $(TINY) --run $(RUNS)/$* --autoencoder $(RUNS)/autoencoder

$(call FORECAST,earthformer): $(call TRAINED,earthformer)
	$(EARTHFORMER) forecast --run $(RUNS)/earthformer --archive $(ARCHIVE) --split test --out $(FORECASTS)/earthformer.zarr

$(call FORECAST,persistence): $(PREPARED)
	$(EARTHFORMER) forecast --forecaster persistence --task $(TASK) --archive $(ARCHIVE) --split test --out $(FORECASTS)/persistence.zarr

$(call FORECAST,displaced): $(PREPARED)
	$(EARTHFORMER) forecast --forecaster displaced --task $(TASK) $(FEW) --out $(FORECASTS)/displaced.zarr

$(call FORECAST,prediff): $(call TRAINED,denoiser)
	$(PREDIFF) $(FEW) --events pipelines/examples/events.yaml --out $(FORECASTS)/prediff.zarr

$(call FORECAST,mu): $(call TRAINED,denoiser) $(call TRAINED,alignment)
	$(GUIDED) --deviations 0 --out $(FORECASTS)/mu.zarr

$(call FORECAST,mu+4sigma): $(call TRAINED,denoiser) $(call TRAINED,alignment)
	$(GUIDED) --deviations 4 --out $(FORECASTS)/mu+4sigma.zarr

$(DEMO)/report.html: $(call FORECAST,persistence) $(call FORECAST,earthformer)
	$(call REPORT,persistence earthformer) --out $@

$(DEMO)/ensemble.html: $(call FORECAST,prediff) $(call FORECAST,displaced)
	$(call REPORT,displaced prediff) --out $@

$(DEMO)/guided.html: $(call FORECAST,mu) $(call FORECAST,mu+4sigma)
	$(call REPORT,mu mu+4sigma) --out $@

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict earthformer
	$(BIN)/mypy pipelines cluster
	$(BIN)/pytest

bench: .venv/installed-test
	$(BIN)/python tests/benchmarks/bench_model.py
	$(BIN)/python tests/benchmarks/bench_prediff.py
	$(BIN)/python tests/benchmarks/bench_prepare.py
	$(BIN)/python tests/benchmarks/bench_sst.py
	$(BIN)/python tests/benchmarks/bench_input.py
	$(BIN)/python tests/benchmarks/bench_remote.py
	$(BIN)/python tests/benchmarks/bench_scale.py
	test ! -d demo/runs/denoiser || $(BIN)/python tests/benchmarks/bench_ensemble.py --run demo/runs/denoiser --archive demo/archive.zarr
	test ! -d demo/runs/denoiser || PATH=$(BIN):$$PATH $(BIN)/python tests/benchmarks/bench_serve.py --run demo/runs/denoiser --archive demo/archive.zarr

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
