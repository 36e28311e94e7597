# Everything a fresh machine with Python and make needs; no other set-up.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo models test test-models test-latest test-older lint types wheel benchmark compat browser hardening coverage-full figures model-cards results results-demo-lm depth calibration clean

LM ?= smollm2
demo: $(VENV)/.ready  ## set up, fetch a real LM (93 MB), filter it and show what changes; LM=openstax is offline
	$(BIN)/python -m examples.demo --lm $(LM)

MODEL ?= smollm2
models: $(VENV)/.ready  ## fetch a language model into the cache; MODEL=smollm2, qwen, gemma or all
	$(BIN)/python -m examples.models $(MODEL)

test-models: $(VENV)/.ready-dev  ## tests of the language models that `make models MODEL=all` fetched
	ST_EMBFILTER_TEST_MODELS=1 $(BIN)/python -m pytest tests/test_models.py -rs

test: $(VENV)/.ready-dev  ## set up, then run the tests
	$(BIN)/python -m pytest -n auto

test-latest:  ## the tests with the newest release of every library but torch
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	grep '^torch==' constraints.txt > .venv-latest/constraints.txt
	.venv-latest/bin/python -m pip --disable-pip-version-check -q install -U --upgrade-strategy eager -c .venv-latest/constraints.txt -e '.[dev]'
	.venv-latest/bin/python -m pytest -n auto

# What a processor without AVX-512 would run, in every library that can be told so.
OLDER = OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        ONEDNN_MAX_CPU_ISA=AVX2 FAISS_OPT_LEVEL=avx2 NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL"
THREADS ?= 1
test-older: $(VENV)/.ready-dev  ## the tests and `make hardening` as on an older processor; THREADS=3
	$(OLDER) OMP_NUM_THREADS=$(THREADS) OPENBLAS_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) \
	  $(BIN)/python -m pytest -n auto
	$(OLDER) OMP_NUM_THREADS=$(THREADS) $(BIN)/python -W ignore -m hardening --kills 20 --texts 10000 --no-tests

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

wheel: $(VENV)/.ready-dev
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

benchmark: $(VENV)/.ready-dev  ## docs/benchmarks.md; minutes, and gigabytes in ~/.cache/st-embfilter-bench
	$(BIN)/python -m benchmarks.page

coverage-full: $(VENV)/.ready-dev  ## every architecture of transformers; writes docs/architectures.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures

figures: $(VENV)/.ready-dev  ## regenerate docs/figures with the demo LM
	$(BIN)/st-embfilter lens examples/openstax-lm --figures docs/figures --quiet

# Other libraries in environments of their own, in the folder COMPAT; minutes, and 9 GB if they are kept.
COMPAT ?= .compat
compat: $(VENV)/.ready  ## load a saved model through other libraries, write docs/compatibility.md; Node, npm and Chromium for the rows of transformers.js
	$(PIP) install -c constraints.txt -e '.[gguf,onnx]'
	$(BIN)/python -m compat.run --environments $(COMPAT)

browser: $(VENV)/.ready  ## what examples/browser loads: a model, texts, transformers.js from npm; LM=openstax is the bundled one
	$(PIP) install -c constraints.txt -e '.[gguf,onnx]'
	$(BIN)/python -W ignore -m examples.browser.prepare --lm $(LM) $(if $(PICTURE),--picture $(PICTURE))

hardening: $(VENV)/.ready-dev  ## hostile inputs, crashes, soak; HARDENING=--write for docs/hardening.md
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m hardening $(HARDENING)

model-cards: $(VENV)/.ready  ## render model_cards/; BUILD=--build builds the real models again
	$(BIN)/python -m model_cards.render $(BUILD)

results: $(VENV)/.ready-dev  ## docs/results.md: three real LLMs; DATA=folder as benchmarks/demo_lm.py names it; ARGS="--minutes 60"
	@test -n "$(DATA)" || { echo "give the data: make results DATA=folder"; exit 2; }
	$(BIN)/python -m benchmarks.results $(DATA) $(ARGS)

results-demo-lm: $(VENV)/.ready-dev  ## examples/openstax-lm/results.md
	@test -n "$(DATA)" || { echo "give the data: make results-demo-lm DATA=folder"; exit 2; }
	$(BIN)/python -m benchmarks.demo_lm $(DATA)

depth: $(VENV)/.ready-dev  ## docs/depth.md; DATA as for results, MODELS="NAME=FOLDER ..."
	$(BIN)/python benchmarks/depth.py $(DATA) $(foreach model,$(MODELS),--model $(model))

calibration: $(VENV)/.ready-dev  ## docs/calibration.md; DATA as for results, MODELS="NAME=FOLDER ..."
	$(BIN)/python -m benchmarks.calibration $(DATA) $(foreach model,$(MODELS),--model $(model))

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[gguf]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-latest $(COMPAT) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
