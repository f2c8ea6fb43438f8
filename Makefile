# make help lists what there is. PYTHON: the interpreter that the environment is made from, 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Networks that tests compare with. What the tests import of them needs nothing else; what they ask for besides (an
# older sympy than torch's, numba, hydra) stays away.
COMPARED := schnetpack egnn-pytorch dive-into-graphs
# Beside the loaders of others, which need older packages: an environment of their own.
PEERS := .venv-peers
WITH_PEERS := benchmarks/loader.py benchmarks/planning.py
# The others are what these share.
SHARED := $(addprefix benchmarks/,costs.py formats.py measure.py published.py ranks.py)
BENCHMARKS := $(sort $(filter-out $(WITH_PEERS) $(SHARED),$(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help env pretrain test end-to-end lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

env: $(INSTALLED) ## make .venv with everything the other targets need

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[bench,chem,dev,slurm]'
	$(BIN)/pip install -c constraints.txt --no-deps $(COMPARED)
	touch $@

pretrain: env ## pre-train in two stages on the bundled molecules, as two processes
	$(BIN)/python launch/local.py --processes 2 --config configs/quickstart-stage1.yaml
	$(BIN)/python launch/local.py --processes 2 --config configs/quickstart.yaml

# Many small pieces of work: threads would only fight over the cores.
test: export OMP_NUM_THREADS = 1
test: lint ## check the style and the arrows between folders, then run all tests
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/end_to_end
	$(MAKE) end-to-end

# Runs of several processes, one after another; those under SLURM, which wait most of the time, beside the others.
end-to-end: export OMP_NUM_THREADS = 1
end-to-end: env
	@said=$$(mktemp); $(BIN)/pytest tests/end_to_end/slurm > $$said 2>&1 & slurm=$$!; \
	$(BIN)/pytest tests/end_to_end --ignore tests/end_to_end/slurm; code=$$?; \
	wait $$slurm || code=$$?; cat $$said; rm $$said; exit $$code

lint: env ## check the style and the arrows between folders
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

bench: env $(PEERS)/.installed ## run every benchmark, one after another
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	set -e; for file in $(BENCHMARKS); do $(BIN)/python $$file; done
	set -e; for file in $(WITH_PEERS); do $(PEERS)/bin/python $$file; done

$(PEERS)/.installed: pyproject.toml benchmarks/constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -c benchmarks/constraints.txt -e '.[peers]'
	touch $@

clean: ## remove the environment, runs and caches
	rm -rf .venv $(PEERS) runs build *.egg-info .hypothesis .pytest_cache .ruff_cache .import_linter_cache
	find mspt shards launch benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
