# `make test` and `make bench` on a fresh machine: they create .venv, install what is needed, compile, and run.
# Variables: TORCH="torch==2.13.0" chooses another torch, PYTHON the Python, ARGS are passed on to pytest or the benchmark.

TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

NEW_ENOUGH := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(foreach python,python3 python3.13 python3.12 python3.11 python3.10,\
	$(shell $(python) -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $(python))))
SOURCES := setup.py pyproject.toml tools/toolchain.py tools/nvcc_report.py $(shell find csrc -type f)

MAKEFLAGS += --no-print-directory
.NOTPARALLEL:
.PHONY: test kernels bench bench-margin bench-otface bench-compat lint clean FORCE

test: export OTFACE_WERROR = 1
test: $(VENV)/test
	$(BIN)/python -m pytest $(ARGS)

# A kernel of the register tier has this class among its template arguments.
kernels: $(VENV)/compiled
	$(BIN)/python tools/kernel_resources.py --registers-only 'RegisterMatrix<'

bench: $(VENV)/bench
	$(BIN)/python benchmarks/bench_sinkhorn.py $(ARGS)

bench-margin: $(VENV)/bench
	$(BIN)/python benchmarks/bench_margin.py $(ARGS)

bench-otface: $(VENV)/bench
	$(BIN)/python benchmarks/bench_otface.py $(ARGS)

bench-compat: $(VENV)/bench
	$(BIN)/python benchmarks/bench_compat.py $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf $(VENV) build dist *.egg-info otface_cuda/*.so

# A stamp for each optional group of pyproject.toml. The package is there already, so pip adds what the group names.
$(VENV)/test $(VENV)/bench $(VENV)/dev: $(VENV)/%: $(VENV)/compiled
	$(PIP) 'otface_cuda[$*]'
	@$(BIN)/python -m otface_cuda
	@touch $@

$(VENV)/compiled: $(VENV)/torch $(SOURCES)
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/torch: $(VENV)/settings
	$(PIP) '$(TORCH)'
	$(PIP) 'setuptools>=77' ninja
	@touch $@

# What the environment was made for. It is written only when that changes, and then all that follows is done again.
SETTINGS := $(TORCH) $(foreach name,OTFACE_CUDA TORCH_CUDA_ARCH_LIST CUDA_HOME CXX,$(name)=$($(name)))
$(VENV)/settings: $(VENV)/created FORCE
	@echo '$(SETTINGS)' | cmp --silent - $@ || echo '$(SETTINGS)' > $@

$(VENV)/created:
	@test -n '$(PYTHON)' || { echo 'No Python 3.10 or later with its venv module was found; set PYTHON to one.'; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
