# Everything happens in .venv; nothing else has to be installed but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MINUTES ?= 10
# One worker for each core; each takes about 1 GB.
WORKERS ?= auto
TESTS = $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 4 --dist worksteal --durations 10
# With SKIPS=--expected-skips=.ci/skips.txt, a test that is skipped for another reason fails.
SKIPS ?=
TEST := $(VENV)/.test
DEV := $(VENV)/.dev
LINT := $(VENV)/.lint
DEMO := out/demo-int4-onnx
REFERENCE := out/demo.reference
LLAMA := out/llama
LLAMA_WHEEL := $(VENV)/.llama
LLAMA_TOOLS := $(LLAMA)/.tools
PORT := $(addprefix rgexport/kernels/llama_cpp/, recurrentgemma.cpp registration.patch port.py build.py)
NATIVE := $(VENV)/.native
DOCS := $(VENV)/.docs
PAGE := rgexport/web_page/page.zip
PAGE_SOURCES := rgexport/web_page/build.py $(wildcard page/*.* page/src/* page/public/* rgexport/npm/*.*)
NATIVE_SOURCES := rgexport/kernels/build.py $(wildcard $(foreach library, onnx rounding, $(addprefix rgexport/kernels/$(library)/, CMakeLists.txt src/*)))

.PHONY: demo demo-web page docs pictures test test-full test-nightly fuzz native lint bench bench-export bench-llama llama llama-tools release clean

demo: $(INSTALLED)  ## The bundled model becomes an int4 artifact, speaks, and is held against its reference.
	@mkdir -p $(dir $(DEMO))
	$(BIN)/rgexport onnx --size demo --int4 -o $(DEMO) --force
	$(BIN)/rgexport generate $(DEMO) -p "It is a truth universally acknowledged, that" -n 40 --temperature 0.7 --seed 8
	$(BIN)/rgexport reference --size demo -o $(REFERENCE) --force
	$(BIN)/rgexport validate $(DEMO) --reference $(REFERENCE) --html out/demo-report.html

demo-web: $(INSTALLED) $(PAGE)  ## A page that chats with the bundled model, in a browser.
	$(BIN)/rgexport onnx --size demo --profile webgpu -o out/demo-webgpu --force
	$(BIN)/rgexport onnx --size demo --profile wasm -o out/demo-wasm --force
	$(BIN)/rgexport web out/demo-webgpu out/demo-wasm --serve --open

page: $(PAGE)  ## The page of `rgexport web`, from the sources in page/: takes Node.

# The variable silences an advertisement of the theme's makers, not a warning about our pages.
docs: $(DOCS)  ## The documentation as a site in out/site; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean --strict --quiet
	@echo 'The site: out/site/index.html; with search: $(BIN)/python -m http.server -d out/site'

pictures: $(DOCS)  ## The pictures of README.md: a terminal and a report, made by running the demo.
	$(BIN)/python -m bench.pictures

test: $(TEST) native  ## The tests that prove the product: at most 8 minutes on two cores.
	$(TESTS) -m 'not full and not nightly' $(SKIPS)

test-full: test $(DEV) $(PAGE) llama  ## All that continuous integration runs: with browsers, llama.cpp (built first: some minutes), emulated processors.
	$(TESTS) -m 'full and not nightly' $(SKIPS)

test-nightly: $(DEV) native $(PAGE) llama llama-tools  ## Everything, with every combination of the tests' parameters: an hour or two.
	$(TESTS) --whole-product

fuzz: $(DEV)  ## The native ops and every reader of files, for MINUTES each; takes clang with libFuzzer.
	$(BIN)/python -m fuzz.ops --minutes $(MINUTES)
	$(BIN)/python -m fuzz.readers --minutes $(MINUTES)

native: $(NATIVE)  ## The native libraries, where the package finds them: seconds.

llama: $(LLAMA_WHEEL)  ## llama-cpp-python with RecurrentGemma, in .venv.

llama-tools: $(LLAMA_TOOLS)  ## llama-quantize, llama-perplexity and others, in out/llama/bin.

lint: $(LINT)  ## Installs no more than ruff, mypy and the packages whose types mypy reads.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV) native llama-tools  ## Our kernels beside stock ONNX Runtime, llama.cpp and oneDNN, at 2B size: needs 16 GB of disk and half an hour; writes out/bench/onnx.md.
	$(BIN)/python -m bench.onnx

bench-export: $(DEV)  ## Export and decode at 2B size: needs 8 GB of disk and some minutes.
	$(BIN)/python -m bench.run

bench-llama: llama llama-tools  ## llama.cpp at 2B size, down to depth 32,768: half an hour; writes out/bench/llama_cpp.md.
	$(BIN)/python -m bench.llama

release:  ## Checks everything and tags the commit, such as VERSION=0.1.0; pushes nothing.
	@.ci/release '$(VERSION)'

clean:
	rm -f rgexport/kernels/*/librgexport_*
	rm -rf $(VENV) out dist build page/dist page/node_modules $(PAGE) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(NATIVE): $(INSTALLED) $(NATIVE_SOURCES)
	@$(BIN)/python -m rgexport.kernels.build --build-folder build/native
	@touch $@

$(PAGE): $(PAGE_SOURCES)
	@echo 'Building the page of rgexport web'
	@$(PYTHON) -m rgexport.web_page.build

$(LLAMA_WHEEL): $(DEV) $(PORT)
	$(BIN)/rgexport llama-cpp build -o $(LLAMA)
	touch $@

$(LLAMA_TOOLS): $(LLAMA_WHEEL)
	$(BIN)/rgexport llama-cpp build -o $(LLAMA) --tools --no-install
	touch $@

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install -q --group docs
	@touch $@

$(LINT): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install -q --group lint
	@touch $@

# What the demo needs; --group, below, needs pip 25.1 or later.
$(INSTALLED): pyproject.toml hatch_build.py
	@echo 'Installing rgexport into $(VENV): some minutes'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install -q -e '.[export]'
	@touch $@

# What `make test` needs beyond that.
$(TEST): $(INSTALLED)
	$(BIN)/python -m pip install -q -e '.[export,coreml,serve,chat]' --group test --group oracle
	@touch $@

# What other tests, fuzzers and benchmarks need beyond that.
$(DEV): $(TEST)
	$(BIN)/python -m pip install -q --group dev
	@touch $@
