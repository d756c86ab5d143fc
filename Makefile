# Everything that a fresh clone needs: Python 3.11, git and make. See README.md.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
OPTIMUM := .venv-optimum
# Two cores are enough, and more threads than cores make every figure worse.
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-optimum test-slow lint docs bench clean

# An environment is ready when the lock and the project's metadata that it was made from have not changed since.
$(READY): requirements/lock.txt
$(OPTIMUM)/.ready: requirements/optimum.txt
%/.ready: pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --requirement $(filter requirements/%,$^)
	$*/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: $(READY)  ## the main job on the embedded model; the report is runs/demo/report.html
	$(RUN)/slimdiff demo --out runs/demo

# A core for each process: with two threads each, two of them take a quarter longer.
test: export OMP_NUM_THREADS := 1
test: $(READY)  ## the test suite, a file at a time on each core
	$(RUN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-optimum: $(OPTIMUM)/.ready  ## optimum opens what we export, and old artifacts open, on its older libraries
	$(OPTIMUM)/bin/python -m pytest -m "optimum or not slow" tests/exporters/test_optimum.py tests/test_old_artifacts.py

test-slow: $(READY)  ## what takes over a minute a test
	$(RUN)/python -m pytest -m "slow and not optimum"

lint: $(READY)  ## ruff, mypy, and the contracts of who imports whom
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

docs: $(READY)  ## the pages, in site/; any warning is an error
	$(RUN)/mkdocs build --quiet

bench: $(READY)  ## the first table of benchmarks/RESULTS.md
	$(RUN)/python -m benchmarks.quality

clean:  ## remove the environments and every build
	rm -rf $(VENV) $(OPTIMUM) runs site
