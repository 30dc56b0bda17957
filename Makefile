# Two commands for a newcomer: `make demo` and `make test`. Each installs into VENV what it needs, and keeps what is there already.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
# Options of benchmarks/paper/run.py.
PAPER ?=
# Where torch alone comes from, in place of the package index: the URL that pytorch.org shows for a CPU build, say.
TORCH_INDEX ?=
# More options for pip.
PIP_ARGS ?=
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
DECLARED := pyproject.toml constraints.txt
VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
# What VENV was made with; empty where it is not there, or where its interpreter has gone since.
THERE := $(shell $(BIN)/python $(VERSION) 2> /dev/null)

.PHONY: venv demo test lint paper clean FORCE

# An empty environment, for those who put their own torch into it first.
venv: $(VENV)/.python

ifeq ($(THERE),)
$(VENV)/.python: FORCE
FORCE:
else ifneq ($(filter command environment,$(origin PYTHON)),)
# An interpreter was asked for: another one's environment is not taken for it. Without PYTHON=... whatever is there is kept.
ifneq ($(filter venv demo test lint paper,$(or $(MAKECMDGOALS),venv)),)
ASKED := $(shell $(PYTHON) $(VERSION) 2> /dev/null)
ifneq ($(ASKED),$(THERE))
$(error $(VENV) was made with Python $(THERE), and PYTHON=$(PYTHON) is $(or $(ASKED),no interpreter): name another place with VENV=..., or `make clean` first)
endif
endif
endif

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed; this is %d.%d: name another with make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(if $(THERE),@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip,$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV))
	@touch $@

$(VENV)/.torch: $(VENV)/.python $(DECLARED)
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch,@:)
	@touch $@

$(VENV)/.export: $(VENV)/.torch $(DECLARED)
	$(PIP) --progress-bar on -e '.[export]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(DECLARED)
	$(PIP) --progress-bar on -e '.[dev]'
	@touch $(VENV)/.export $@

# Export the demo checkpoint, prove its numbers, generate text from it with ONNX Runtime.
demo: $(VENV)/.export
	@$(BIN)/sessa-deploy export checkpoints/demo --out $(OUT)
	@$(BIN)/sessa-deploy validate $(OUT) --checkpoint checkpoints/demo --report $(OUT)-parity.html > $(OUT)-validate.log || { cat $(OUT)-validate.log; exit 1; }
	@$(BIN)/sessa-deploy run $(OUT) --prompt 'def read_config(path):' --max-new-tokens 120 --temperature 0.6 --seed 1
	@echo
	@grep '^parity:' $(OUT)-validate.log
	@echo "bundle: $(OUT)"
	@echo "next: $(BIN)/sessa-deploy run $(OUT) --prompt 'class Stack:' --max-new-tokens 200 --temperature 0.7"

# Everything that needs no GPU.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 tests/test_house.py tests/test_layering.py

$(VENV)/.paper: $(VENV)/.torch $(DECLARED)
	$(PIP) --progress-bar on -e '.[paper]'
	@touch $@

# The paper's comparison, hours on one GPU; runs that are finished are kept. PAPER holds options: make paper PAPER='--preset quick'
paper: $(VENV)/.paper
	$(BIN)/python benchmarks/paper/run.py $(PAPER)

clean:
	rm -rf $(VENV) out build dist *.egg-info
