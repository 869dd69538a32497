# make run | make test | make docs | make lab: each prepares .venv first, once, and says what it does.
SHELL := /bin/bash
PYTHON ?= python3
NAME ?= default
ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help run test test-slow lint docs lab readme clean
help:
	@echo "make run    learn, distil, judge and report on the shipped folding data -> runs/$(NAME)/report.html (ARGS=\"--quick\" for a taste)"
	@echo "make test   every chapter and every test, $(WORKERS) files at a time (WORKERS=4 on four cores)"
	@echo "make test-slow the long tests and every slow cell in order: hours; the stored results in data/ are written anew"
	@echo "make lint   ruff's checks"
	@echo "make docs   render the book with Quarto -> _docs/"
	@echo "make lab    open the chapters in JupyterLab"
	@echo "make readme five seeds on both proteins; the leaderboards in data/, and README.md with its figure, are written anew"

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "foldbook needs Python 3.11 or newer; this is $$($(PYTHON) --version). Say which with: make PYTHON=python3.12 ..."; exit 1; }
	@if command -v uv > /dev/null; then \
	  echo "Setting up .venv with uv (about a minute)"; \
	  { test -x $(BIN)/python || uv venv -q --python $(PYTHON) .venv; } && uv pip install -q --python $(BIN)/python -e '.[dev]' -c constraints.txt; \
	else \
	  echo "Setting up .venv with pip (two to five minutes)"; \
	  { test -x $(BIN)/python || $(PYTHON) -m venv .venv; } && $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt; \
	fi
	@touch $@

run: .venv/.ready
	@echo "Running the main job; it can be stopped and started again at any point"
	@$(BIN)/foldbook run --out runs/$(NAME) $(ARGS)

readme: .venv/.ready
	@echo "Five seeds on two proteins, and trajectories that did not exist before: half an hour; it can be stopped and started again at any point"
	@$(BIN)/foldbook run --data villin_go --seeds 5 --out runs/villin_go --readme README.md $(ARGS)
	@$(BIN)/foldbook run --data bba_go --seeds 5 --students lstm:martingale,lstm:outcome,lstm:teacher_mse,transformer:martingale,mlp:variational,residue:martingale --out runs/bba_go $(ARGS)
	@$(BIN)/foldbook simulate go --system villin_go --out runs/fresh --trajectories 2 --frames 10000 --steps-per-frame 1500 --seed 20261201
	@$(BIN)/foldbook judge runs/villin_go --traj 'runs/fresh/*.xtc' --json data/fresh_villin_go.json || true
	@for name in villin_go bba_go; do cp runs/$$name/leaderboard.json data/leaderboard_$$name.json; done

test: .venv/.ready
	@echo "Running every chapter and every test"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: .venv/.ready
	@echo "Running the slow cells chapter by chapter, then the slow tests: hours"
	@$(BIN)/nbdev-test --flags slow --n-workers 0 --cell-timeout 0
	@$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile $(ARGS)

lint: .venv/.ready
	@$(BIN)/ruff check

docs: .venv/.ready
	@command -v quarto > /dev/null || { echo "make docs needs Quarto 1.7 or newer: install it from https://quarto.org/docs/get-started or with: $(BIN)/pip install -e '.[docs]'"; exit 1; }
	@echo "Rendering the book into _docs/"
	@$(BIN)/nbdev-docs

# nbdev-install-hooks writes Jupyter's save hook below HOME: here HOME is this repository, so that the user's own configuration stays as it is.
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/.jupyter
lab: .venv/.ready
	@echo "nbdev's hooks clean notebooks when they are saved and merged. They are written to .jupyter/, .git/, .gitconfig and .gitattributes here; your ~/.jupyter stays as it is"
	@HOME="$(CURDIR)" $(BIN)/nbdev-install-hooks
	@$(BIN)/jupyter lab nbs

clean:
	rm -rf _docs _proc .pytest_cache
