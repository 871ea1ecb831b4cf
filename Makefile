# make run        set up .venv and run the default experiment on the data in the package
# make test       set up .venv and run the tests (the minutes-long ones: make test-slow)
# make test-all   the tests on every Python from 3.11 that is found
# make lint types wheel-check lock clean
#
# PYTHON=... picks the interpreter, ARGS=... adds options: make run ARGS="market=gbm seed=1".

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: run test test-slow test-all lint types wheel-check lock clean

# Without bytecode every process would compile JAX and pandas anew.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

is_new_enough := -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	"$$python" $(is_new_enough) 2>/dev/null && { echo "$$python"; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# The versions that were tested, for this Python; a Python without such a file gets the newest of everything.
LOCK = constraints/py$(shell $(BIN)/python -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")').txt
# The same versions without hashes, which pip takes for some of the packages at a time.
pinned = $(VENV)/pinned.txt

run: $(VENV)/.run
	$(BIN)/qpo-sim $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "qpo_sim needs Python 3.11 or newer with venv; name it as make PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml $(wildcard constraints/*.txt)
	if [ -f $(LOCK) ]; then sed -E '/^ +--hash/d; s/ *\\$$//' $(LOCK) > $(pinned); else : > $(pinned); fi
	$(BIN)/python -m pip install --quiet --constraint $(pinned) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	if [ -f $(LOCK) ]; then $(BIN)/python -m pip install --quiet --require-hashes --requirement $(LOCK); \
	else $(BIN)/python -m pip install --quiet --editable '.[test,dev]'; fi
	touch $@

test-all:
	shopt -s nullglob; tried=" "; failed=""; \
	for python in python3 python3.{11,12,13,14,15} $$HOME/.pyenv/versions/3.*/bin/python; do \
		"$$python" $(is_new_enough) 2>/dev/null || continue; \
		version=$$("$$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")'); \
		case "$$tried" in *" $$version "*) continue;; esac; \
		tried="$$tried$$version "; echo "== Python $$version"; \
		$(MAKE) test PYTHON="$$python" VENV=.venv-$$version || failed="$$failed $$version"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed on Python$$failed" >&2; exit 1; fi; \
	echo "passed on Python$$tried"

# The wheel is built from the source distribution and run in an empty folder, so that nothing of the checkout can help.
wheel-check: $(VENV)/.test
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python -m build --outdir "$$folder/dist" . > "$$folder/build.log" || { cat "$$folder/build.log"; exit 1; }; \
	$(BIN)/python -m venv "$$folder/venv"; \
	"$$folder/venv/bin/python" -m pip install --quiet --constraint $(pinned) "$$folder"/dist/*.whl; \
	mkdir "$$folder/empty"; cd "$$folder/empty"; \
	"$$folder/venv/bin/qpo-sim" simulation.n_paths=4096 hydra.run.dir=run; \
	test -s run/result.json; echo "wheel runs in an empty folder"

# Writes constraints/ anew; needs uv and the three interpreters.
lock:
	for minor in 11 12 13; do \
		UV_PYTHON_DOWNLOADS=never uv pip compile pyproject.toml --upgrade --extra test --extra dev --python 3.$$minor \
			--no-emit-index-url --no-header --no-annotate --generate-hashes --quiet --output-file constraints/py3$$minor.txt; \
	done

clean:
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis
