# Every target installs what it needs. PYTHON is the interpreter from which .venv is created; test-gpu and bench-gpu
# use it directly, with its own torch and Triton.
#
# The clone may be in a folder of any name, because all paths are relative. PYTHON is a command, so a path with a space
# needs additional quotes (make PYTHON='"/my tools/python"'), and a $ in a variable on the command line is written $$.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The oldest supported Triton is installed here, separate from the one in .venv.
OLDEST := build/triton-oldest
# Run test files in parallel, each on two threads that release their processors while they wait.
WORKERS := -n auto --maxprocesses 8 --dist loadfile

.PHONY: help venv train check test test-faults lint launched-kernels count-compilations cases bench test-gpu bench-gpu gpu-report clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

venv: $(VENV)/.installed  ## .venv with the package, its C++ core and everything below

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "stn_fast needs Python 3.10 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || \
	  { echo "$(PYTHON) can't make virtual environments: install its venv package (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c "import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path('include') + '/Python.h'))" || \
	  { echo "$(PYTHON) lacks its C headers: install them (Debian: apt install python3-dev)" >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo "no C++ compiler: install g++, or name one in CXX (Debian: apt install g++)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@# The clone may have the package's name: from its parent folder it would be taken for a namespace package before the
	@# editable install is asked. An entry of its own on the path comes first.
	@$(RUN) -c "import os, pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'stn_fast_clone.pth').write_bytes(os.getcwdb() + b'\n')"
	@touch $@

train: venv  ## train a self-tuning network on ninety of scikit-learn's digits (ARGS="--seed 1" adds flags)
	$(RUN) -m stn_fast.train digits-small $(ARGS)

lint: venv  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# A few fast tests of most parts.
QUICK := tests/test_checks.py tests/test_core.py tests/test_dispatch.py tests/test_files.py tests/test_hyperparameters.py \
  tests/layers tests/ops/test_linear.py tests/ops/test_weight_decay.py tests/kernels/test_autotune.py \
  tests/training/test_config.py tests/training/test_methods.py tests/training/test_checkpoint.py tests/data/test_text.py

check: lint  ## lint and a minute of tests, before each commit
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(RUN) -m pytest -q -m "not gpu" $(WORKERS) $(ARGS) $(QUICK)

test: lint  ## lint, then every test that needs no GPU
	@$(MAKE) --no-print-directory triton-oldest || echo "tests that compile with the oldest Triton are skipped" >&2
	@$(MAKE) --no-print-directory $(VENV)/.exports || echo "tests of ONNX and safetensors are skipped" >&2
	@$(MAKE) --no-print-directory $(VENV)/.examples || \
	  echo "tests of timm, transformers, peft, Fabric and Accelerate are skipped" >&2
	@$(MAKE) --no-print-directory $(VENV)/.loggers || echo "tests of TensorBoard, W&B and MLflow are skipped" >&2
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(RUN) -m pytest -m "not gpu" $(WORKERS) $(ARGS)

test-faults: venv  ## kill runs and break disks and processes for half an hour; prints how many kills were survived
	@$(MAKE) --no-print-directory $(VENV)/.ray || echo "the test of Ray is skipped" >&2
	OMP_NUM_THREADS=1 $(RUN) tests/faults/kills.py --recipes digits fashion-mnist-small ptb-small --kills 20
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/faults $(ARGS)

launched-kernels: triton-oldest  ## compile every variant of a kernel that a step of a recipe launches (ARGS="digits" names one)
	$(RUN) tests/launched_kernels.py --triton $(OLDEST) $(ARGS)
	$(RUN) tests/launched_kernels.py $(ARGS)

COUNT := COMPILATIONS=benchmarks/results/compilations.json PYTHONPATH=tests OMP_NUM_THREADS=1 $(RUN) -m pytest -q \
  -p count_compilations -m "cuda and not gpu"

count-compilations: venv  ## count the compilations of the tests of `make gpu-report`, to plan its time
	PART=kernels $(COUNT) tests/kernels tests/ops -k "not 2_to_the_31"
	PART=steps $(COUNT) tests/layers tests/models tests/training || test $$? -eq 5

.PHONY: triton-oldest
triton-oldest: $(OLDEST)/.installed

$(OLDEST)/.installed: | venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLDEST) 'triton==3.6.*'
	@touch $@

$(VENV)/.exports: | venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt onnx onnxruntime onnxscript safetensors
	@touch $@

# The constraints keep the torch that is installed, and pip chooses the torchvision of its release, which timm needs.
$(VENV)/.examples: | venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt timm transformers peft lightning-fabric accelerate
	@touch $@

# SQLAlchemy and alembic, with which mlflow-skinny has a local store, come with optuna.
$(VENV)/.loggers: | venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt tensorboard wandb mlflow-skinny
	@touch $@

$(VENV)/.ray: | venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray[train]'
	@touch $@

compile-ahead: triton-oldest  ## compile every kernel for sm_80 and sm_90 with both ends of Triton's range; prints a table
	$(RUN) tests/compile_table.py --triton $(OLDEST) $(ARGS)
	$(RUN) tests/compile_table.py $(ARGS)

cases: venv  ## run every script in a folder (CASES=DIR); prints exit status and seconds, then the number of failures
	$(RUN) tests/run_cases.py "$$CASES"

bench: venv  ## speed on the CPU: compare tables, then ratios to the bare library products
	$(RUN) -m pytest benchmarks --benchmark-only --benchmark-group-by=group $(ARGS)
	$(RUN) -m benchmarks.ratios --device cpu --json benchmarks/results/cpu.json

.PHONY: gpu
gpu:
	@$(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null || \
	  { echo "$(PYTHON) has no torch with a CUDA device: run on a machine with a GPU, or name its Python: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .

test-gpu: gpu  ## every test that computes on a CUDA device; no network needed
	$(PYTHON) -m pytest -m cuda $(ARGS)

bench-gpu: gpu  ## ratios on a CUDA device; no network needed
	$(PYTHON) -m benchmarks.ratios --device cuda --json benchmarks/results/cuda.json $(ARGS)

# Uses the packages of the GPU's Python and installs nothing. A dry run is for machines without a GPU.
gpu-report: $(if $(DRY),venv)  ## all tests and measurements that need a GPU in nine minutes, into OUT=build/gpu (DRY=1: check the plan)
	$(if $(DRY),$(RUN),$(PYTHON)) -m benchmarks.gpu_report $(if $(DRY),--dry,--out "$${OUT:-build/gpu}") $(ARGS)

clean:  ## remove what was built and cached, .venv included; runs/ stays
	rm -rf $(VENV) build dist *.egg-info stn_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
