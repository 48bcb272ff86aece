"""Runs lanes: first the control, which a lane must fail on, then the lane."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torch_offload._version import __version__
from torch_offload.selfcheck.lane import Effort, Lane, Tally
from torch_offload.selfcheck.report import LaneResult, Report, Verdict


def run_lanes(
    lanes: Iterable[Lane], effort: Effort, starts: Callable[[str], None] = lambda name: None
) -> Report:
    """Runs lanes one after the other. Blocks until all are done; changes nothing.

    Args:
        lanes: Which ones, in which order.
        effort: How much each one tries.
        starts: Told the name of each before it is run.
    """
    results = []
    with _one_thread_of_torch():
        for lane in lanes:
            starts(lane.name)
            results.append(run_lane(lane, effort))
    return Report(tuple(results), _machine(), effort.full)


@contextmanager
def _one_thread_of_torch() -> Iterator[None]:
    """The models are tiny: a second thread costs more than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_lane(lane: Lane, effort: Effort) -> LaneResult:
    """Runs one lane. An exception in it is its failure; an interrupt is not caught."""
    begin = time.perf_counter()
    tally = Tally()
    control: bool | None = None

    def result(verdict: Verdict, reason: str) -> LaneResult:
        return LaneResult(
            name=lane.name,
            tried=lane.tried,
            count=tally.count,
            counts=lane.counts,
            control=control,
            verdict=verdict,
            reason=reason,
            seconds=round(time.perf_counter() - begin, 3),
            examples=tuple(tally.examples),
            figures=tally.figures,
        )

    try:
        missing = lane.why_not()
        if missing is not None:
            return result("not run", missing)
        planted = lane.control()
        control = planted.num_faults > 0
        if not control:
            which = f" ({planted.note})" if planted.note else ""
            return result(
                "failed", f"the planted control{which} was not caught: this lane sees nothing"
            )
        tally = lane.run(effort)
    except Exception as error:
        return result("failed", f"{type(error).__name__}: {error}")
    if tally.num_faults:
        return result("failed", f"{tally.num_faults:,} of {tally.count:,} {lane.counts} went wrong")
    if tally.count == 0:
        return result("failed", "nothing was tried")
    return result("passed", tally.note)


def _machine() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "torch_offload": __version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "compute_capability": list(torch.cuda.get_device_capability()) if has_gpu else None,
    }
