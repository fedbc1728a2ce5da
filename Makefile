# make demo and make test work from a clean clone on Python 3.11 or later; they set up what is missing first.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.s3nn-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-peers test-neurons test-crosscheck bench check constraints clean

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(SETUP)  ## make .venv with everything pinned (about 1.5 GB with PyTorch)

$(SETUP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing pinned packages into $(VENV) (about 1.5 GB with PyTorch, once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: setup  ## train, export to every target, simulate, verify (builds Lava's interpreter the first time)
	$(BIN)/s3nn-deploy demo --out demo

test: setup  ## run all tests, the real Lava simulation included
	$(BIN)/python -m pytest

test-fast: setup  ## run the tests that need no Lava
	$(BIN)/python -m pytest -m "not lava"

test-peers: setup  ## set up other NIR readers (3 GB) and run our files in them
	$(BIN)/s3nn-deploy setup peers
	S3NN_PEERS_REQUIRED=1 $(BIN)/python -m pytest -m peers

test-neurons: setup  ## install snnTorch, Norse and SpikingJelly beside us and convert networks of their neurons
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[neurons]' -c constraints.txt
	S3NN_NEURONS_REQUIRED=1 $(BIN)/python -m pytest tests/test_peer_neurons.py

test-crosscheck: setup  ## set up SANA-FE and NeuroBench apart and count again with them
	@test -x .crosscheck/bin/python || $(PYTHON) -m venv .crosscheck
	.crosscheck/bin/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	.crosscheck/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary -e '.[crosscheck]'
	S3NN_CROSSCHECK_REQUIRED=1 .crosscheck/bin/python -m pytest tests/test_crosscheck.py

bench: setup  ## set up other tools apart in .bench and time every engine beside them (docs/speed.md)
	@test -x .bench/bin/python || $(PYTHON) -m venv .bench
	.bench/bin/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	.bench/bin/python -m pip install --quiet --disable-pip-version-check -e '.[fast,neurons]' -c constraints.txt
	.bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sinabs==3.1.3 pbr
	.bench/bin/python -m benchmarks.speed
	.bench/bin/python -m benchmarks.speed --counting
	.bench/bin/python -m benchmarks.speed --curve
	.bench/bin/python -m benchmarks.speed --start

check: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

constraints: setup  ## write the installed versions to constraints.txt
	@{ echo "# The versions that make setup installs; regenerate with: make constraints"; \
	   $(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' | sed 's/+cpu$$//'; } > constraints.txt

clean:  ## remove the environment and what was generated
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
