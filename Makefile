# make demo     pretrain all three methods on the embedded images, judge, print a table (CPU, minutes)
# make test     the tests (under 10 minutes on 2 cores)
# make test-oldest  the tests with the oldest versions that pyproject.toml allows
# make lint     ruff and mypy
# make slow     the longer checks that guard a promise
# make seeds    the demos with three seeds each, two at a time, kept in results/
# make results  RESULTS.md from results/
# make bench    pairs/s beside lightly and plain torchvision, a step's overhead (a quarter of an hour)
# make bench-job  files to encoder, and kNN against wall time, likewise (20 minutes on two cores)
# make soak     twenty kills of each method, and 20,000 steps
# make results-gpu  what RESULTS.md lacks, on a GPU, hours; MINUTES=10: as much as fits into them; DATA=FOLDER:
#               CIFAR-10 that is there already, else it comes from the Hub
# For exactly the versions that were tested together: make demo PIP_FLAGS='-c constraints.txt'

PYTHON    ?= python3
VENV      ?= .venv
PIP_FLAGS ?=
MINUTES   ?= 0
DATA      ?= uoft-cs/cifar10
BIN       := $(VENV)/bin
READY     := $(VENV)/ready
METHODS   := simclr moco byol
HERE      := PATH="$(CURDIR)/$(BIN):$$PATH"
DEMOS     := $(METHODS:%=runs/%-demo)

.PHONY: demo test test-oldest slow lint bench bench-job seeds results soak results-gpu
demo: $(READY)
	@printf '%s\n' $(METHODS) | $(HERE) xargs -P 2 -I METHOD bash METHOD/reproduce.sh demo
	@$(BIN)/python -m eval.compare $(DEMOS) --out runs

test: $(READY)
	$(BIN)/python -m pytest

test-oldest:
	$(MAKE) test VENV=.venv-oldest PIP_FLAGS='-c constraints-oldest.txt'

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy common eval $(foreach m,$(METHODS),$m/config.py $m/augment.py $m/loss.py $m/optim.py) \
	    simclr/grad_cache.py

bench: $(READY)
	$(BIN)/python tests/benchmarks/throughput.py
	PYTHONPATH=. $(BIN)/python tests/benchmarks/overhead.py

bench-job: $(READY)
	$(BIN)/python tests/benchmarks/job.py

seeds: $(READY)
	printf '%s\n' $(foreach s,1 2 3,$(METHODS:%=%-demo-seed$s)) | $(HERE) xargs -P 2 -I RUN \
	    bash -c 'run=RUN; method=$${run%%-*} seed=$${run##*seed}; \
	        bash $$method/reproduce.sh demo demo runs/$$run --seed $$seed && \
	        python -m eval.compare runs/$$run --keep results'

soak: $(READY)
	for method in $(METHODS); do \
	    OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py kills --method $$method || exit; \
	done
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py steps --record results/soak-simclr.json

results-gpu: $(READY)
	$(BIN)/python -m tests.benchmarks.results_gpu --minutes $(MINUTES) --data "$(DATA)"

results: $(READY)
	$(BIN)/python -m eval.compare --results results

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[dev]'
	touch $@
