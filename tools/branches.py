"""Reads what llvm-cov has exported: branches reached, those that cannot be, and those missed.

Called by tools/coverage.sh. Exits 1 if a branch is neither reached nor explained, or if an
explanation is no longer needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent

# Why a branch cannot be reached by schedules: by file, condition, and the side that is not taken.
_NO_EMPTY_SEQUENCE = "a remembered pass has a unit, and a plan without streamed units is not asked"
_NO_FORK = (
    "no lane forks, as it may run beside other threads of its process: test_pipeline and "
    "test_dropin_threads.py do"
)
_AT_THE_START = "a pass begins at position 0 of a sequence that is not empty"
EXPLAINED = {
    ("order.cpp", "sequence.empty()", True): _NO_EMPTY_SEQUENCE,
    ("order.cpp", "sequence_->empty()", True): _NO_EMPTY_SEQUENCE,
    ("order.cpp", "position_ < expected_->size()", False): _AT_THE_START,
    ("order.cpp", "!was_expected", True): _AT_THE_START + ", whose first unit was asked for",
    ("order.cpp", ":", False): "the static order holds every unit, so the search ends in it",
    ("pipeline_copies.cpp", "unit == kNoUnit", True): _NO_EMPTY_SEQUENCE,
    ("pipeline_copies.cpp", "!blocks(unit)", False): (
        "a unit that is held or awaited is whole, and no whole unit is copied"
    ),
    ("pipeline.cpp", "device_.in_forked_child()", True): _NO_FORK,
    ("pipeline_streams.cpp", "device_.in_forked_child()", True): _NO_FORK,
    ("pipeline.cpp", "is_last", False): (
        "of a nested release only the note of its stream could fail, for want of memory"
    ),
    ("pipeline.cpp", "!device_.is_done(states_[unit].ready)", True): (
        "a device would have to lie: that of test_pipeline_debug does"
    ),
    ("pipeline.cpp", "options_.warn != nullptr", True): "asked behind such a lie only",
    ("pipeline.cpp", "options_.warn != nullptr", False): "asked behind such a lie only",
}
_SOURCES = (
    "order.cpp",
    "pipeline.cpp",
    "pipeline_copies.cpp",
    "pipeline_places.cpp",
    "pipeline_streams.cpp",
)
# A constant in the product: see core/steps.h.
_CONSTANT = "is_left_out"


@dataclass(frozen=True)
class Side:
    """One side of one condition."""

    file: str
    line: int
    condition: str
    taken: bool
    count: int

    @property
    def key(self) -> tuple[str, str, bool]:
        """Where its explanation stands."""
        return self.file, self.condition, self.taken

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.condition} is never {str(self.taken).lower()}"


def read_sides(document: dict[str, Any]) -> list[Side]:
    """All sides of all conditions of the pipeline, but for those that are constants."""
    sides = []
    for file in document["data"][0]["files"]:
        path = Path(file["filename"])
        if path.name not in _SOURCES:
            continue
        lines = path.read_text().splitlines()
        counts: dict[tuple[int, int, int], list[int]] = {}
        for line, begin, _, end, is_true, is_false, *_ in file["branches"]:
            both = counts.setdefault((line, begin, end), [0, 0])
            both[0] += is_true  # a template, or a lambda, has several
            both[1] += is_false
        for (line, begin, end), both in sorted(counts.items()):
            condition = lines[line - 1][begin - 1 : end - 1]
            if _CONSTANT not in condition:
                sides += [
                    Side(path.name, line, condition, taken, count)
                    for taken, count in zip((True, False), both, strict=True)
                ]
    return sides


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--schedules", type=int, required=True)
    parser.add_argument("--json", type=Path, help="also write it there, as the benchmarks do")
    options = parser.parse_args()
    sides = read_sides(json.loads(options.exported.read_text()))
    missed = [side for side in sides if side.count == 0]
    explained = [side for side in missed if side.key in EXPLAINED]
    unexplained = [side for side in missed if side.key not in EXPLAINED]
    needless = sorted(set(EXPLAINED) - {side.key for side in missed})
    for side in explained:
        print(f"{side}: {EXPLAINED[side.key]}")
    for side in unexplained:
        print(f"NOT REACHED: {side}")
    for file, condition, taken in needless:
        print(f"EXPLAINED IN VAIN: {file}: {condition}, {taken}")
    reached = len(sides) - len(missed)
    print(
        f"{reached} of {len(sides)} branches reached by {options.schedules} schedules, "
        f"{len(explained)} cannot be, {len(unexplained)} were not"
    )
    if options.json:
        _write(options.json, options.schedules, sides, explained, unexplained)
    return 1 if unexplained or needless else 0


def _write(
    path: Path, schedules: int, sides: list[Side], explained: list[Side], unexplained: list[Side]
) -> None:
    sys.path[:0] = [str(_ROOT / "benchmarks"), str(_ROOT)]
    from records import Records

    figures = {
        "schedules": schedules,
        "branches": len(sides),
        "reached": sum(side.count > 0 for side in sides),
        "explained": {str(side): EXPLAINED[side.key] for side in explained},
        "not_reached": [str(side) for side in unexplained],
    }
    Records(path.parent, f"tools/coverage.sh --json {path.name}", tiny=False).keep_result(
        path.stem, "random_lane", figures, status="error" if unexplained else "ok"
    )


if __name__ == "__main__":
    sys.exit(main())
