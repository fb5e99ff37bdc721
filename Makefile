# Two commands do everything on a fresh Debian-like machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(wildcard mer/_ext/*.pyx mer/_ext/*.pxd mer/_ext/csrc/*.h mer/_ext/csrc/*/*.[ch]) \
	$(wildcard protos/*/*/*.proto)
# Debian's Python comes in parts; another one (pyenv, a build of one's own) is whole.
OTHER_PYTHON := $(filter-out /usr/bin/%,$(shell command -v $(PYTHON)))
DEBIAN := gcc libc6-dev pkg-config liburing-dev $(if $(OTHER_PYTHON),,python3 python3-venv python3-dev)
# What the tests open the page in; Ubuntu has none, and the tests are skipped there.
BROWSER := chromium-headless-shell
PROMPT ?= The old man looked at the sea and said

.PHONY: help demo test lint build bench site clean

help:
	@echo "make demo   install what is missing, build, and write text with the bundled model, streamed from disk"
	@echo "make test   the same for the tests: lint, types, layers, pytest"
	@echo "make bench  how fast the kernels are, and the reader beside fio (installed if missing)"
	@echo "make site   the documentation as a site, in build/site"
	@echo "make clean  remove the virtual environment and everything built"

$(VENV)/made: Makefile
	@tools/debian-packages.sh $(DEBIAN)
	@echo "==> making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" "cython>=3.1" "numpy>=2.0" \
		"grpcio-tools>=1.85,<1.86" "mypy-protobuf>=5.1"
	@touch $@

$(VENV)/built: $(VENV)/made $(SOURCES)
	@echo "==> building mer (Cython, C and protos; some minutes the first time)"
	@PYTHONWARNINGS="ignore:Editable installation" $(PY) -m pip install --quiet --no-build-isolation --editable .
	@touch $@

$(VENV)/testable: $(VENV)/made $(SOURCES)
	@echo "==> building mer, and installing what the tests compare with (transformers, torch, gguf, ...)"
	@PYTHONWARNINGS="ignore:Editable installation" $(PY) -m pip install --quiet --no-build-isolation --editable ".[test]"
	@touch $(VENV)/built $@

build: $(VENV)/built

demo: $(VENV)/built
	@echo "==> mer run demo: a quarter of the experts fits in the cache, the rest is read from disk"
	@$(VENV)/bin/mer run demo "$(PROMPT)" --cache-experts 25% --max-tokens 160 --temperature 0.7 --seed 1

lint: $(VENV)/testable
	@echo "==> ruff, mypy, import layers"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-logo

test: lint
	@tools/debian-packages.sh $(BROWSER) || echo "==> no $(BROWSER) to be had: the page is not tested"
	@echo "==> pytest"
	@$(PY) -m pytest

bench: $(VENV)/built
	@tools/debian-packages.sh fio
	@$(PY) -m bench.kernels
	@$(PY) -m bench.io

site: $(VENV)/testable
	@$(PY) tools/site.py build/site
	@echo "==> build/site/index.html"

clean:
	rm -rf $(VENV) build mer.egg-info mer/_ext/*.so
	find mer/_ext -maxdepth 1 -name '*.c' -delete
	rm -f mer/v1/*_pb2*
