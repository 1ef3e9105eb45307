# `make demo` and `make test` do all the set-up themselves: a virtual environment with pinned packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs kernels fuzz gpu-check clean

demo: $(READY)
	$(BIN)/clipq demo

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --cov=src/clipq --cov-report=term:skip-covered

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

kernels: $(READY)
	$(BIN)/python -m clipq.archive.precompile

FUZZ_SECONDS ?= 60
FUZZ_CORPUS ?= fuzz/corpus

fuzz: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt atheris
	$(BIN)/python fuzz/read_file.py $(FUZZ_CORPUS) fuzz/corpus -max_total_time=$(FUZZ_SECONDS)

GPU_PYTHON ?= python3

gpu-check:
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu.py --tests

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev --group docs -e .
	-$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps torchvision timm # without them, tests are skipped
	touch $(READY)

clean:
	rm -rf $(VENV) site build dist
