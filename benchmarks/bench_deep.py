"""80 layers of 8B shape: a forward of more launches than the driver queues."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from clocks import HostCost, Stamp, alternate, spread, synchronize
from conftest import Reference
from observe import Counting, runtime_calls
from records import Part
from yardstick import DEEP, Pair, Stage, Workload, shapes_of


@shapes_of(DEEP)
@pytest.mark.benchmark(group="torch_offload.deep.device-time-of-2", timer=Stamp)
def bench_forward_deep(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    deep: Workload,
    shape_index: int,
) -> None:
    """Device time against the roofline, and how long the host is kept; both models take turns.

    When the queue of launches is full the driver makes the caller wait, whoever launches: what the
    plain model's caller waits for is not ours.
    """
    pair = Pair.of(stage, deep, shape_index)
    streamed = pair.streamed
    expected_floor_ms = reference.floor_ms(streamed.streamed_bytes)
    round_s = 3 * (reference.plain_ms(deep, pair.shape) * 2 + 2 * expected_floor_ms) * 1e-3
    with Counting(streamed) as counting:
        times = alternate(
            benchmark,
            pair.plain_run,
            pair.streamed_run,
            forwards=2,
            rounds=part.rounds(3, round_s),
            masters=functools.partial(reference.link.copy_from, streamed.masters),
        )
    costs = {}
    for name, run in (("plain", pair.plain_run), ("streamed", pair.streamed_run)):
        synchronize()
        costs[name] = HostCost.of(run)
        synchronize()
    calls = runtime_calls(pair.plain_run, 1), runtime_calls(pair.streamed_run, 1)
    resident, ours = spread(times.plain_ms), spread(times.streamed_ms)
    masters = spread(times.masters_ms)
    roofline_ms = max(masters["median"], resident["median"])
    part.figures.update(
        **pair.header("deep"),
        shape_index=shape_index,
        link_bytes_per_s=reference.link_bytes_per_s,
        floor_ms=masters,
        plain_ms=resident,
        streamed_ms=ours,
        roofline_ms=roofline_ms,
        ratio=ours["median"] / roofline_ms,
        plain_submit_ms=costs["plain"].wall_ms,
        submit_ms=costs["streamed"].wall_ms,
        plain_busy_ms=costs["plain"].busy_ms,
        busy_ms=costs["streamed"].busy_ms,
        plain_calls=calls[0],
        streamed_calls=calls[1],
        per_forward=counting.per_forward(),
    )
