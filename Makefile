# Everything that is done with a checkout. Each target sets up what it needs first; nothing is done twice.

PYTHON ?= python3
TORCH_INDEX_URL ?=
USE_CURRENT_ENV ?= 0
ARGS =

ifeq ($(USE_CURRENT_ENV),1)
PY := $(PYTHON)
STAMPS := build/stamps$(subst /,-,$(shell $(PYTHON) -c 'import sys; print(sys.prefix)' 2>/dev/null))
else
PY := .venv/bin/python
STAMPS := .venv
endif
PIP := $(PY) -m pip --disable-pip-version-check

# Idle OpenMP threads sleep instead of spinning: on cores that are shared, spinning makes everything several times slower.
export OMP_WAIT_POLICY ?= passive

CSRC := $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cuh" -o -name "*.cu")
TEST_CSRC := $(shell find tests -name "*.h" -o -name "*.cpp" -o -name "*.cu")

.PHONY: help setup train test test-full test-models bench lint cuda-check cuda-check-full cuda-docs cross-check sanitize clean FORCE

help: ## show this list (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'PYTHON=python3.12        the interpreter that .venv is created with (>= 3.10)'
	@echo 'TORCH_INDEX_URL=URL      the package index that torch comes from (for a CPU-only torch, say)'
	@echo 'USE_CURRENT_ENV=1        no .venv: the active environment, with its own torch >= 2.10'
	@echo 'ARGS="..."               options for train, test, test-full, test-models, bench'
	@echo 'TORCHCNN_CUDA=0|1|auto, CUDA_HOME, TORCH_CUDA_ARCH_LIST, NVCC_FLAGS, CXX, CFLAGS, MAX_JOBS   the build'

setup: $(STAMPS)/built ## create .venv, install the requirements, build and install torchcnn (editable)

train: $(STAMPS)/built ## train LeNet-5 on MNIST digits
	$(PY) examples/train_mnist.py $(ARGS)

test: $(STAMPS)/built ## run the tests, without the slow ones
	$(PY) -m pytest -m "not slow" $(ARGS)

test-full: $(STAMPS)/built ## run every test
	$(PY) -m pytest $(ARGS)

# A binary serves every torch: the extension that $(PY) has built is used as it is, under the torch of .venv-models.
test-models: $(STAMPS)/built .venv-models/required ## convert and compare models of torchvision and timm (downloads 5 GB)
	PYTHONPATH=$(CURDIR) .venv-models/bin/python -m pytest tests/test_models.py $(ARGS)

.venv-models/required: requirements-models.txt
	@test -x .venv-models/bin/python || $(PY) -m venv .venv-models
	.venv-models/bin/python -m pip --disable-pip-version-check install -r requirements-models.txt
	@touch $@

bench: $(STAMPS)/built ## run the benchmarks
	@test -f benchmarks/run.py || { echo 'make bench: there are no benchmarks yet.' >&2; exit 1; }
	$(PY) benchmarks/run.py $(ARGS)

lint: $(STAMPS)/required ## check style and types: ruff, clang-format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(CSRC) $(TEST_CSRC)
	@! grep -nE '^.{131,}' $(CSRC) $(TEST_CSRC) || { echo 'make lint: lines of at most 130 characters, comments too' >&2; exit 1; }
	$(PY) -m mypy
	$(PY) -m mypy --strict --follow-imports=silent tests/typed_use.py

cuda-check: $(STAMPS)/built build/cutlass ## check the CUDA kernels without a GPU: compile, link, read, emulate; what is missing is skipped
	$(PY) tests/cuda_check.py $(ARGS)

cuda-check-full: $(STAMPS)/built build/cutlass ## the same for every architecture and with every test; up to 40 minutes
	$(PY) tests/cuda_check.py --full $(ARGS)

# CuTe's layouts, which the emulator's are compared with: headers alone. Where they cannot be had, that test is skipped.
build/cutlass: | $(STAMPS)/required
	-$(PIP) install --quiet --no-deps --target $@ nvidia-cutlass==4.2.0.0

cuda-docs: $(STAMPS)/built ## write the table of docs/cuda_kernels.md anew, after a change to csrc/cuda
	$(PY) tests/cuda_check.py --only build
	$(PY) tests/cuda_sass.py --docs docs/cuda_kernels.md > /dev/null

# One row of the kernel table against the reference row, without PyTorch (tests/cross/compare_rows.cpp).
ROW_FLAGS = -std=c++20 -Icsrc -DNDEBUG -ffp-contract=fast -fno-math-errno -Wall -Wextra
ROW_SOURCES = $(wildcard csrc/cpu/isa/$(ROW)_*.cpp) csrc/cpu/isa/reference.cpp

cross-check: ROW = neon
cross-check: ## run the NEON kernels in an emulator: needs aarch64-linux-gnu-g++ and qemu-aarch64
	@mkdir -p build/cross
	printf '%s\n' $(ROW_SOURCES) | xargs -P 4 -I{} sh -c 'aarch64-linux-gnu-g++ $(ROW_FLAGS) -O2 -c {} -o build/cross/$$(basename {} .cpp).o'
	aarch64-linux-gnu-g++ $(ROW_FLAGS) -DROW=$(ROW) -static tests/cross/compare_rows.cpp build/cross/*.o -o build/cross/compare_rows
	qemu-aarch64 build/cross/compare_rows $(ARGS)

sanitize: ROW = avx2
sanitize: ## run the kernels of ROW=avx2|avx512|scalar under the address and undefined-behaviour sanitizers; some minutes
	@mkdir -p build/sanitize-$(ROW)
	printf '%s\n' $(ROW_SOURCES) | xargs -P 2 -I{} sh -c '$(or $(CXX),g++) $(ROW_FLAGS) $(SANITIZERS) -c {} -o build/sanitize-$(ROW)/$$(basename {} .cpp).o'
	$(or $(CXX),g++) $(ROW_FLAGS) $(SANITIZERS) -DROW=$(ROW) tests/cross/compare_rows.cpp build/sanitize-$(ROW)/*.o -o build/sanitize-$(ROW)/compare_rows
	build/sanitize-$(ROW)/compare_rows $(ARGS)

# Vectors are loaded from any address, and bits shifted out of negative numbers, on purpose.
SANITIZERS = -O1 -g -fsanitize=address,undefined -fno-sanitize=shift,alignment -fno-sanitize-recover=all

clean: ## remove what was built and cached; .venv and runs/ stay
	rm -rf build dist torchcnn.egg-info torchcnn/_C.*.so .venv/built
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find csrc torchcnn tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp takes the time at which its recipe began, so that a file edited meanwhile counts as newer.
$(STAMPS)/required: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: PYTHON=$(PYTHON) is not Python >= 3.10; name one, such as: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@.begun
ifeq ($(USE_CURRENT_ENV),1)
	@$(PY) -c 'import re, torch; assert [int(n) for n in re.findall("[0-9]+", torch.__version__)[:2]] >= [2, 10]' 2>/dev/null || { \
	  echo "make: USE_CURRENT_ENV=1 needs torch >= 2.10 in the environment of $(PYTHON); install it first" >&2; exit 1; }
	grep -Ev '^(torch|numpy)==' requirements-dev.txt | $(PIP) install -r /dev/stdin
else
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX_URL),$(PIP) install --no-deps --index-url $(TORCH_INDEX_URL) $(shell grep '^torch==' requirements-dev.txt))
	$(PIP) install -r requirements-dev.txt
endif
	@mv $@.begun $@

# torchcnn/__init__.py states the version.
$(STAMPS)/built: $(STAMPS)/required setup.py pyproject.toml torchcnn/__init__.py $(CSRC) $(if $(wildcard torchcnn/_C.*),,FORCE)
	@touch $@.begun
	@echo 'Building torchcnn (a minute or two the first time).'
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@mv $@.begun $@

FORCE:
