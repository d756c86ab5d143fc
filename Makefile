# Everything that a fresh clone needs: Python 3.11, git and make. See README.md.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
# Two cores are enough, and more threads than cores make every figure worse.
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow lint bench clean

# An environment is ready when the lock and the project's metadata that it was made from have not changed since.
$(READY): requirements/lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --requirement requirements/lock.txt
	$(RUN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: $(READY)  ## the main job on the embedded model; the report is runs/demo/report.html
	$(RUN)/slimdiff demo --out runs/demo

test: $(READY)  ## the test suite, a file at a time on each core
	$(RUN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)  ## what takes over a minute a test
	$(RUN)/python -m pytest -m slow

lint: $(READY)  ## ruff and mypy
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(READY)  ## the figures in the README
	$(RUN)/python -m benchmarks.quality

clean:  ## remove the environment and every build
	rm -rf $(VENV) runs
