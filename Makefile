# Two commands for a newcomer: `make demo` and `make test`. Each installs into VENV what it needs, and keeps what is there already.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
# Where torch alone comes from, in place of the package index: the URL that pytorch.org shows for a CPU build, say.
TORCH_INDEX ?=
# More options for pip.
PIP_ARGS ?=
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
DECLARED := pyproject.toml constraints.txt

.PHONY: venv demo test lint clean

# An empty environment, for those who put their own torch into it first.
venv: $(VENV)/.python

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed; this is %d.%d: name another with make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
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

clean:
	rm -rf $(VENV) out build dist *.egg-info
