# make demo   set up, then: collect data, train three agents, evaluate them, print a table
# make test   set up, then run the tests
# make check  lint, format, types, import contracts
# make bench, decoding, overlap, errors   measure the attention kernels: speed, also of decoding, hidden transfers, accuracy
# make limits  the longest contexts of a model on two TPU slices, compiled without a TPU: a small version of the table
# make reproduce  the table of agents (two hours); make simulation, reader  what collecting and reading cost
# make retrieval  the figure of line retrieval: models trained from nothing, asked beyond their trained lengths
# Everything goes into .venv. Where there is a C++ compiler, attention for CPUs is compiled on first use, into a file of
# 0.2 MB in $XDG_CACHE_HOME/ring_rl (by default ~/.cache/ring_rl), which other checkouts share and clean leaves;
# CXX=none before a command does without. Nothing else on the machine is touched.

# The newest Python that every dependency has wheels for comes first; any from 3.11 on will do.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
# Any torch will do; this one is small where its file is at hand.
TORCH ?= torch==2.13.0
INSTALL := --constraint constraints.txt --editable '.[simulator,minari,cluster,lm,development]'

.PHONY: demo test check format setup constraints memory engine simulation reader reproduce retrieval bench decoding overlap limits errors figures clean

demo: setup
	$(BIN)/python experiments/demo.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Compiled memory a device: at 64K tokens for rings of 1, 2, 4 and 8, and what each memory option saves at 128K.
memory: setup
	$(BIN)/python experiments/memory_by_ring_size.py overwrite=true
	$(BIN)/python experiments/memory_by_option.py overwrite=true

# A step of the training engine beside a bare jitted loop.
engine: setup
	$(BIN)/python experiments/bench_engine.py overwrite=true

# Collecting and evaluating beside a plain dm_control loop; long contexts beside their FLOPs.
simulation: setup
	$(BIN)/python experiments/bench_simulation.py output=experiments/results/simulation overwrite=true

# Opening and sampling a set of 10,000 episodes.
reader: setup
	$(BIN)/python experiments/bench_reader.py output=experiments/results/reader/cpu overwrite=true

# The paper's table of agents, on two cores: says first what is left and how long it takes, and goes on where it was.
reproduce: setup
	$(BIN)/python experiments/reproduce_agent.py preset=cpu

# Accuracy of line retrieval against length, on two cores: says first what is left, and goes on where it was.
retrieval: setup
	$(BIN)/python experiments/reproduce_lm.py preset=cpu

# Our attention beside PyPI ringattention, jax.nn.dot_product_attention and torch, on the same inputs in one run.
# torch's CPU build is enough; the default build on Linux brings gigabytes of CUDA.
bench: setup
	@$(BIN)/python -c 'import torch, ringattention' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH) 'ringattention==0.1.2' || \
	  echo "torch or ringattention could not be installed: their ratios will be nan"
	$(BIN)/python experiments/bench_kernels.py overwrite=true

# New tokens against a cache of keys and values: XLA beside the C++ block of a CPU, in two minutes.
decoding: setup
	$(BIN)/python experiments/bench_decoding.py output=experiments/results/decoding overwrite=true

# Compiles the ring for v5e and v5p without a TPU and reads whether compute hides every transfer. Installs libtpu (700 MB).
overlap: setup
	@$(BIN)/python -c 'import libtpu' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tpu-compile]'
	$(BIN)/python experiments/check_overlap.py overwrite=true

# The longest context that trains on two TPU slices, by way to attend; goes on where it was. Installs libtpu (700 MB).
# The paper's table: python experiments/context_limits.py context_limits=paper (says first how long it takes).
limits: setup
	@$(BIN)/python -c 'import libtpu' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tpu-compile]'
	$(BIN)/python experiments/context_limits.py context_limits=small overwrite=true

# Error of rings of 1 to 16 against float64.
errors: setup
	$(BIN)/python experiments/error_by_ring_size.py overwrite=true

# The pictures of ring_rl/kernels/README.md.
figures: setup
	$(BIN)/python experiments/draw_kernels.py --overwrite

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; install one or set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up .venv with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# uv installs in seconds what takes pip minutes; pip serves where uv can't be had or can't connect.
	@{ $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5' && \
	  UV_NATIVE_TLS=1 UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --python $(BIN)/python $(INSTALL); } 2>.venv/uv.log || \
	  { echo "uv could not install (see .venv/uv.log); pip goes on, which takes some minutes"; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check $(INSTALL); }
	@touch .venv/ready

# Exact versions for every supported Python, from pyproject.toml.
constraints: setup
	$(BIN)/uv pip compile pyproject.toml --extra simulator --extra minari --extra cluster --extra lm --extra development \
	  --universal --python-version 3.11 --no-header --no-annotate --upgrade --quiet --output-file constraints.txt

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
