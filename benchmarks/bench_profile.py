"""What `handle.profile()` costs, whether its sums add up, and how fast the simulator is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from clocks import Stamp, device_ms, spread, synchronize
from conftest import Reference
from records import Part
from yardstick import SMALL, YARDSTICK, Pair, Stage, Workload, shape_id

from torch_offload.reference import LayerTimes
from torch_offload.simulate import run_layers


def _profiled_ms(
    handle: Any, run: Callable[[], Any], forwards: int
) -> tuple[float, float, float, Any]:
    """Device ms of a forward inside a profile, the block's own cost in ms, its wall, and it."""
    synchronize()
    begin = time.perf_counter()
    with handle.profile() as profile:
        run()  # not timed, as in `device_ms`
        first = Stamp()
        for _ in range(forwards):
            run()
        inside_ms = (Stamp() - first) / forwards * 1e3
        synchronize()
        forwards_done = time.perf_counter()
    end = time.perf_counter()
    return inside_ms, (end - forwards_done) * 1e3, (end - begin) * 1e3, profile


@pytest.mark.parametrize(
    ("name", "shape_index"),
    [
        *(
            pytest.param("yardstick", i, id=f"yardstick-{shape_id(s)}")
            for i, s in enumerate(YARDSTICK.shapes)
        ),
        pytest.param("small", 0, id=f"small-{shape_id(SMALL.shapes[0])}"),
    ],
)
def bench_profile_cost(
    part: Part,
    stage: Stage,
    reference: Reference,
    workloads: dict[str, Workload],
    name: str,
    shape_index: int,
) -> None:
    """A forward with and without a profile around it, taking turns."""
    workload = workloads[name]
    pair = Pair.of(stage, workload, shape_index)
    streamed, run = pair.streamed, pair.streamed_run
    floor_ms = reference.floor_ms(streamed.streamed_bytes)
    forwards = 2 if name == "yardstick" else 20
    round_s = 2 * (forwards + 1) * max(floor_ms, reference.plain_ms(workload, pair.shape)) * 1e-3
    off, on, block_ms, attributed = [], [], [], []
    profile: Any = None
    for _ in range(part.rounds(5, round_s)):
        off += device_ms(run, forwards=forwards, rounds=1)
        inside_ms, own_ms, _, profile = _profiled_ms(streamed.handle, run, forwards)
        on.append(inside_ms)
        block_ms.append(own_ms)
        result = profile.result
        units_ns = sum(unit.times.compute_ns + unit.times.stall_ns for unit in result.units)
        rest_ns = result.total.between_ns + result.total.outside_ns
        attributed.append((units_ns + rest_ns) / result.measured.wall_ns)
    without, within = spread(off), spread(on)
    part.figures.update(
        **pair.header("profile"),
        model=workload.name,
        shape_index=shape_index,
        floor_ms=floor_ms,
        off_ms=without,
        on_ms=within,
        cost=within["median"] / without["median"] - 1,
        end_of_block_ms=spread(block_ms),
        attributed=spread(attributed),
        sentence=profile.sentence,
        bound=profile.result.bound.by,
    )


def bench_simulator_speed(part: Part) -> None:
    """Op-log records a second of one thread, in the pipeline mode with a log and its times."""
    layers, passes = (80, 5) if part.tiny else (80, 500)
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        run = run_layers(LayerTimes(), layers, mode="pipeline", passes=passes)
        rates.append(len(run.result.log) / (time.perf_counter() - begin))
    part.figures.update(what="simulator", records_per_s=spread(rates))
