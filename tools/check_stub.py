"""Compares torch_offload/_C.pyi with the built module; exits 1 and says where they differ.

stubtest takes some habits of pybind11 for differences. They are told by their message, not by an
allowlist of names, which would also hide that a class or a function is missing.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What pybind11 does to every class.
HABITS = re.compile(
    r"is inconsistent, metaclass differs"
    r"|\.__init__ is inconsistent, stub does not have \*args parameter"
)


def main() -> int:
    if not (ROOT / "torch_offload/_C.pyi").is_file():  # stubtest then finds no fault at all
        print("torch_offload/_C.pyi is missing")
        return 1
    command = ["-m", "mypy.stubtest", "--concise", "--ignore-disjoint-bases", "torch_offload._C"]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = result.stdout.splitlines()
    differences = [line for line in lines if line and not HABITS.search(line)]
    if result.returncode == 0:
        return 0
    print("\n".join(differences), result.stderr, sep="\n")
    # A failure without a single line of its own is a stubtest that did not run.
    return 1 if differences or not lines or result.stderr else 0


if __name__ == "__main__":
    sys.exit(main())
