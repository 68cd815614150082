# make generate   build, and let the demo model write
# make test       everything that can be checked without a GPU
# make help       the other targets
SHELL := /bin/bash
JOBS ?= $(shell nproc)
BIN := build/release/bin
PYTHON := .venv/bin/python
CPP_FILES = $(shell git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh')

PROMPT ?= It was a dark and stormy night, and the old gentleman
GENERATE_OPTIONS ?= --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1

.PHONY: generate test build unit python-package python-test asan tsan fuzz lint format clean help

generate:  ## build the program and stream text from the demo model
	@tools/install_dependencies.sh build
	@cmake --preset release $(CMAKE_ARGS) >&2
	@cmake --build --preset release -j $(JOBS) --target clusterfusion_cli >&2
	@$(BIN)/clusterfusion generate models/demo --echo -p "$(PROMPT)" $(GENERATE_OPTIONS)

test: lint unit python-test asan tsan fuzz  ## everything that can be checked without a GPU

deps:
	@tools/install_dependencies.sh test
.PHONY: deps

build: deps  ## all targets; with a CUDA toolkit the CUDA targets too
	cmake --preset release $(CMAKE_ARGS)
	cmake --build --preset release -j $(JOBS)

unit: build  ## C++ tests
	ctest --preset release

# CPU only, to save the time: the release build has compiled the CUDA code already. A plain
# `pip install .` takes it in where there is a CUDA toolkit.
WHEEL_OPTIONS ?= -Ccmake.define.CLUSTERFUSION_CUDA=OFF -Ccmake.define.CLUSTERFUSION_WERROR=ON

python-package: deps  ## the Python package, into .venv
	$(PYTHON) -m pip install --quiet --no-build-isolation $(WHEEL_OPTIONS) .

python-test: build python-package  ## Python tests, on the installed package and the built program
	CLUSTERFUSION_BIN=$(CURDIR)/$(BIN)/clusterfusion CLUSTERFUSION_BUILD_DIR=$(CURDIR)/build/release \
	  $(PYTHON) -m pytest

asan-build: deps
	cmake --preset asan
	cmake --build --preset asan -j $(JOBS)
.PHONY: asan-build

asan: asan-build  ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	ctest --preset asan

tsan: deps  ## C++ tests under ThreadSanitizer
	cmake --preset tsan
	cmake --build --preset tsan -j $(JOBS)
	ctest --preset tsan

FUZZ_SECONDS ?= 20
fuzz: asan-build  ## each fuzzer for FUZZ_SECONDS
	tests/fuzz/run.sh build/asan $(FUZZ_SECONDS)

lint: deps  ## formatting and lint
	.venv/bin/clang-format --dry-run --Werror $(CPP_FILES)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	$(PYTHON) tools/update_readme.py --check
	$(PYTHON) benchmarks/plot.py --check

format: deps  ## put everything into the project's format
	.venv/bin/clang-format -i $(CPP_FILES)
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:  ## remove what was built
	rm -rf build .venv

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18
