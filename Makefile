# make demo   creates .venv, installs, shows the main job on the embedded default
# make test   creates .venv, installs, runs ruff, mypy and the tests
# make slow   the tests that take longer, make gpu those that need a CUDA device

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow gpu lint clean

demo: .venv/installed
	$(BIN)/fgsteer demo

test: .venv/tested lint
	$(BIN)/python -m pytest

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/tested
	$(BIN)/python -m pytest -m slow

gpu: .venv/tested
	$(BIN)/python -m pytest -m gpu

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch goes first and pinned: another package's range could bring a far larger build
.venv/installed: pyproject.toml constraints.txt .venv/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist
