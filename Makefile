# On a new machine, run make sample and make test. CONTRIBUTING.md describes the other targets.
PYTHON ?= python3
VENV ?= .venv
# A word such as torch==2.6.0 replaces that package's pin in constraints.txt. A name without a version removes the pin.
VERSIONS ?=

export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
PINS := $(VENV)/constraints.txt
# --no-compile: compiling all of torch to bytecode takes longer than compiling the imported modules at their first import.
INSTALL := $(BIN)/pip install --no-compile --constraint $(PINS)
unexport PYTHONDONTWRITEBYTECODE
SOURCES := pyproject.toml setup.py CMakeLists.txt \
	$(shell find csrc fastddpm -type f ! -name '*.pyc' ! -name '*.so' ! -name _build_info.json)
NATIVE := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# With nvcc, compile CUDA kernels for this machine's GPUs, or for one architecture. pip install . compiles for five.
export FASTDDPM_CUDA_ARCHS ?= auto

# Every op has a test file with its name.
OPS := $(patsubst fastddpm/ops/%.py,%,$(filter-out fastddpm/ops/_% fastddpm/ops/rng.py fastddpm/ops/winograd.py,$(wildcard fastddpm/ops/*.py)))
PYTEST := $(BIN)/pytest -n auto --dist loadfile
ONE_SHAPE := -m "not slow and not thorough"
# Limits torch, oneDNN and fastddpm's kernels to AVX2 on a processor that has more.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 FASTDDPM_CPU_VARIANT=avx2

.PHONY: sample test quick slow capped bench docs ptxas gpu gpu-check gpu-steps gpu-ops gpu-peers lint format oldest newest clean

sample: $(VENV)/installed
	$(BIN)/fastddpm sample -n 16 -o samples.png

# The tests of a file share their setup, so each worker runs whole files.
test: $(VENV)/test
	$(PYTEST)

slow: $(VENV)/test
	$(PYTEST) -m slow

# The fast tests: references, tables, the chain, the network, and one shape of each kernel.
quick: $(VENV)/test
	$(PYTEST) $(ONE_SHAPE) $(patsubst %,tests/test_%.py,$(OPS) winograd schedule coefficients sampling unet)

# The tests that depend on the processor, limited to AVX2, and then the ops' tests on the generic kernels.
capped: $(VENV)/test
	if $(BIN)/python -c "import torch; exit(not torch.cpu._is_avx2_supported())"; then \
	$(AVX2) $(PYTEST) $(ONE_SHAPE) $(patsubst %,tests/test_%.py,$(OPS) winograd engine sampling fuse_norms checkpoints); \
	else echo "make capped: this processor has no AVX2"; fi
	FASTDDPM_CPU_VARIANT=generic $(PYTEST) $(ONE_SHAPE) $(patsubst %,tests/test_%.py,$(OPS))

bench: $(VENV)/bench
	$(BIN)/python benchmarks/steps_per_sec.py
	$(BIN)/python benchmarks/kernels.py

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

# Requires nvcc, but no GPU. A program that the tests build reports how work is split.
ptxas: $(VENV)/test
	$(BIN)/python benchmarks/ptxas.py

# Installs the package into $(PYTHON), with its torch, on a machine with a GPU, and verifies it there. No network is needed. Each
# piece is independent and ends within nine minutes, including the installation. -k continues with the next piece after an
# error: Error 1 is a wrong result, Error 2 means that nothing could run, Error 3 is a missed target. The timeout is for a call
# that hangs.
gpu:
	@$(MAKE) --no-print-directory -k -j1 gpu-check gpu-steps gpu-ops gpu-peers

gpu-check gpu-steps gpu-ops gpu-peers: gpu-%: build/gpu-installed
	timeout -k 10 440 $(PYTHON) benchmarks/gpu.py $* $(GPU_OPTIONS)

# Remove the stamp if fastddpm is not installed, as in another Python or a new container.
ifneq ($(filter gpu%,$(MAKECMDGOALS)),)
$(shell $(PYTHON) -P -c 'import fastddpm' 2>/dev/null || rm -f build/gpu-installed)
endif

build/gpu-installed: $(SOURCES)
	FASTDDPM_REQUIRE_NATIVE=1 $(PYTHON) -m pip install --no-build-isolation --no-deps .
	@mkdir -p $(@D) && touch $@

lint: $(VENV)/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	PYTHONPATH=. $(BIN)/lint-imports --no-cache --no-logo
	./.ci/words

format: $(VENV)/lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

# The test suite with the oldest torch that pyproject.toml allows, and with the newest release. Each torch requires its own
# triton, and torch 2.6.0 requires one version of sympy.
oldest:
	$(MAKE) test VENV=.venv-oldest VERSIONS="torch==2.6.0 triton sympy"

newest:
	$(MAKE) test VENV=.venv-newest VERSIONS="torch triton"

clean:
	rm -rf .venv .venv-oldest .venv-newest build samples.png .pytest_cache .ruff_cache .hypothesis

# The environment. Empty files in it record which of its parts are installed.
$(PINS): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastddpm needs Python 3.11 or newer; \
	name one: make PYTHON=python3.12 ..., this is " + sys.version.split()[0])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt pip
	@sed -e '' $(foreach word,$(VERSIONS),-e '/^$(firstword $(subst ==, ,$(word)))==/d') constraints.txt >$@.new
	@for word in $(VERSIONS); do echo "$$word" >>$@.new; done
	@mv $@.new $@

# pip hides the compilation, so the recipe announces it.
$(VENV)/installed: $(PINS) $(SOURCES)
	@echo "Installing PyTorch, then compiling fastddpm (FASTDDPM_CUDA_ARCHS=$(FASTDDPM_CUDA_ARCHS))."
	@echo "On two cores, compiling takes 15 to 60 s, and 10 to 40 s more for each GPU architecture."
	@start=$$(date +%s); $(INSTALL) --build-constraint $(PINS) . || exit; \
	echo "Installed in $$(($$(date +%s) - start)) s."
	@touch $@

# fastddpm is already installed, so pip fetches only the packages of the extra.
$(VENV)/test $(VENV)/bench $(VENV)/docs: $(VENV)/%: $(VENV)/installed
	$(INSTALL) "fastddpm[$*]"
	@touch $@

$(VENV)/lint: $(PINS)
	$(INSTALL) ruff clang-format import-linter
	@touch $@
