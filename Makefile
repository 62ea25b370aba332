# Set-up, demo and tests. Everything lives in .venv/ and output/; nothing else on the machine is touched.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin

# Python 3.11 or 3.12, whatever it is called here.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 && { echo $$p; break; }; done)
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
REQUIREMENTS := $(if $(GPU),requirements.txt,requirements-cpu.txt)
# Type stubs need their own folder: beside the libraries they make `import tensorrt` succeed with nothing in it.
STUBS := tensorrt-stubs==10.13.0.35.1
STAMP := $(VENV)/.installed-$(REQUIREMENTS)

.PHONY: demo gpu-report test lint types setup clean

setup: $(STAMP)

$(STAMP): $(REQUIREMENTS) pyproject.toml Makefile
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11 or 3.12 found" >&2; \
		echo "  hint: apt-get install python3.11 python3.11-venv, or make PYTHON=/path/to/python3.11" >&2; exit 2; fi
	@echo "$(if $(GPU),NVIDIA GPU found,no NVIDIA GPU): installing $(REQUIREMENTS) into $(VENV)/ with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: Python cannot make a virtual environment" >&2; \
		echo "  hint: apt-get install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS) -e '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/typing $(STUBS)
	@sed -i -E -e 's/\bin: (list|Dyn|Plug)/in_: \1/g' -e 's/channel_axis: int\)/channel_axis: int = ...)/' \
		$(VENV)/typing/tensorrt_bindings/tensorrt.pyi  # published with two things that no parser takes
	@rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP)
	@$(BIN)/python build/demo.py

# Installs nothing: it says what is missing. ARGS="--minutes 5", for example.
gpu-report:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(or $(PYTHON),python3)) scripts/gpu_report.py $(ARGS)

test: lint types
	@$(BIN)/python -m pytest

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)
	@$(BIN)/mypy

clean:
	rm -rf output models $(VENV)
