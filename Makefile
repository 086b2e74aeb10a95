# Two commands do everything: `make demo` and `make test`. Each sets up what is missing, in .venv, and nothing twice.
#   make TORCH="torch==2.13.0" test     against another torch
#   TORCH_CURVATURE_CUDA=0 make build   without the CUDA kernels
VENV  ?= .venv
TORCH ?= torch
BASE_PYTHON ?= python3

PYTHON := $(VENV)/bin/python
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/*.h)
PYTEST_ARGUMENTS ?=

.PHONY: demo test test-gpu lint format bench build clean distclean
.DELETE_ON_ERROR:

demo: build
	$(PYTHON) -m examples.digits

test: build
	$(PYTHON) -m pytest $(PYTEST_ARGUMENTS)

# Operators, engine and Hessians on a GPU against plain torch and the reference, the sanitizers of the CUDA toolkit on a short
# set, the benchmarks there, and every kernel's time beside its bound. Stops at once where torch sees no GPU.
SANITIZED := tests/ops/test_values.py -k "test_equals_plain_operations and (float32 or bfloat16) and not 1000"
test-gpu: build
	$(PYTHON) -m pytest tests/ops tests/losses/test_precision.py tests/engine/test_matrices.py tests/engine/test_losses_and_splits.py \
	  tests/hessian/test_models.py --device cuda
	@command -v compute-sanitizer || { echo "compute-sanitizer of the CUDA toolkit is not on the PATH"; exit 1; }
	for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest $(SANITIZED) --device cuda || exit 1; \
	done
	$(PYTHON) -m benchmarks --device cuda
	$(PYTHON) -m benchmarks --device cuda --rooflines

lint: $(VENV)/.ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(shell git ls-files 'csrc/**' 'tests/**/*.cpp' 'tests/**/*.hpp' 'tests/**/*.h' | grep -E '\.(cpp|h|hpp|cu|cuh)$$')

format: $(VENV)/.ready
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(VENV)/bin/clang-format -i $(shell git ls-files 'csrc/**' 'tests/**/*.cpp' 'tests/**/*.hpp' 'tests/**/*.h' | grep -E '\.(cpp|h|hpp|cu|cuh)$$')

bench: build
	$(PYTHON) -m benchmarks $(BENCH_ARGUMENTS)

build: $(VENV)/.built

# The stamp is written last: a set-up that was interrupted has none, and starts over.
$(VENV)/.ready: requirements-dev.txt
	@if [ -d $(VENV) ] && [ ! -e $@ ]; then echo "An unfinished $(VENV) is in the way: starting over."; rm -rf $(VENV); fi
	[ -d $(VENV) ] || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet "$(TORCH)" -r requirements-dev.txt
	$(PYTHON) -c "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'torch_curvature.pth').write_text(str(pathlib.Path.cwd()))"
	touch $@

$(VENV)/.built: $(VENV)/.ready setup.py $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build dist output *.egg-info torch_curvature/_C.*.so $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .benchmarks
