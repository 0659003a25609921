# make demo | test | test-triton | test-cuda-host | test-ptx | lint | sanitize | bench
# All of them create .venv if it is not there. Not so, and without network, see CONTRIBUTING.md:
# make gpu                    on a machine with an NVIDIA GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*/*.* tests/cuda_shim/*.* tests/ptx/*.h tests/ptx/*.cpp)

.PHONY: demo test test-triton test-cuda-host test-ptx lint format sanitize bench gpu clean

SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*/*)

# CPU torch where no GPU is visible, the newest torch where one is. torch goes in first, so that no
# later resolver run replaces it.
$(VENV)/stamp-torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || \
	  if nvidia-smi -L >/dev/null 2>&1; then $(BIN)/pip install --quiet torch; \
	  else $(BIN)/pip install --quiet torch==2.13.0; fi
	touch $@

# The stamps make a second run free until the packaging or the native code changes. `dev` is the
# larger set; installing it also serves the demo, so that nothing is built twice.
$(VENV)/stamp: $(VENV)/stamp-torch $(SOURCES)
	$(BIN)/pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/stamp-dev: $(VENV)/stamp-torch $(SOURCES)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $(VENV)/stamp $@

demo: $(VENV)/stamp
	$(BIN)/mdkernels demo --out demo-out

test: $(VENV)/stamp-dev
	$(BIN)/python -m pytest -n 2

# The Triton kernels without a GPU: under the interpreter (which must be chosen before triton is
# imported, hence a process of its own), and compiled for every supported GPU.
test-triton: $(VENV)/stamp-dev
	TRITON_INTERPRET=1 $(BIN)/python -W ignore -m pytest -W ignore -n 2 \
	  $$(grep -l "mark.interpreted" tests/test_*.py)
	$(BIN)/python tests/triton_compile/gate.py

lint: $(VENV)/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# AddressSanitizer and UndefinedBehaviorSanitizer over the op tests, in a build of their own.
sanitize: $(VENV)/stamp-dev
	bash tests/sanitize.sh $(BIN)/python

# The CUDA kernels, compiled for the host: needs neither a GPU nor a CUDA toolkit.
test-cuda-host: $(VENV)/stamp-dev
	sh tests/cuda_lane.sh $(BIN)/python

# What nvcc and Triton made of the kernels (their PTX), translated for the host.
test-ptx: $(VENV)/stamp-dev
	sh tests/ptx/lane.sh $(BIN)/python

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
