# `make demo`, `make check`, `make test`, `make docs`. Each makes its environment first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := out/demo
export TOKENIZERS_PARALLELISM := true

.PHONY: help env demo check test unit coverage docs test-clients test-page test-llama-bench test-mobile fuzz-mobile lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          train a small Phi on this Python's standard library, export it to 4 bits"
	@echo "                   in three formats, verify and measure them: $(DEMO)/report.html;"
	@echo "                   then the same for a fully trained model, which answers questions"
	@echo "make check         style, types, imports and the tests that neither train nor export: a minute"
	@echo "make test          the same with all tests (what CI runs)"
	@echo "make coverage      make test with the lines that tests reach"
	@echo "make docs          the documentation site: out/site/index.html"
	@echo "make test-clients  optimum and OpenVINO, in environments of their own"
	@echo "make test-page     the chat page in headless Chromium"
	@echo "make test-mobile   the Swift package, beside Python's runtime"
	@echo "make fuzz-mobile   its readers of files against libFuzzer, 30 minutes"
	@echo "make test-llama-bench  llama-bench, built from its sources, beside ours"
	@echo "make clean         remove out/ and .build/; the environments stay"

env:
	@$(PYTHON) tools/environment.py

# ---- make demo: each stage a public command; a stage whose result is there is not run again ----

demo: env $(DEMO)/report.html $(DEMO)/answers.txt
	@echo "==> the demo is done: open $(DEMO)/report.html and $(DEMO)/sample.html"

$(DEMO)/tokenizer/tokenizer.json: | env
	@echo "==> 1/6 a tokenizer, learned from the standard library: seconds"
	$(BIN)/phi-train tokenizer --corpus stdlib --out $(DEMO)/tokenizer

$(DEMO)/shards/shards.json: | $(DEMO)/tokenizer/tokenizer.json
	@echo "==> 2/6 the standard library as tokens, some files held out: seconds"
	$(BIN)/phi-train shards --corpus stdlib --tokenizer $(DEMO)/tokenizer --out $(DEMO)/shards

$(DEMO)/checkpoint/config.json: | $(DEMO)/shards/shards.json
	@echo "==> 3/6 training a Phi-3 on them; it tells how long it will take"
	$(BIN)/phi-train phi3-demo --out $(DEMO)/checkpoint \
	    --set data.tokenizer=$(DEMO)/tokenizer --set data.shards=$(DEMO)/shards

$(DEMO)/bundles: | $(DEMO)/checkpoint/config.json
	@echo "==> 4/6 exporting it to 4 bits in three formats: seconds"
	$(BIN)/phi-export --int4 $(DEMO)/checkpoint --out $(DEMO)/bundles

$(DEMO)/verified-%.txt: | $(DEMO)/bundles
	@echo "==> 5/6 verifying the $* bundle over 4,096 held-out tokens: seconds"
	@$(BIN)/phi-export verify $(DEMO)/bundles/$* --against $(DEMO)/checkpoint \
	    --text $(DEMO)/shards/heldout.txt --tokens 4096 > $@.partial; \
	    status=$$?; cat $@.partial; [ $$status -eq 0 ] && mv $@.partial $@

$(DEMO)/report.html: | $(DEMO)/verified-gguf.txt $(DEMO)/verified-onnx.txt $(DEMO)/verified-coreml.txt
	@echo "==> 6/6 measuring each bundle: a minute or two"
	$(BIN)/phi-bench run $(DEMO)/bundles/gguf $(DEMO)/bundles/onnx $(DEMO)/bundles/coreml \
	    --against $(DEMO)/checkpoint --text $(DEMO)/shards/heldout.txt \
	    --out $(DEMO)/report.json --html $(DEMO)/report.html

# The second half: a fully trained model, no training. What it answers is for you to judge.

$(DEMO)/sample/config.json: | env
	@echo "==> a fully trained model in Phi-3's layout, from a package: seconds"
	$(BIN)/phi-train sample --out $(DEMO)/sample

$(DEMO)/sample-bundles: | $(DEMO)/sample/config.json
	@echo "==> calibrating and exporting it, then judging it on held-out text: minutes"
	$(BIN)/phi-export --int4 $(DEMO)/sample --out $(DEMO)/sample-bundles

$(DEMO)/sample.html: | $(DEMO)/sample-bundles
	@echo "==> measuring its bundles: a minute or two"
	$(BIN)/phi-bench run $(DEMO)/sample-bundles/gguf $(DEMO)/sample-bundles/onnx \
	    --out $(DEMO)/sample.json --html $(DEMO)/sample.html

$(DEMO)/answers.txt: | $(DEMO)/sample.html
	@for format in gguf onnx; do \
	    echo "==> $$format answers"; \
	    printf '%s\n' "What is the capital of France? Answer in one sentence." \
	        "Name three colours." "Write one sentence about the sea." \
	        | $(BIN)/phi-run chat $(DEMO)/sample-bundles/$$format || exit 1; \
	done | tee $@.partial && mv $@.partial $@

# ---- make test ----

# Two processes of one thread each: twice as quick as one of two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: env lint
	$(PYTEST) -m "not clients and not browser and not llama_bench and not swift"

check:
	@$(MAKE) --no-print-directory -j 2 --output-sync=target lint unit

unit: env
	$(PYTEST) -m "not integration and not clients and not browser and not llama_bench and not swift"

coverage: env
	$(PYTEST) --cov -m "not clients and not browser and not llama_bench and not swift" -k "not full_disk"  # coverage writes files of its own

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "==> open out/site/index.html; with search: python3 -m http.server -d out/site"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# optimum wants an older transformers than we test with, so it lives apart.
test-clients: env
	$(BIN)/phi-bench build optimum
	$(BIN)/phi-bench build openvino
	$(BIN)/python -m pytest -m clients

test-llama-bench: env
	$(BIN)/python -m pytest -m llama_bench

test-mobile: env
	$(BIN)/python -m pytest -m swift

# Each of the readers of files from outside for FUZZ_SECONDS under AddressSanitizer; the corpus begins with real files.
FUZZ_SECONDS := 300
fuzz-mobile: env
	$(BIN)/python tools/fuzz.py $(FUZZ_SECONDS)

test-page: env
	$(BIN)/python -m pytest -m browser

clean:
	rm -rf out .build
