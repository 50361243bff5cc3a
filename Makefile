# make quickstart   train a tiny Ovis2.5 on sample_data and score it
# make test         the CPU test suite, offline
# make test-all     the same with the long tests
# make lint         ruff and pyright
# make bench        the CPU benchmarks: results, tables and plots

PYTHON ?= python3
READY := .venv/.ready
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-all lint bench

# One thread: matrices this small make more threads wait for each other.
quickstart: $(READY)
	$(RUN) python scripts/make_tiny_ovis2_5.py --output outputs/quickstart/tiny_ovis2_5
	$(RUN) OMP_NUM_THREADS=1 scripts/train_launch.sh configs/presets/quickstart.json 1 trl
	$(RUN) python scripts/score_quickstart.py --model outputs/quickstart/model

test: $(READY)
	$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m "not long"

test-all: $(READY)
	$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

bench: $(READY)
	$(RUN) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python benchmarks/run_all.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vlmtune needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Fix: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  echo "Fix: install the venv module of $(PYTHON), on Debian python3-venv."; exit 1; }
	.venv/bin/pip install --quiet --constraint constraints.txt torch
	.venv/bin/pip install --quiet --constraint constraints.txt -e ".[dev,tensorboard,ui,video]"
	@touch $@
