# The two commands a newcomer needs are `make demo` and `make test`; all targets are idempotent.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all lock clean

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml scripts/install
	PYTHON=$(PYTHON) scripts/install
	touch $@

demo: setup
	$(BIN)/shoal demo

test: setup
	scripts/check

test-all: setup
	scripts/check --all

lock: setup
	scripts/lock

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
