PYTHON ?= python3
BIN := .venv/bin

# Rebuilt when what is to be installed has changed; each target does the whole set-up itself.
.venv/.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# An oracle of tests. Its own dependencies draw a torch with CUDA; what the tests ask of it needs none of them.
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt byzfl
	@touch $@

.PHONY: setup demo test test-gpu lightning-suite benchmark-quick lint clean

setup: .venv/.ok  ## create .venv with everything

demo: .venv/.ok  ## six processes, one malicious: about three minutes on two cores
	$(BIN)/python examples/shakespeare/demo.py

# A process a core, up to four. A file's tests stay together, and files in order: those that start processes come before the many
# fast ones, which fill what is left.
test: .venv/.ok  ## the whole suite, doctests included
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-gpu: .venv/.ok  ## only the tests that need a GPU, or two; ends with a table of what was found, and what was skipped and why
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest tests/distributed/test_gpu.py -m gpu -n 0 -rs

lightning-suite: .venv/.ok  ## Lightning's own tests with this strategy: make lightning-suite LIGHTNING=path/to/a/checkout
	$(BIN)/python -m tests.lightning_suite.run $(LIGHTNING)

benchmark-quick: .venv/.ok  ## has detection got worse? about two minutes; fails if it has
	rm -rf runs/benchmark-quick
	$(BIN)/lightning-sentinel benchmark detection --quick --output runs/benchmark-quick

lint: .venv/.ok  ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .torch_extensions
