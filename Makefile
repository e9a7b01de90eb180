# Every command sets up .venv by itself, once and again after a change of pyproject.toml or constraints.txt.
PYTHON ?= python3
PROFILE ?= quick
DATA ?= auto
SEED ?= 0

BIN := .venv/bin
READY := .venv/.ready
INSTALL := -c constraints.txt -e ".[notebooks,book,test]"
PYTEST ?= # further words for pytest, such as --durations=25

.DEFAULT_GOAL := help
.PHONY: help setup book html test test-long bench notebooks lab data clean

help: ## list the commands
	@echo "make COMMAND [PYTHON=python3.13] [PROFILE=quick|full] [DATA=auto|cifar100|...|mine.npz] [SEED=0]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1#/p' Makefile | awk -F'#' '{printf "%-12s %s\n", $$1, $$2}'

book: $(READY) ## run every notebook, build the book, print its address
	$(BIN)/python -m minisupernet book --profile "$(PROFILE)" --data "$(DATA)" --seed "$(SEED)"

test: $(READY) ## check the style, the package, and every notebook against its stored outputs
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests -q -n 2 --dist worksteal $(PYTEST)
	$(BIN)/python -m pytest --nbval notebooks -q -n 2 --dist loadfile

test-long: $(READY) ## the same and the nightly part: every page in both schemes, thousands of tries
	MINISUPERNET_LONG=1 $(MAKE) test

html: $(READY) ## build the book from the stored outputs, run nothing
	$(BIN)/python -m minisupernet book --committed

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

data: $(READY) ## download CIFAR-100 and CIFAR-10
	$(BIN)/python -m minisupernet data

bench: $(READY) ## time a training step beside its peers, and rewrite the tables and the figure
	$(BIN)/python -m pip install -q --no-deps --upgrade --target _build/peers -r benchmarks/peers.txt
	$(BIN)/python -W ignore benchmarks/training.py --peers _build/peers --out results/05_speed.json
	$(BIN)/python benchmarks/layers.py --out results/05_layers.json
	$(BIN)/python benchmarks/growth.py --out results/05_growth.json
	$(BIN)/python benchmarks/budget.py --data "$(DATA)" --out results/05_budget.json
	$(BIN)/python benchmarks/speed_report.py

notebooks: $(READY) ## run every notebook and store its outputs in place
	$(BIN)/python -m minisupernet notebooks

setup: $(READY) ## set up .venv and nothing else

clean: ## remove what was built, keep .venv and the images
	rm -rf _build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("This course needs Python 3.11 or later, not %d.%d: use make PYTHON=python3.11" \
	    % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@# uv takes a fraction of pip's time and reads none of its settings: pip does it where it has an index of its own
	! $(BIN)/python -m pip config list | grep -q '\.index-url=' \
	    && $(BIN)/python -m pip install --quiet -c constraints.txt uv \
	    && $(BIN)/python -m uv pip install --compile-bytecode --python $(BIN)/python $(INSTALL) \
	    || $(BIN)/python -m pip install $(INSTALL)
	@touch $@
