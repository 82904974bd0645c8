# Every target works in a fresh clone: python3 and make are all it needs, the environment (.venv) is set up when missing.
# Options: PROFILE=quick|lite|paper (make sweep: long, too)  RESULTS=folder  TIME_LIMIT=seconds  PYTHON=python3.12  TORCH_BACKEND=cpu|cu130|...

PYTHON      ?= python3
PROFILE     ?= quick
RESULTS     ?= build/results
CONSTRAINTS ?= constraints.txt

PY        := .venv/bin/python
READY     := .venv/.ready
FLOWER    := .venv/.flower
ENCRYPTED := .venv/.encrypted
INSTALL   := $(PY) -m uv pip install --python $(PY) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) \
             $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))

# The environment stands on its own: nothing of a conda or virtual environment that happens to be active reaches it.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX PIP_USER UV_SYSTEM_PYTHON MPLBACKEND

# Nothing is written to the home directory. Caches that the user has placed elsewhere (XDG_CACHE_HOME, UV_CACHE_DIR) are used.
STATE := $(CURDIR)/.venv
XDG_CACHE_HOME ?= $(CURDIR)/build/cache
export XDG_CACHE_HOME
export MPLCONFIGDIR        := $(STATE)/matplotlib
export IPYTHONDIR          := $(STATE)/ipython
export JUPYTER_CONFIG_DIR  := $(STATE)/jupyter/config
export JUPYTER_DATA_DIR    := $(STATE)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(STATE)/jupyter/runtime
export CUDA_CACHE_PATH     := $(STATE)/cuda

# Tests side by side, a process of one thread per core, up to four: each holds torch.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
# Each target uses all cores by itself; side by side they would only disturb one another (and share one environment).
.NOTPARALLEL:
.PHONY: help setup doctor test reproduce notebooks figures sweep compare test-slow flower flower-test gpu bench lint lab \
        clean clean-env

help:       ## show this list
	@sed -n 's/^\([a-z-]*\): *[^#]*## */\1|/p' $(firstword $(MAKEFILE_LIST)) \
	  | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'
	@sed -n 's/^# Options: /  options:  /p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## create .venv and install everything, pinned by constraints.txt

# Run as a file, not as a module: it has to speak also where torch, and with it the package, cannot be imported.
doctor: $(READY) ## versions, GPU, data and disk; one line per fault
	@$(PY) -P feddip_lite/doctor.py

test: $(READY)   ## the tests, then every notebook with its quick profile
	MPLBACKEND=Agg OMP_NUM_THREADS=1 $(PY) -m pytest $(SIDE_BY_SIDE) tests
	$(PY) -m pytest $(SIDE_BY_SIDE) --nbmake --nbmake-timeout=900 notebooks

reproduce: $(READY) ## run all notebooks into build/$(PROFILE)/ and write one HTML report
	$(PY) tools/reproduce.py --profile $(PROFILE)

notebooks: $(READY) ## run all notebooks on the quick profile, and keep their outputs in notebooks/
	$(PY) tools/reproduce.py --profile quick
	$(PY) tools/notebooks.py

figures: $(READY) ## redraw every figure and table from results/, no training
	$(PY) tools/publish.py

sweep: $(READY)  ## train the runs of params/$(PROFILE).yaml again into $(RESULTS); resumable
	$(PY) -m feddip_lite sweep params/$(PROFILE).yaml --results $(RESULTS) $(if $(TIME_LIMIT),--time-limit $(TIME_LIMIT))

compare: $(READY) ## does each run in $(RESULTS) fall inside the interval recorded in results/$(PROFILE)?
	$(PY) tools/compare.py --recorded results/$(PROFILE) --fresh $(RESULTS)

test-slow: $(READY) ## the long tests
	MPLBACKEND=Agg $(PY) -m pytest -m slow tests

flower: $(FLOWER) ## the same rounds in one process and on Flower, simulated and deployed here: the same bits?
	$(PY) tools/flower.py --folder build/flower

flower-test: $(FLOWER) ## all tests of the federation on Flower, with real processes
	MPLBACKEND=Agg $(PY) -m pytest -m "slow or not slow" tests/flower/test_flower_server.py tests/flower/test_flower_processes.py \
	  tests/flower/test_flower_machines.py

# A machine rented by the minute has no .venv, and needs none: python3 with torch and pytest.
gpu:             ## all that a GPU is asked for, in MINUTES=8 into OUT=build/gpu; DEVICE=cpu rehearses
	$(PYTHON) tools/gpu.py --minutes $(or $(MINUTES),8) --out $(or $(OUT),build/gpu) --device $(or $(DEVICE),cuda) \
	  $(if $(COMMIT),--commit $(COMMIT)) $(if $(JOIN),--join $(JOIN)) $(if $(RESUME),--resume $(RESUME)) \
	  $(if $(QUEUE),--queue $(QUEUE)) $(if $(STEPS),--steps $(STEPS)) $(if $(PROCESSES),--processes $(PROCESSES))

bench: $(READY)  ## time the engine against stock operators, and the codecs
	$(PY) -m benchmarks engine
	$(PY) -m benchmarks codecs

lint: $(READY)   ## style, formatting, layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports

lab: $(READY)    ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks

clean:           ## remove what targets made, but keep .venv, data/ and build/results*
	@if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name 'results*' -exec rm -rf {} +; fi
	@rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-env:       ## remove .venv (then: make setup)
	@rm -rf .venv

# pip only brings uv, and only when the environment is new or broken; uv does the rest in well under a minute.
$(READY): pyproject.toml $(wildcard constraints.txt)
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed and $(PYTHON) is older (or missing): make setup PYTHON=python3.12"; exit 1; }; \
	  echo "creating .venv with $(PYTHON)"; $(PYTHON) -m venv --clear .venv; }
	@$(PY) -m pip install --quiet --no-cache-dir --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) uv
	$(INSTALL) -e ".[dev]"
	@touch $@

$(FLOWER) $(ENCRYPTED): .venv/.%: $(READY)
	$(INSTALL) -e ".[dev,$*]"
	@touch $@
