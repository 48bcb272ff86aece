#!/usr/bin/env bash
# Builds and tests a clean checkout against other versions, in fresh environments; run by hand.
#
#   tools/matrix.sh                             every Python found, torch 2.11.0 and the newest
#   tools/matrix.sh python3.13:2.15.0 ...       these pairs only
#
# What is committed is what is tried. Each pair takes some 6 GB under ${TMPDIR:-/tmp} while it runs.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
oldest=2.11.0

newest_torch() {
  python3 -m pip --disable-pip-version-check index versions torch 2>/dev/null | sed -n '1s/.*(\(.*\))/\1/p'
}

pairs=("$@")
if [ ${#pairs[@]} = 0 ]; then
  newest=$(newest_torch)
  [ -n "$newest" ] || { echo "The index does not say which torch is the newest: name pairs." >&2; exit 2; }
  for python in python3.11 python3.12 python3.13; do
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      pairs+=("$python:$oldest" "$python:$newest")
    else
      echo "skipped: $python is not here" >&2
    fi
  done
fi

try_pair() {  # try_pair PYTHON TORCH FOLDER
  local python=$1 torch=$2 folder=$3
  git clone --quiet "$root" "$folder" && cd "$folder" || return 1
  # Other versions of torch bring other versions of CUDA, whose missing headers must match them.
  local cuda_free=requirements/versions.txt.new
  grep -vE '^(torch|nvidia-cuda-[a-z]+|setuptools)==' requirements/versions.txt >"$cuda_free"
  mv "$cuda_free" requirements/versions.txt
  "$python" -m venv .venv &&
    .venv/bin/python -m pip --disable-pip-version-check install --quiet "torch==$torch" || return 1
  local cuda
  cuda=$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")')
  local setuptools
  setuptools=$(.venv/bin/python -c 'from importlib import metadata; print(metadata.version("setuptools"))')
  printf '%s\n' "torch==$torch" "setuptools==$setuptools" >>requirements/versions.txt
  [ -z "$cuda" ] || printf '%s\n' "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-cccl==$cuda.*" \
    >>requirements/versions.txt
  make test PYTHON="$python"
}

worst=0
summary=()
for pair in "${pairs[@]}"; do
  folder=$(mktemp -d)
  log="matrix-${pair/:/-torch}.log"
  if (try_pair "${pair%%:*}" "${pair##*:}" "$folder/tree") >"$log" 2>&1; then
    summary+=("passed  $pair  $(grep -aE '^(=+ )?[0-9]+ passed|passed' "$log" | tail -n 1 | tr -d '=')")
    rm "$log"
  else
    worst=1
    summary+=("FAILED  $pair  see $log")
  fi
  rm -rf "$folder"
done
printf '%s\n' "${summary[@]}"
exit $worst
