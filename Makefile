# Everything happens in .venv; nothing else has to be installed but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := out/demo-int4-onnx

.PHONY: demo test lint bench clean

demo: $(INSTALLED)  ## The bundled model becomes an int4 artifact, passes its parity check, and speaks.
	mkdir -p $(dir $(DEMO))
	$(BIN)/rgexport onnx --size demo --int4 -o $(DEMO) --force
	$(BIN)/rgexport validate $(DEMO)
	$(BIN)/rgexport generate $(DEMO) -p "It is a truth universally acknowledged, that" -n 60 \
		--temperature 0.7 --seed 2

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## Export and decode at 2B size: needs 8 GB of disk and some minutes.
	$(BIN)/python -m bench.run

clean:
	rm -rf $(VENV) out dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --group needs pip 25.1 or later.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install -q -e '.[export]' --group dev
	touch $@
