# make demo     pretrain on the embedded images, evaluate, print a table (CPU, minutes)
# make test     the tests (under 10 minutes on 2 cores)
# make lint     ruff and mypy
# make slow     the longer checks that guard a promise
# For exactly the versions that were tested together: make demo PIP_FLAGS='-c constraints.txt'

PYTHON    ?= python3
VENV      ?= .venv
PIP_FLAGS ?=
BIN       := $(VENV)/bin
READY     := $(VENV)/ready

.PHONY: demo test slow lint bench results
demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash simclr/reproduce.sh demo

test: $(READY)
	$(BIN)/python -m pytest

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy common eval $(foreach m,simclr moco byol,$m/config.py $m/augment.py $m/loss.py $m/optim.py)

bench: $(READY)
	$(BIN)/python tests/benchmarks/throughput.py

results: $(READY)
	$(BIN)/python -m eval.compare --results results

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[dev]'
	touch $@
