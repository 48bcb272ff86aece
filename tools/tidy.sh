#!/usr/bin/env bash
# clang-tidy over the product's sources: `core` without torch (quick), `all` with it (minutes).
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  core) extension=OFF sources='/csrc/(check|codec|core|host|lanes|planner|sim)/' ;;
  all) extension=ON sources='/csrc/' ;;
  *) echo "usage: tools/tidy.sh core|all" >&2; exit 2 ;;
esac

# A folder of its own: only the compile commands are wanted, nothing is built.
build="build-tidy-$1"
cmake -S . -B "$build" -G Ninja -DTORCH_OFFLOAD_EXTENSION=$extension \
  -DPython_EXECUTABLE="$(command -v python)" >"$build.log" 2>&1 || { cat "$build.log" >&2; exit 1; }
rm "$build.log"
run-clang-tidy.py -quiet -p "$build" -j "${JOBS:-$(nproc)}" "$sources" 2>/dev/null
