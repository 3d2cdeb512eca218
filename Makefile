# make demo · make test · make check · make bench · make chaos
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --no-deps --progress-bar off
# The one place that names PyTorch's CPU index: torch+cpu is not on PyPI.
TORCH := --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1

.PHONY: demo test test-slow chaos check bench bench-gpu system kenlm install install-gpu

demo: .venv/installed
	$(BIN)/danlu run tiny

test: .venv/installed check system kenlm
	$(BIN)/python -m pytest -m "not slow and not gpu and not chaos"

test-slow: .venv/installed system kenlm
	$(BIN)/python -m pytest -m "slow and not gpu and not chaos"

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Hours: 100 kills over all stages, disks that fail, 10,000 mutated recipes; CHAOS_KILLS and CHAOS_STAGES ask for less.
chaos: .venv/installed
	$(BIN)/python -m pytest -s -m "chaos or slow" tests/chaos tests/pipelines/recipe/test_fuzz.py

bench: .venv/installed
	$(BIN)/python -m benchmarks.chain

# On a machine with a CUDA device, after make install-gpu.
bench-gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu

# What benchmarks.clean, .analyze and .dedup run beside us.
.peers/data-juicer: benchmarks/data-juicer.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu -r $<

# What tests need from Debian: a CJK font, so that Chinese is drawn, and a browser that opens the report.
system:
	@{ fc-list :lang=zh family 2>/dev/null | grep -q . && command -v chromium >/dev/null; } \
	  || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq fontconfig fonts-wqy-zenhei \
	  $$(command -v chromium >/dev/null || echo chromium) >/dev/null; } \
	  || echo "tests of the report in a browser are skipped: apt-get install chromium fontconfig fonts-wqy-zenhei"

# What tests of perplexity_filter need; compiled from its source, in about a minute.
kenlm: .venv/installed
	@$(BIN)/python -c "import kenlm" 2>/dev/null || $(PIP) --quiet kenlm==0.3.0 \
	  || echo "tests of perplexity_filter are skipped: kenlm needs a C++ compiler"

install: .venv/installed

install-gpu:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements/gpu.in
	$(BIN)/pip install --no-deps -e .
	touch .venv/installed

# pip says nothing while it unpacks, so what is there already is told every fifteen seconds.
.venv/installed: requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	sed -n '/^torch==/{N;p}' requirements/cpu.lock > .venv/torch.lock
	$(PIP) $(TORCH) --require-hashes -r .venv/torch.lock
	@echo "the packages go into .venv: about 4 GB, some minutes"
	@while sleep 15 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do du -sh .venv | sed 's/\t/ in /'; done & told=$$!; \
	  trap 'kill $$told' EXIT; $(PIP) --require-hashes -r requirements/cpu.lock
	$(PIP) --quiet --no-build-isolation -e .
	touch $@
