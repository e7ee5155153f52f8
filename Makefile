# make demo | test | lint | docs | benchmarks: each sets up .venv first, and does nothing there when nothing changed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PYTHONUTF8 := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo test lint docs capabilities benchmarks clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foveal needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/foveal compare sample:textile --methods linear,nn-revisit,gda-clip,naive-bayes-probe --seeds 3 --offline --out runs/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

capabilities: setup
	FOVEAL_WRITE_CAPABILITIES=1 $(BIN)/python -m pytest tests/contract tests/architectures/test_contract.py -k "test_contract"
	$(BIN)/python scripts/make_docs.py

docs: setup
	$(BIN)/python scripts/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

benchmarks: setup
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv build dist site
