"""Runs lanes, and keeps their figures beside those of the benchmarks.

python -m tests.lanes                       all, in full
python -m tests.lanes soak --quick          some, in a slice
python -m tests.lanes --results-dir OUT     JSON to OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.lanes import all_lanes
from torch_offload.selfcheck import Effort
from torch_offload.selfcheck.runner import run_lane

_ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_ROOT / "benchmarks"))

from records import Records  # noqa: E402


def main() -> int:
    """Returns 1 if a lane fails."""
    lanes = {lane.name.replace(" ", "_"): lane for lane in all_lanes()}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("lanes", nargs="*", metavar="LANE", help=", ".join(lanes))
    parser.add_argument("--quick", action="store_true", help="a slice of each")
    parser.add_argument("--results-dir", type=Path, default=_ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if unknown := set(options.lanes) - set(lanes):
        parser.error(f"expected some of {', '.join(lanes)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    command = " ".join(["python -m tests.lanes", *sys.argv[1:]])
    failed = False
    for name in options.lanes or lanes:
        result = run_lane(lanes[name], Effort(full=not options.quick))
        print(f"{name}: {result.verdict}, {result.count:,} {result.counts}, {result.seconds:.1f} s")
        for line in (result.reason, *result.examples):
            print(f"  {line}")
        sys.stdout.flush()
        failed |= result.verdict == "failed"
        if result.verdict == "not run":
            continue
        is_passed = result.verdict == "passed"
        figures = {
            "tried": result.tried,
            "count": result.count,
            "counts": result.counts,
            "control_caught": result.control,
            "verdict": result.verdict,
            "note": result.reason,
            **result.figures,
        }
        Records(options.results_dir, command, options.quick).keep_result(
            f"lane_{name}",
            name,
            figures,
            status="ok" if is_passed else "error",
            error=None if is_passed else result.reason,
            seconds=result.seconds,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
