#!/usr/bin/env python3
"""Runs C++ tests of the GPU under NVIDIA's compute-sanitizer; as JSON with --json.

    tools/device_sanitizer.py BUILD [--json compute_sanitizer.json]

memcheck over everything that calls CUDA, racecheck over what a block's threads share: the decoder.
Each tool must first find a planted fault, and nothing in a clean run of the same program; where it
cannot, it does not work on this machine (exit status 77). An error that a call of CUDA returns is
no finding: the tests ask for some.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_FOUND = 9
_NOT_HERE = 77

_PLANTED = {"memcheck": "bounds", "racecheck": "race"}
# Under memcheck kernels take many times as long, and what is tested there is how well times fit.
_TIMES_ONLY = "CudaTimesTest.LongLogsKeepTheirPrecisionOnEveryStream"
_RUNS = (
    ("memcheck", "test_cuda_device"),
    ("memcheck", "test_cuda_files"),
    ("memcheck", "test_cuda_times"),
    ("memcheck", "test_packed_decoder"),
    ("racecheck", "test_packed_decoder"),
)


def _sanitizer() -> Path | None:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return Path(found).resolve() if Path(found).exists() else None


def _run(sanitizer: Path, tool: str, *command: str) -> int:
    options = ("--tool", tool, "--error-exitcode", str(_FOUND), "--report-api-errors", "no")
    print(f"--- {tool} over {' '.join(command)}", flush=True)
    return subprocess.run([str(sanitizer), *options, *command], check=False).returncode


def works_here(sanitizer: Path, folder: Path) -> bool:
    """Whether each tool finds its planted fault, and only that."""
    planted = folder / "planted_fault"
    source = _ROOT / "tests" / "gpu" / "planted_fault.cu"
    compiler = shutil.which("nvcc") or str(sanitizer.parent / "nvcc")
    subprocess.run([compiler, "-arch=native", "-o", str(planted), str(source)], check=True)
    return all(
        _run(sanitizer, tool, str(planted), "none") == 0
        and _run(sanitizer, tool, str(planted), fault) == _FOUND
        for tool, fault in _PLANTED.items()
    )


def run_tests(sanitizer: Path, tool: str, program: Path, folder: Path) -> dict[str, Any]:
    """Runs one program of tests. Returns what GoogleTest has counted, and whether it was clean."""
    report = folder / "tests.json"
    begin = time.monotonic()
    status = _run(
        sanitizer,
        tool,
        str(program),
        f"--gtest_output=json:{report}",
        f"--gtest_filter=-{_TIMES_ONLY}",
    )
    counts = json.loads(report.read_text()) if report.exists() else {"tests": 0, "failures": 0}
    report.unlink(missing_ok=True)
    return {
        "tool": tool,
        "program": program.name,
        "tests": counts["tests"] - counts.get("disabled", 0),
        "failed": counts["failures"],
        "clean": status == 0 and counts["tests"] > 0,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> int:
    """Returns 0 if all was clean, 77 if the sanitizer does not work here."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("build", type=Path, help="folder that CMake has built in")
    parser.add_argument("--json", type=Path, help="also write it there, as the benchmarks do")
    options = parser.parse_args()
    sanitizer = _sanitizer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if sanitizer is None or not works_here(sanitizer, folder):
            return _NOT_HERE
        programs = [(tool, options.build / "tests" / "cpp" / program) for tool, program in _RUNS]
        runs = [run_tests(sanitizer, tool, program, folder) for tool, program in programs]
    for run in runs:
        outcome = "clean" if run["clean"] else "NOT CLEAN"
        print(f"{run['tool']}: {run['program']}: {run['tests']} tests, {outcome}")
    if options.json:
        _write(options.json, runs)
    return int(not all(run["clean"] for run in runs))


def _write(path: Path, runs: list[dict[str, Any]]) -> None:
    sys.path[:0] = [str(_ROOT / "benchmarks"), str(_ROOT)]
    from records import Records

    records = Records(path.parent, "tools/device_sanitizer.py", tiny=False)
    for run in runs:
        records.keep_result(
            path.stem,
            f"{run['tool']}[{run['program']}]",
            {**run, "planted_faults_found": sorted(_PLANTED.values())},
            status="ok" if run["clean"] else "error",
            seconds=run["seconds"],
        )


if __name__ == "__main__":
    sys.exit(main())
