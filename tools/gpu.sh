#!/usr/bin/env bash
# Builds, tests and benchmarks on a machine with a GPU and no network, with the Python found there.
#
#   tools/gpu.sh [results-folder]               default: results
#
# Environment: PYTHON (default: python3), WHEELS (a folder of wheels to install first),
# PARTS (default: "build cpp sanitizer lanes python bench"), LIMIT_<PART> (seconds, LIMIT_BENCH=900), JOBS,
# CTEST, PYTEST and BENCH (arguments of the three: files, options), WORKERS (of the Python tests).
#
# sanitizer: compute-sanitizer over the C++ tests of device and decoder. lanes: the self-check's
# lanes of the GPU in full, into correctness_gpu.json, and the self-check, into selfcheck.json.
# A part that fails does not keep the later ones from running, but for the build. The exit status
# is the worst one, and the summary comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-results}
mkdir -p "$results"
results=$(cd "$results" && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "no Python: name one in PYTHON" >&2; exit 2; }
jobs=${JOBS:-$(nproc)}
parts=${PARTS:-build cpp sanitizer lanes python bench}
compute_sanitizer=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer)
worst=0
summary=()
not_here=77  # status of a part whose tool does not work on this machine

# part NAME SECONDS COMMAND...: runs the command in its time, its output into NAME.log as well.
part() {
  local name=$1 limit_variable="LIMIT_${1^^}" limit=$2 status seconds
  shift 2
  limit=${!limit_variable:-$limit}
  case " $parts " in *" $name "*) ;; *) return 0 ;; esac
  echo "=== $name (at most $limit s): $*"
  SECONDS=0
  timeout --kill-after=20 "$limit" "$@" 2>&1 | tee "$results/$name.log"
  status=${PIPESTATUS[0]}
  seconds=$SECONDS
  case $status in
    0) summary+=("$(printf '%-9s passed in %s s' "$name" "$seconds")") ;;
    "$not_here")
      skip "$name: the tool does not work on this machine (after $seconds s)"
      return 0
      ;;
    124 | 137) summary+=("$(printf '%-9s STOPPED after its %s s' "$name" "$limit")") ;;
    *) summary+=("$(printf '%-9s FAILED (%s) in %s s' "$name" "$status" "$seconds")") ;;
  esac
  [ "$status" -le "$worst" ] || worst=$status
  return "$status"
}

skip() {
  echo "SKIPPED: $*" >&2
  summary+=("SKIPPED  $*")
}

finish() {
  { printf '%s\n' "${summary[@]}"; echo "logs and figures: $results"; } | tee "$results/summary.txt"
  exit "$worst"
}

# In a folder of its own: build/ may be another machine's, with other paths in its cache.
configure() {
  cmake -S . -B build-gpu -DCMAKE_BUILD_TYPE=Release -DTORCH_OFFLOAD_WERROR=ON \
    -DPython_EXECUTABLE="$python" -DTORCH_OFFLOAD_TESTS="$1"
}

build() {
  # Without GoogleTest the rest can still be tried; `cpp` then has no tests and fails, which says so.
  { configure ON || { echo "SKIPPED: the C++ tests do not configure" >&2; configure OFF; }; } &&
    cmake --build build-gpu --parallel "$jobs" && cmake --install build-gpu --prefix .
}

# Memory of the device; races of the decoder's threads over what a block shares. An error that a
# call of CUDA returns is no finding: the tests ask for some. Planted faults must be found first.
sanitizer() {
  local status=0 test planted=build-gpu/planted_fault
  check() {
    local tool=$1
    shift
    echo "--- $tool over $*"
    "$compute_sanitizer" --tool "$tool" --error-exitcode 9 --report-api-errors no "$@"
  }
  "$(dirname "$compute_sanitizer")/nvcc" -arch=native -o "$planted" tests/gpu/planted_fault.cu ||
    return 1
  check memcheck "$planted" none && check racecheck "$planted" none || return "$not_here"
  for test in "memcheck bounds" "racecheck race"; do
    check "${test% *}" "$planted" "${test#* }"
    [ $? -eq 9 ] || { echo "${test% *} misses its planted fault" >&2; return 1; }
  done
  for test in test_cuda_device test_cuda_files test_cuda_times test_packed_decoder; do
    if [ -x "build-gpu/tests/cpp/$test" ]; then
      # memcheck slows kernels down, which this one test, of how precise their times are, cannot take.
      check memcheck "build-gpu/tests/cpp/$test" \
        --gtest_filter=-CudaTimesTest.LongLogsKeepTheirPrecisionOnEveryStream || status=1
    else
      echo "SKIPPED: $test is not built" >&2
    fi
  done
  [ ! -x build-gpu/tests/cpp/test_packed_decoder ] ||
    check racecheck build-gpu/tests/cpp/test_packed_decoder || status=1
  return "$status"
}

lanes() {
  local status=0
  "$python" benchmarks/correctness.py --subject correctness_gpu --results-dir "$results" \
    --lanes "published races,tried races,visible races on cuda,equality on cuda,overlap" || status=1
  "$python" -m torch_offload selfcheck --json "$results/selfcheck.json" || status=1
  return "$status"
}

has_module() { "$python" -c "import $1" 2>/dev/null; }

if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl ||
    skip "the wheels of $WHEELS did not install"
fi
{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  "$python" -c 'import sys, torch; print(sys.version, "torch", torch.__version__)'
  git log -1 --format='commit %h %s' 2>/dev/null
} | tee "$results/machine.txt"

# The answer to a missing GPU: in the tests a skip becomes a failure.
export TORCH_OFFLOAD_REQUIRE_CUDA=1 PYTHONPATH=$PWD
export -f build configure lanes sanitizer
export python jobs results compute_sanitizer not_here

part build 500 bash -c build || finish
part cpp 300 ctest --test-dir build-gpu --output-on-failure --no-tests=error --timeout 120 ${CTEST:-}
if [ -n "$compute_sanitizer" ]; then
  part sanitizer 400 bash -c sanitizer
else
  skip "sanitizer: compute-sanitizer is missing"
fi
if has_module typer && has_module rich; then
  part lanes 300 bash -c lanes
else
  skip "lanes: typer or rich is missing"
fi

if has_module pytest && has_module pytest_timeout && has_module hypothesis; then
  # Older pytest-benchmark warns of workers beside each other, and a warning is an error.
  pytest=("$python" -m pytest -p no:benchmark --junitxml "$results/python.xml")
  ! has_module xdist || pytest+=(-n "${WORKERS:-4}")
  part python 1200 "${pytest[@]}" ${PYTEST:-}
  if has_module pytest_benchmark; then
    part bench 1500 "$python" -m pytest ${BENCH:-benchmarks} "--results-dir=$results"
  else
    skip "bench: pytest-benchmark is missing"
  fi
else
  worst=1
  skip "python and bench: pytest, pytest-timeout or hypothesis is missing"
fi
finish
