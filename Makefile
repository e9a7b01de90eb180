# Every command sets up .venv by itself, once and again after a change of pyproject.toml or constraints.txt.
PYTHON ?= python3
PROFILE ?= quick
DATA ?= auto
SEED ?= 0
CHAPTERS ?= # chapters for Colab, such as "5 10"; without, all
COLAB ?= file://$(CURDIR)/.ci/colab-runtime
COLAB_PYTHON ?= # instead of the Python that Colab has
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

VENV ?= .venv
LIMITS ?= -c constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(LIMITS) -e ".[notebooks,book,test]"
SINGLE := _build/print/_build/singlehtml
PYTEST ?= # further words for pytest, such as --durations=25

.DEFAULT_GOAL := help
.PHONY: help setup book html print test style checks quick test-long test-newest links colab bench notebooks lab data clean

help: ## list the commands
	@echo "make COMMAND [PYTHON=python3.13] [PROFILE=quick|full] [DATA=auto|cifar100|...|mine.npz] [SEED=0]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1#/p' Makefile | awk -F'#' '{printf "%-14s %s\n", $$1, $$2}'

book: $(READY) ## run every notebook, build the book, print its address
	$(BIN)/python -m minisupernet book --profile "$(PROFILE)" --data "$(DATA)" --seed "$(SEED)"

test: style checks ## check the style, the package, and every notebook against its stored outputs

style: $(READY) ## check the style alone
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .

checks: $(READY)
	$(BIN)/python -m pytest tests -q -n 2 --dist worksteal $(PYTEST)
	$(BIN)/python -m pytest --nbval notebooks -q -n 2 --dist loadfile

test-long: $(READY) ## the same and the nightly part: every page in both schemes, thousands of tries
	MINISUPERNET_LONG=1 $(MAKE) test
	$(MAKE) quick

quick: $(READY) ## run every chapter by itself, in 45 seconds at most
	rm -rf _build/sweeps/quick
	$(BIN)/python -m minisupernet sweep sweeps/quick.yaml --workers 1 --threads 2 --timeout 45

test-newest: ## the tests with the newest version of every package, in an environment of its own
	rm -rf _build/newest
	$(MAKE) setup VENV=_build/newest LIMITS=
	_build/newest/bin/python -m pip list
	$(MAKE) checks VENV=_build/newest LIMITS=

links: html ## follow every link that leaves the book
	$(BIN)/jupyter-book build --builder linkcheck --path-output _build/links _build/committed/source

colab: $(READY) ## run chapters as Colab does [CHAPTERS="5 10"]: its Python, its packages, the first cell alone
	$(BIN)/python -m pip install -q -c constraints.txt uv
	.ci/colab "$(COLAB)" "$(COLAB_PYTHON)" $(CHAPTERS)

html: $(READY) ## build the book from the stored outputs, run nothing
	$(BIN)/python -m minisupernet book --committed

print: html ## build the book and print it into one PDF, by Chromium
	@test -n "$(CHROMIUM)" || { echo "make print needs Chromium: apt install chromium"; exit 1; }
	$(BIN)/jupyter-book build --all --builder singlehtml --path-output _build/print _build/committed/source
	sed 's|href="book/intro.html#|href="#|g' $(SINGLE)/book/intro.html > $(SINGLE)/index.html
	rm -f _build/book.pdf
	"$(CHROMIUM)" --headless --no-sandbox --disable-gpu --no-pdf-header-footer --generate-pdf-document-outline \
	    --virtual-time-budget=120000 --print-to-pdf=_build/book.pdf "file://$(CURDIR)/$(SINGLE)/index.html"
	@test -s _build/book.pdf && echo "The book: file://$(CURDIR)/_build/book.pdf"

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
	$(PYTHON) -m venv $(VENV)
	@# uv takes a fraction of pip's time and reads none of its settings: pip does it where it has an index of its own
	! $(BIN)/python -m pip config list | grep -q '\.index-url=' \
	    && $(BIN)/python -m pip install --quiet $(LIMITS) uv \
	    && $(BIN)/python -m uv pip install --compile-bytecode --python $(BIN)/python $(INSTALL) \
	    || $(BIN)/python -m pip install $(INSTALL)
	@touch $@
