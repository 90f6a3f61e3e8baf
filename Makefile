# make demo: from a fresh clone to a model's answer. Needs Python 3.12 or newer; everything goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROMPT ?= The three laws of robotics are

.PHONY: demo test test-all test-gpu-aot lint docs notebooks clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.core
	$(BIN)/jaxllm generate --model demo --prompt "$(PROMPT)" --max-tokens 48

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# All of them, and with programs as optimised as users have them (tests/compile_cache.py).
test-all: $(VENV)/.dev
	JAXLLM_TEST_OPTIMIZED=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow"
	JAXLLM_TEST_ENGINE_PROCESS=1 $(BIN)/python -m pytest -q tests/server

# The GPU kernels and plans, compiled for chips that are not here by the CUDA plugin: 5 GB in an environment of its own.
test-gpu-aot: .venv-gpu/.done
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m pytest -q tests/gpu_aot

.venv-gpu/.done: pyproject.toml constraints.txt
	@python=$${PYTHON:-$$(.ci/find-python)} && "$$python" -m venv .venv-gpu
	@echo "installing jax's CUDA plugin into .venv-gpu (5 GB; some minutes)"
	@.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[cuda]" \
		pytest hypothesis || { echo "the CUDA plugin could not be installed: is there a package registry, and 7 GB of disk?" >&2; exit 1; }
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .

# The pages that are made from code.
docs: $(VENV)/.core
	$(BIN)/python -c "from jaxllm.serving.sampling_params import markdown; print(markdown(), end='')" > docs/sampling.md

# Runs every notebook from its first cell to its last, and leaves the files as they are.
notebooks: $(VENV)/.dev
	@for notebook in $(wildcard notebooks/*.ipynb); do \
		echo "running $$notebook" && $(BIN)/jupyter-execute --timeout=600 $$notebook || exit 1; \
	done

# Only what make and the tools made.
clean:
	rm -rf $(VENV) .venv-gpu .venv-node build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: installed once, and again when the requirements change. A venv whose making was cut short has no working pip.
$(VENV)/.core: pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		python=$${PYTHON:-$$(.ci/find-python)} && echo "making $(VENV) with $$python" && "$$python" -m venv $(VENV); \
	fi
	@echo "installing jaxllm into $(VENV) (a minute or so)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing the tools for tests into $(VENV)"
	@$(PIP) --editable ".[dev,serve,train,plan]"
	@touch $@
