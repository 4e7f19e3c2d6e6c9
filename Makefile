# The two commands: `make test` and `make demo`. The rest is for developers.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup test test-all demo check format readme clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard src/rorqual/kernels/native/*.cpp src/rorqual/kernels/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -e ".[serve,rl,dev]"
	touch $(STAMP)

test: setup
	$(BIN)/python -m pytest -q

test-all: setup
	$(BIN)/python -m pytest -q -m "slow or not slow"

demo: setup
	$(BIN)/rorqual demo

check: setup
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format src tests bench
	$(BIN)/ruff check --fix src tests bench

readme: setup
	$(BIN)/python bench/readme.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info
