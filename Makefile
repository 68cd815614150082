# make generate   build, and let the demo model write
# make test       everything that can be checked without a GPU
# make help       the other targets
SHELL := /bin/bash
JOBS ?= $(shell nproc)
BIN := build/release/bin
PYTHON := .venv/bin/python
# Not by git: a source archive has no repository.
CPP_FILES := $(shell find benchmarks examples include python src tests \
  -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')

PROMPT ?= It was a dark and stormy night, and the old gentleman
GENERATE_OPTIONS ?= --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1
# As it was typed: neither make nor the shell looks for $ or quotes in it.
export GENERATE_PROMPT := $(value PROMPT)

# The program and the library alone, unless build/release is configured for the tests as well.
# Compiling the CUDA code takes long, so that is for machines with a GPU.
GPU := $(wildcard /dev/nvidiactl /dev/dxg)
CONFIGURE_PROGRAM := $(if $(wildcard build/release/CTestTestfile.cmake),--preset release,\
  --preset program -DCLUSTERFUSION_CUDA=$(if $(GPU),AUTO,OFF))

# $(call stage,what it is,minutes on two cores)
stage = @echo "== $(1) (about $(2) on two cores, less what ccache has)" >&2

.PHONY: generate test build unit python-package python-test asan tsan fuzz lint format clean help

generate:  ## build the program and the library, and stream text from the demo model
	@tools/install_dependencies.sh build
	$(call stage,building in build/release,1 minute; with a GPU and CUDA 13 4 minutes)
	@cmake $(CONFIGURE_PROGRAM) $(CMAKE_ARGS) >&2
	@cmake --build --preset program -j $(JOBS) >&2
	@$(BIN)/clusterfusion generate models/demo --echo --prompt="$$GENERATE_PROMPT" $(GENERATE_OPTIONS)

SERVE_OPTIONS ?=
serve: python-package  ## serve the demo model by the OpenAI API on http://127.0.0.1:8000
	$(PYTHON) -m clusterfusion.serve models/demo $(SERVE_OPTIONS)
.PHONY: serve

test: lint unit python-test asan tsan fuzz  ## everything that can be checked without a GPU

deps:
	@tools/install_dependencies.sh test
.PHONY: deps

build: deps  ## all targets; with a CUDA toolkit the CUDA targets too
	$(call stage,the release build with its tests,2 minutes; with CUDA 13 8 more an architecture)
	cmake --preset release $(CMAKE_ARGS)
	cmake --build --preset release -j $(JOBS)

unit: build  ## C++ tests
	$(call stage,C++ tests,half a minute)
	ctest --preset release

# CPU only, to save the time: the release build has compiled the CUDA code already.
PACKAGE_OPTIONS ?= -Ccmake.define.CLUSTERFUSION_CUDA=OFF -Ccmake.define.CLUSTERFUSION_WERROR=ON

# Build folders are relative to the project for ccache, so that they share what is equal in them.
export CCACHE_BASEDIR := $(CURDIR)

# Python would set LC_CTYPE for the compiler, and ccache takes that for another compilation.
python-package wheel: export PYTHONCOERCECLOCALE := 0

python-package: deps  ## the Python package, into .venv
	$(call stage,the Python package,1 minute)
	$(PYTHON) -m pip install --quiet --no-build-isolation $(PACKAGE_OPTIONS) .

# With the CUDA code where there is a toolkit. libtvm_ffi.so comes with apache-tvm-ffi.
wheel: export CUDAARCHS ?= 80-real;90a-real;100-real;120-real
wheel:  ## dist/*.whl: the package and the program, for other machines
	@tools/install_dependencies.sh wheel
	$(call stage,the wheel,1 minute; with CUDA 13 15 minutes)
	@rm -rf build/unrepaired && mkdir -p build/unrepaired dist
	@$(PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/unrepaired \
	  $(WHEEL_OPTIONS) .
	@PATH=$(CURDIR)/.venv/bin:$$PATH $(PYTHON) -m auditwheel repair --wheel-dir dist \
	  --exclude libtvm_ffi.so --strip build/unrepaired/*.whl
.PHONY: wheel

# Two files at once, each by one process, which starts a file's servers once. One GPU is for one.
PYTEST_OPTIONS ?= $(if $(GPU),,-n 2 --dist loadfile --no-loadscope-reorder)

python-test: build python-package  ## Python tests, on the installed package and the built program
	$(call stage,Python tests,5 minutes; with CUDA 13 8 minutes)
	CLUSTERFUSION_BIN=$(CURDIR)/$(BIN)/clusterfusion CLUSTERFUSION_BUILD_DIR=$(CURDIR)/build/release \
	  $(PYTHON) -m pytest $(PYTEST_OPTIONS)

# Apart, since Ray is half a gigabyte and its processes are slow to start. Once it is installed,
# `make test` runs these tests as well.
ray-test: python-package  ## the server on several replicas, by Ray Serve, which it installs
	$(call stage,Ray and the tests of many replicas,3 minutes)
	$(PYTHON) -m pip install --quiet 'ray[serve]>=2.60'
	$(PYTHON) -m pytest tests/python/test_serve_ray.py
.PHONY: ray-test

asan-build: deps
	$(call stage,the build with AddressSanitizer and UndefinedBehaviorSanitizer,3 minutes)
	cmake --preset asan
	cmake --build --preset asan -j $(JOBS)
.PHONY: asan-build

asan: asan-build  ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call stage,C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer,2 minutes)
	ctest --preset asan

tsan: deps  ## C++ tests under ThreadSanitizer
	$(call stage,ThreadSanitizer: build and C++ tests,3 minutes)
	cmake --preset tsan
	cmake --build --preset tsan -j $(JOBS)
	ctest --preset tsan

FUZZ_SECONDS ?= 20
fuzz: asan-build  ## each fuzzer for FUZZ_SECONDS
	$(call stage,each fuzzer for $(FUZZ_SECONDS) s,2 minutes)
	tests/fuzz/run.sh build/asan $(FUZZ_SECONDS)

lint: deps  ## formatting and lint
	$(call stage,formatting and lint,10 s)
	@.venv/bin/clang-format --dry-run --Werror $(CPP_FILES)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	$(PYTHON) tools/update_readme.py --check
	$(PYTHON) benchmarks/plot.py --check
	$(PYTHON) tools/draw_machine.py --check

format: deps  ## put everything into the project's format
	.venv/bin/clang-format -i $(CPP_FILES)
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:  ## remove what was built
	rm -rf build .venv

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18
