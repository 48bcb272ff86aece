#!/usr/bin/env bash
# Which branches of the pipeline's sources the random lane reaches; fails if one is neither reached
# nor explained in tools/branches.py. Needs clang and its llvm-profdata and llvm-cov.
#
#   tools/coverage.sh [--json FILE]
#
# Environment: SCHEDULES (default: 200000), JOBS.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in clang++ llvm-profdata llvm-cov; do
  command -v "$tool" >/dev/null || { echo "coverage needs $tool (Debian: clang, llvm)" >&2; exit 2; }
done
python=$(command -v python || command -v python3)
schedules=${SCHEDULES:-200000}

build=build-coverage
mkdir -p "$build"
cmake --preset coverage >"$build/configure.log"
cmake --build --preset coverage --parallel "${JOBS:-$(nproc)}" >"$build/build.log"
LLVM_PROFILE_FILE="$build/lanes.profraw" TORCH_OFFLOAD_SCHEDULES=$schedules \
  "$build/tests/cpp/test_lanes" --gtest_filter=RandomLaneTest.NoScheduleHasAHazard
llvm-profdata merge -sparse "$build/lanes.profraw" -o "$build/lanes.profdata"
llvm-cov export "$build/tests/cpp/test_lanes" -instr-profile="$build/lanes.profdata" \
  >"$build/branches.json"
"$python" tools/branches.py "$build/branches.json" --schedules "$schedules" "$@"
