# `make` lists the targets. Everything happens in the virtual environment $(VENV), made on first use;
# to use one of your own: make test VENV=$VIRTUAL_ENV (the pinned versions are installed into it).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help env demo quick test campaign notebooks docs browser-test gpu-test tables style prepare clean

help:           ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

env: $(STAMP)   ## install the package and its tools, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

demo: env       ## minutes on a CPU: pre-train on RCDB drawn online, fine-tune on digits, three seeds
	$(BIN)/fdsl run pretrain -p dataset rcdb -p run demo/pretrain
	$(BIN)/fdsl run finetune -p dataset digits -p weights runs/demo/pretrain/last.pth.tar -p seeds 3 -p run demo/finetune
	$(BIN)/jupyter nbconvert --to html --log-level ERROR runs/demo/*/*.ipynb
	@echo 'The reports, executed notebooks with curves and tables:'
	@ls runs/demo/*/*.html

quick: env      ## under a minute: the house rules, and the tests that take no seconds and start no process
	$(BIN)/python -m pytest -q tests/test_house.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow and not process and not long' --ignore=tests/test_house.py

test: env       ## house rules, then the notebooks, then every test that is not slow
	$(BIN)/python -m pytest -q tests/test_house.py
	$(MAKE) --no-print-directory notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow' --ignore=tests/test_house.py

campaign: env   ## the slow tests: minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

# Notebooks without a number are papermill runs: pytest runs them, with small values.
notebooks: env  ## run every cell of the library's notebooks
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --file-glob '[0-9]*.ipynb' --n-workers 2

docs: env       ## the documentation, from the notebooks, into docs/_build/html
	$(BIN)/python docs/make.py

browser-test: env ## JupyterLab and the documentation in a real browser, without network; screenshots in tests/browser/shots
	@for needed in chromium node npm; do command -v $$needed > /dev/null || { echo "$$needed is not here; Debian: apt-get install chromium nodejs npm"; exit 1; }; done
	npm ci --prefix tests/browser --no-audit --no-fund
	$(BIN)/python -m pytest -q tests/browser

gpu-test: env   ## what a GPU has to prove: pixels, speed; a line a stage (without a GPU: python benchmarks/gpu.py --device cpu)
	$(BIN)/python benchmarks/gpu.py --json runs/gpu.json

tables: env     ## search anew the categories that ship as a table: 40 minutes of one core; goes on where it stopped
	$(BIN)/python benchmarks/searched.py

# Large ones, numba's llvmlite among them, are left to that machine.
GPU_PYTHON ?= $(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
GPU_WHEELS := timm joblib psutil filelock huggingface-hub safetensors pyyaml tqdm packaging cuda-bindings cuda-pathfinder

gpu-wheels: env ## into gpu-wheels/: what gpu-test needs beside torch, torchvision and numba on a machine without network; GPU_PYTHON=3.12 for another Python
	rm -rf gpu-wheels
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) -c constraints.txt -d gpu-wheels $(GPU_WHEELS)
	@du -sh gpu-wheels

style: env      ## how the notebooks are written, in numbers: cells, widths, prose; fails nothing
	$(BIN)/python tests/style.py

prepare: env    ## before a commit: clean the notebooks, then write the modules they export
	$(BIN)/python -c 'from fdsl_nb.app.parameters import record_defaults; record_defaults()'
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

clean:          ## remove caches and build output; keeps runs/, data/ and the environment
	rm -rf build dist gpu-wheels *.egg-info .pytest_cache .ruff_cache docs/_build tests/browser/node_modules tests/browser/shots
	find $(wildcard fdsl_nb tests benchmarks docs nbs) -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
