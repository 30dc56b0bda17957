# Two commands for a newcomer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed; this is %d.%d: name another with make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Export the demo checkpoint, prove its numbers, generate text from it with ONNX Runtime.
demo: $(STAMP)
	@$(BIN)/sessa-deploy export checkpoints/demo --out $(OUT)
	@$(BIN)/sessa-deploy validate $(OUT) --checkpoint checkpoints/demo --report $(OUT)-parity.html > $(OUT)-validate.log || { cat $(OUT)-validate.log; exit 1; }
	@$(BIN)/sessa-deploy run $(OUT) --prompt 'def read_config(path):' --max-new-tokens 120 --temperature 0.6 --seed 1
	@echo
	@grep '^parity:' $(OUT)-validate.log
	@echo "bundle: $(OUT)"
	@echo "next: $(BIN)/sessa-deploy run $(OUT) --prompt 'class Stack:' --max-new-tokens 200 --temperature 0.7"

# Everything that needs no GPU.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist *.egg-info
