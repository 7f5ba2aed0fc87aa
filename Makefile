# make demo: from nothing to runs/demo/report.html.   make test: the whole test suite.   Both set up .venv first.
# make train: SFT and GRPO of the small model, to runs/train/report.html.
# make slow: the small model's recipe on a small scale, from nothing to scores, to data_cards/tiny_quick.json.
# make paper: the paper's questions in miniature, overnight on 2 cores, from runs/tiny.
# make bench: against plain Transformers.   make bench-sweep: how cost grows.   make kernels: the Triton kernels' proofs.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
DEMO_CLIPS ?= 40
DEMO_STEPS ?= 20
# the same twelve questions on six walks in every step, so that three minutes show the reward rise
DEMO_GRPO := --set train.batch=6 --set train.lr=1e-4 --set data.tasks=landmark --set data.per_clip=2
TRAIN_CLIPS ?= 40
TRAIN_STEPS ?=
TESTS ?= tests
SEEDS ?= 0 1 2

.PHONY: setup demo train slow paper test bench bench-sweep kernels notebooks clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "stkit needs Python 3.11 or newer, $(PYTHON) is older: run 'make setup PYTHON=/path/to/python3.11'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: setup   # DEMO_CLIPS=4 DEMO_STEPS=2 for a quick look
	$(BIN)/stkit build --out runs/demo-walks-$(DEMO_CLIPS) --clips $(DEMO_CLIPS) --seed 0 --split test
	@grep -qs 'demo-walks-$(DEMO_CLIPS)"' runs/demo/config.json || rm -rf runs/demo   # a demo of another size
	$(BIN)/stkit eval runs/demo-walks-$(DEMO_CLIPS) --model tiny --mode generate --max-new-tokens 256 --out runs/demo
	$(BIN)/stkit build --out runs/demo-learn --clips 6 --seed 1 --split train
	$(BIN)/stkit grpo runs/demo-learn --model tiny-cold --preset tiny --steps $(DEMO_STEPS) --out runs/demo-grpo-$(DEMO_STEPS) $(DEMO_GRPO)
	$(BIN)/stkit report runs/demo runs/demo-grpo-$(DEMO_STEPS) --out runs/demo/report.html

train: setup   # TRAIN_CLIPS=10 TRAIN_STEPS="--steps 4" for a quick look
	$(BIN)/stkit build --out runs/train-walks-$(TRAIN_CLIPS) --clips $(TRAIN_CLIPS) --seed 0
	$(BIN)/stkit sft runs/train-walks-$(TRAIN_CLIPS) --model tiny-untrained --preset tiny --out runs/train-sft $(TRAIN_STEPS)
	$(BIN)/stkit grpo runs/train-walks-$(TRAIN_CLIPS) --model runs/train-sft --preset tiny --out runs/train $(TRAIN_STEPS)
	$(BIN)/stkit report runs/train-sft --out runs/train-sft/report.html
	$(BIN)/stkit report runs/train --out runs/train/report.html

slow: setup   # meant to take under 15 minutes on 2 cores; commit its last result
	@mkdir -p runs
	$(BIN)/stkit tiny train --quick --out runs/quick --json > runs/quick.json
	cp runs/quick.json data_cards/tiny_quick.json

PAPER := -m stkit.tiny.ablations --model runs/tiny/tell/model --out runs/paper --cards data_cards --seeds $(SEEDS)

paper: setup   # two processes of one thread share the arms; SEEDS="3 4" adds to what is there; run again, it goes on
	@mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python $(PAPER) > runs/paper.log 2>&1 & other=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python $(PAPER) && wait $$other

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

bench: setup   # under 25 minutes on 2 cores, on a machine that does nothing else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pytest tests/test_trl_parity.py
	$(BIN)/python -W ignore kernels/benchmarks/bench.py --out runs/bench

bench-sweep: setup
	$(BIN)/python -W ignore kernels/benchmarks/sweep.py --out runs/bench-sweep

kernels: setup
	$(BIN)/python kernels/benchmarks/prove.py --out runs/kernels

notebooks: setup   # run them anew and keep the outputs, without the times that jupyter writes beside them
	cd notebooks && ../$(BIN)/jupyter execute --inplace *.ipynb && \
	cd solutions && ../../$(BIN)/jupyter execute --inplace *.ipynb
	$(BIN)/python tests/clean_notebooks.py notebooks/*.ipynb notebooks/solutions/*.ipynb

clean:
	rm -rf $(VENV) runs build *.egg-info
