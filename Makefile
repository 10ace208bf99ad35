# `make reproduce` and `make test` set up what they need.  PYTHON=python3.12 make ... picks the interpreter;
# TORCH_INDEX, an index of wheels, is where PyTorch is installed from without CUDA.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
PROFILE ?= quick
ARGS ?=
TORCH_INDEX ?=

.PHONY: reproduce demo test lint types units notebooks faults planted cluster gpu book lab browser lock refresh clean

reproduce: $(VENV)/installed          ## run every notebook from nothing, one a core, and print the report
	$(BIN)/python -m fsp.compendium.reproduce --profile $(PROFILE) $(ARGS)

demo: $(VENV)/installed               ## two minutes: the overview from nothing, thirty small trainings, and where to look
	rm -rf reproduced/demo
	$(BIN)/python -m fsp.compendium.reproduce --profile full --only 00 --out reproduced/demo
	@echo
	@echo "the overview you have just computed   reproduced/demo/notebooks/00_overview.ipynb   (make lab opens the committed one)"
	@echo "what a mask's graph is, in a picture  reproduced/demo/figures/00_overview.png"
	@echo "your numbers beside the committed     reproduced/demo/report.html"

test: lint units notebooks            ## everything that must hold before a commit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# As for the book, its packages come on top of the pinned ones.
types: $(VENV)/installed              ## mypy, over what the package offers
	@$(BIN)/python -c "import mypy" 2>/dev/null || \
	  $(PIP) -c requirements.lock -e ".[types]"
	$(BIN)/python -m mypy

# One thread a process: two processes of two threads each, on two cores, take four times as long for small networks.
units: $(VENV)/installed              ## unit tests, doctests, and each notebook's smoke profile through papermill
	OMP_NUM_THREADS=1 FSP_PROGRESS=0 $(BIN)/python -m pytest -q -n auto --dist worksteal --durations=10 -m "not slow and not services and not browser"

notebooks: $(VENV)/installed          ## the committed notebooks still give the outputs they were committed with
	$(BIN)/python -m fsp.compendium.reproduce --check

planted: $(VENV)/installed            ## put wrong lines into a copy, one at a time, see a test fail at each, and write the table
	FSP_PROGRESS=0 FSP_PLANTED=data/results/planted.md $(BIN)/python -m pytest -q -m slow tests/test_planted.py $(ARGS)

faults: $(VENV)/installed             ## kill a long sweep some fifty times (ten minutes) and write what happened
	FSP_PROGRESS=0 FSP_FAULTS=data/results/faults.md $(BIN)/python -m pytest -q -m slow -k fifty_kills tests/runs/test_cluster.py

# Needs programs of the system: on Debian, apt-get install openssh-server munge slurm-wlm.  Without them it says so.
cluster: $(VENV)/installed            ## sweep through an SSH server and a one-node Slurm of its own, and write what happened
	@$(BIN)/python -c "import dask_jobqueue, paramiko" 2>/dev/null || \
	  $(PIP) -e ".[cluster]"
	FSP_PROGRESS=0 FSP_CLUSTER=data/results/cluster.md $(BIN)/python -m pytest -q -rs --show-capture=no -m services tests/runs/test_services.py

gpu: $(VENV)/installed                ## run the tests that need a GPU, measure on it (eight minutes), and write the table
	FSP_PROGRESS=0 $(BIN)/python -m fsp.compendium.gpu $(ARGS)

# Its packages come on top of the pinned ones and change none of them.  After they are installed it needs no network.
book: $(VENV)/installed               ## the pages, notebooks and docstrings as a site in build/book
	@$(BIN)/python -c "import furo, myst_nb, numpydoc" 2>/dev/null || \
	  $(PIP) -c requirements.lock -e ".[book]"
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/book
	@echo "open build/book/index.html"

lab: $(VENV)/installed                ## the repository in JupyterLab, its overview open
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" $(firstword $(wildcard notebooks/00_*.ipynb))

# Needs a browser of the system: on Debian, apt-get install chromium chromium-driver.  Without it it says so.
browser: $(VENV)/installed            ## what a reader does first in JupyterLab, in a headless Chromium; pictures in build/browser
	@$(BIN)/python -c "import selenium" 2>/dev/null || \
	  $(PIP) -c requirements.lock -e ".[browser]"
	$(BIN)/python -m pytest -q -rs -m browser tests/test_browser.py

refresh: $(VENV)/installed            ## recompute the committed notebooks, tables, figures and pages of claims
	$(BIN)/python -m fsp.compendium.reproduce --refresh $(ARGS)

lock:                                 ## needs uv; writes exact pins for every supported Python and platform
	uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --no-annotate -o requirements.lock

ifeq ($(TORCH_INDEX),)
PIN = $(PIP) -r requirements.lock
else
PIN = $(PIP) --no-deps --index-url "$(TORCH_INDEX)" $$(grep -E '^torch(vision)?==' requirements.lock) && \
  grep -v -E '^(cuda|nvidia|triton)\b' requirements.lock > $(VENV)/without-cuda.txt && $(PIP) -r $(VENV)/without-cuda.txt
endif

# Reinstall only when the pins or the package description changed in content, not in time stamp.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python >= 3.11 is needed, {v[0]}.{v[1]} found: make PYTHON=python3.12")'
	@if ! cat requirements.lock pyproject.toml | cmp -s - $@; then \
	  echo "installing the pinned packages into $(VENV), once ($(if $(TORCH_INDEX),1.6 GB,6 GB with CUDA))"; \
	  rm -f $@; \
	  $(PYTHON) -m venv $(VENV) && \
	  $(PIN) && \
	  $(PIP) --no-deps -e . && \
	  cat requirements.lock pyproject.toml > $@.new && mv $@.new $@; \
	fi
	@touch $@

clean:                                ## remove what the two commands made; records in data/runs stay
	rm -rf $(VENV) reproduced build *.egg-info .hypothesis .ruff_cache .coverage
