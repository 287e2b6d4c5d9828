# Every target sets up what it needs in .venv on first use: `make demo` and `make test` from a bare clone are enough.
# Written for GNU make 3.81, which macOS ships.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PROMPT ?=
OUTPUT ?= output/demo.png
ARGS ?=
# Processes that share the tests; 0: this one alone, as a debugger wants it.
WORKERS ?= auto
DATA ?=

VENV := .venv
PY := $(VENV)/bin/python
SPREAD = --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile
export PROMPT COMFYUI_PATH COMFYUI_PYTHON

.PHONY: help demo test lint bench native comfyui test-host clean

help:
	@echo 'make demo                      draw a labelled sheet into $(OUTPUT); PROMPT="..." for your own'
	@echo 'make test                      lint, then run the tests'
	@echo 'make lint                      ruff alone'
	@echo 'make native                    build the CPU scan kernel from native/'
	@echo 'make bench                     measure, and write docs/performance.md; DATA=... for retrieval'
	@echo 'make comfyui COMFYUI_PATH=...  run workflows/ in a real ComfyUI and save its pictures'
	@echo 'make test-host COMFYUI_PATH=...  run the tests that need a real ComfyUI'
	@echo 'make clean                     remove .venv, output/ and caches'
	@echo 'WORKERS=0                      one process for the tests; default: one for each processor, up to four'
	@echo 'PYTHON=... and TORCH=... choose the interpreter and the torch for .venv'

# The stamps are newer than what they were made from, so a changed pyproject.toml installs again.
$(VENV)/ready: pyproject.toml tools/environment.py
	@$(PYTHON) tools/environment.py $(VENV) --torch '$(TORCH)' --extras test
	@touch $@

$(VENV)/ready-bench: $(VENV)/ready
	@$(PYTHON) tools/environment.py $(VENV) --torch '$(TORCH)' --extras test,bench
	@touch $@

demo: $(VENV)/ready
	@$(PY) -m zigma demo --output '$(OUTPUT)' $(if $(PROMPT),--prompt "$$PROMPT")

test: lint
	@$(PY) -m pytest $(SPREAD) $(ARGS)

lint: $(VENV)/ready
	@$(PY) -m ruff check .

bench: $(VENV)/ready-bench
	@$(PY) benchmarks/report.py $(ARGS)
	@$(PY) benchmarks/retrieval.py $(if $(DATA),--data '$(DATA)')

native: $(VENV)/ready
	@$(PY) native/build.py $(ARGS)

comfyui: $(VENV)/ready
	@$(PY) workflows/run.py $(ARGS)

test-host: $(VENV)/ready
	@$(PY) -m pytest tests/host -rs $(SPREAD) $(ARGS)

clean:
	rm -rf $(VENV) output build .pytest_cache .ruff_cache .hypothesis *.egg-info
