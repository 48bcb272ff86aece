#!/usr/bin/env python3
"""Full-size runs of the self-check's lanes, and how fast the checker is; as JSON.

    benchmarks/correctness.py                                   all lanes that can be run here
    benchmarks/correctness.py --lanes random,linearisations     some
    benchmarks/correctness.py --threads 1 --results-dir OUT     on one core, JSON to OUT

One thread, and nice, so that rates are per core; `cpu_seconds` tells what others have not taken of
it. A lane that cannot be run here leaves no figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))

from records import Records  # noqa: E402  (the path comes first)

from torch_offload import _C  # noqa: E402
from torch_offload.selfcheck import Effort, all_lanes  # noqa: E402
from torch_offload.selfcheck.runner import run_lane  # noqa: E402

_SUBJECT = "correctness"


def small_log() -> _C.OpLog:
    """The log of a small plan: four units in a window of two, two passes."""
    units = [
        _C.Unit(f"unit{index}", 256, index // 2, "mha" if index % 2 == 0 else "ffn")
        for index in range(4)
    ]
    plan = _C.make_plan(units, depth_bytes=256)
    costs = _C.SimCosts(copy_bytes_per_second=1e9, compute_ns=[1000] * 4)
    return _C.simulate(plan, "pipeline", "shared", costs, [[0, 1, 2, 3]] * 2).log


def checker_figures() -> dict[str, Any]:
    """Logs and ops a second of the checker alone, on this thread."""
    rounds, checks = 7, 50_000
    figures: dict[str, Any] = {"rounds": rounds}
    for name, logs in (
        ("small", [small_log()]),
        ("random", [_C.random_schedule(seed) for seed in range(1000)]),
    ):
        repeats = max(1, checks // len(logs))
        num_ops = sum(len(log) for log in logs)
        rates = []
        for _ in range(rounds):
            begin = time.perf_counter()
            for _ in range(repeats):
                for log in logs:
                    _C.check(log)
            rates.append(repeats * len(logs) / (time.perf_counter() - begin))
        rates.sort()
        figures[name] = {
            "ops_per_log": num_ops / len(logs),
            "logs_per_second": {"median": rates[rounds // 2], "min": rates[0], "max": rates[-1]},
            "ops_per_second": rates[rounds // 2] * num_ops / len(logs),
        }
    return figures


def lane_figures(result: Any) -> dict[str, Any]:
    """What a lane's part holds."""
    return {
        "tried": result.tried,
        "count": result.count,
        "counts": result.counts,
        "control_caught": result.control,
        "verdict": result.verdict,
        "note": result.reason,
        "per_second": result.count / result.seconds if result.seconds else None,
        **result.figures,
    }


def main() -> int:
    """Returns 1 if a lane fails."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--lanes", help="some of them, with commas between; 'checker' is one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="as the self-check without --full")
    parser.add_argument("--subject", default=_SUBJECT, help="the name of the file")
    parser.add_argument("--results-dir", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lanes = {lane.name: lane for lane in all_lanes()}
    chosen = options.lanes.split(",") if options.lanes else ["checker", *lanes]
    if unknown := set(chosen) - {"checker", *lanes}:
        parser.error(f"expected --lanes of {', '.join(lanes)}, got {', '.join(sorted(unknown))}")
    arguments = [
        Path(argument).name if Path(argument).is_absolute() else argument
        for argument in sys.argv[1:]
    ]
    command = " ".join(["benchmarks/correctness.py", *arguments])
    records = Records(options.results_dir, command, options.quick)
    failed = False
    for name in chosen:
        error = None
        begin, cpu_begin = time.perf_counter(), time.process_time()
        if name == "checker":
            figures = checker_figures()
        else:
            effort = Effort(full=not options.quick, num_threads=options.threads)
            result = run_lane(lanes[name], effort)
            if result.verdict == "not run":
                print(f"{name}: not run, {result.reason}")
                continue
            figures = {"threads": options.threads, **lane_figures(result)}
            error = None if result.verdict == "passed" else result.reason
            failed |= result.verdict == "failed"
        seconds = time.perf_counter() - begin
        figures["cpu_seconds"] = round(time.process_time() - cpu_begin, 1)
        status = "ok" if error is None else "error"
        records.keep_result(
            options.subject, name, figures, status=status, error=error, seconds=seconds
        )
        print(f"{name}: {status}, {seconds:.1f} s, {figures}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
