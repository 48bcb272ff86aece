#!/usr/bin/env bash
# Builds sdist and wheel as a user would, and imports the installed wheel in an environment of its
# own, away from the source tree.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# From the sdist, so that a file which it lacks is missed here.
"$python" -c "from setuptools import build_meta; build_meta.build_sdist('$work')" >"$work/sdist.log"
"$python" -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps \
  --wheel-dir "$work/dist" "$work"/torch_offload-*.tar.gz

"$python" -m venv --without-pip "$work/venv"
# torch is 5 GB on disk: its packages are lent by .venv, behind the ones installed here.
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/lent.pth"
"$python" -m pip --disable-pip-version-check --python "$work/venv/bin/python" install --quiet \
  --no-deps "$work"/dist/*.whl

cd "$work"
"$work/venv/bin/python" - "$site" <<'EOF'
import sys
import torch_offload
from torch_offload import _C, _version

assert torch_offload.__file__.startswith(sys.argv[1]), f"imported from {torch_offload.__file__}"
assert _C.__file__.startswith(sys.argv[1]), f"extension from {_C.__file__}"
assert torch_offload.__version__ == _version.__version__
print(f"the wheel of torch_offload {torch_offload.__version__} installs and imports")
EOF
