# `make quickstart` and `make test` do all set-up. On a machine without a GPU torch comes from its CPU build (constraints-cpu.txt).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)

SGLANG_DEVICE := cpu
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help quickstart quickstart-sglang sglang test test-kills test-faults test-slow test-sglang check bench clean
help:
	@echo "make quickstart   set up, then train a tiny code model with the real processes on two CPU cores"
	@echo "make sglang       build the environment of the SGLang server (SGLANG_DEVICE=cpu or cuda)"
	@echo "make quickstart-sglang  the same run on real SGLang servers on the CPU"
	@echo "make test         set up, then run the tests (minutes)"
	@echo "make test-kills   one small run, killed twenty times (minutes)"
	@echo "make test-faults  kills, hangs and full disks on small runs (minutes)"
	@echo "make test-slow    the long tests"
	@echo "make test-sglang  the tests that need a real SGLang server"
	@echo "make check        style, types and import rules"
	@echo "make bench        every benchmark that needs no extra package"
	@echo "make clean        remove the environment and what tools left behind"

$(READY): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "rlsys needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	@echo "setting up $(VENV): about 1.7 GB, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[dev]"
	@touch $@

quickstart: $(READY)
	@$(BIN)/rlsys up configs/quickstart.yaml --run-dir $(RUN)
	@$(BIN)/python -m benchmarks.overlap $(RUN)

sglang: $(READY)
	@$(BIN)/rlsys engines install sglang --device $(SGLANG_DEVICE)

quickstart-sglang: sglang
	@$(BIN)/rlsys up configs/quickstart-sglang.yaml --run-dir runs/quickstart-sglang-$(shell date +%Y%m%d-%H%M%S)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-kills: $(READY)
	$(BIN)/python -m pytest -m faults tests/system/test_survival.py -k twenty

test-faults: $(READY)
	$(BIN)/python -m pytest -m faults

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-sglang: sglang
	$(BIN)/python -m pytest -m sglang

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.transport

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
