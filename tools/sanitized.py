#!/usr/bin/env python3
"""What `make sanitize` has run under which sanitizer, and how it ended; as JSON with --json.

    tools/sanitized.py build-asan/tests.xml build-tsan/tests.xml --json sanitizers.json

A sanitizer that finds something ends its test: a report without failures is a clean run.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def read_report(path: Path) -> dict[str, Any]:
    """Counts of a report as ctest writes it (``--output-junit``)."""
    suite = ElementTree.parse(path).getroot()
    cases = list(suite.iter("testcase"))
    failed = [case.get("name", "?") for case in cases if case.get("status") == "fail"]
    skipped = [
        case.get("name", "?")
        for case in cases
        if case.find("skipped") is not None or case.get("status") == "disabled"
    ]
    targets = Counter(case.get("name", "?").split(".")[0] for case in cases)
    return {
        "tests": len(cases),
        "clean": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": skipped,
        "tests_by_target": dict(sorted(targets.items())),
        "seconds_of_tests": round(sum(float(case.get("time", 0)) for case in cases), 1),
    }


def main() -> int:
    """Returns 1 if a sanitizer has found something."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("reports", type=Path, nargs="+", help="build-PRESET/tests.xml")
    parser.add_argument("--json", type=Path, help="also write it there, as the benchmarks do")
    options = parser.parse_args()
    reports = {path.resolve().parent.name: read_report(path) for path in options.reports}
    for name, report in reports.items():
        print(
            f"{name}: {report['clean']} of {report['tests']} tests of "
            f"{len(report['tests_by_target'])} targets clean, {len(report['failed'])} failed, "
            f"{len(report['skipped'])} skipped"
        )
    if options.json:
        _write(options.json, reports)
    return int(any(report["failed"] or not report["tests"] for report in reports.values()))


def _write(path: Path, reports: dict[str, dict[str, Any]]) -> None:
    sys.path[:0] = [str(_ROOT / "benchmarks"), str(_ROOT)]
    from records import Records

    records = Records(path.parent, "make sanitize; tools/sanitized.py", tiny=False)
    for name, report in reports.items():
        records.keep_result(
            path.stem,
            name.removeprefix("build-"),
            report,
            status="error" if report["failed"] else "ok",
            seconds=report["seconds_of_tests"],
        )


if __name__ == "__main__":
    sys.exit(main())
