# make demo | test | lint | sanitize | bench      (all of them create .venv if it is not there)
# make gpu                    on a machine with an NVIDIA GPU; needs no network, see CONTRIBUTING.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format sanitize bench gpu clean

# CPU torch where no GPU is visible, the newest torch where one is. torch goes in first, so that no
# later resolver run replaces it. The stamp makes a second run free until the packaging changes.
$(VENV)/stamp: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || \
	  if nvidia-smi -L >/dev/null 2>&1; then $(BIN)/pip install --quiet torch; \
	  else $(BIN)/pip install --quiet torch==2.13.0; fi
	$(BIN)/pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/stamp-dev: $(VENV)/stamp
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

demo: $(VENV)/stamp
	$(BIN)/mdkernels demo --out demo-out

test: $(VENV)/stamp-dev
	$(BIN)/python -m pytest

lint: $(VENV)/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl

format: $(VENV)/stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl

# AddressSanitizer and UndefinedBehaviorSanitizer over the op tests, in a build of their own.
sanitize: $(VENV)/stamp-dev
	bash tests/sanitize.sh $(BIN)/python

bench: $(VENV)/stamp-dev
	$(BIN)/python bench/run.py --suite full

# With the Python of .venv if it is there, else with $(PYTHON). Every step runs whatever the one
# before it found, and the first failure is the result.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	$(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	status=0; \
	$(GPU_PYTHON) tests/run_gpu.py || status=1; \
	$(GPU_PYTHON) tests/sanitize_gpu.py || status=1; \
	$(GPU_PYTHON) bench/run.py --device cuda || status=1; \
	exit $$status

clean:
	rm -rf build dist *.egg-info mdkernels/*.so mdkernels/_build_info.py
