"""The four modes and both stream layouts in one table, and what `split` does to activations."""

from __future__ import annotations

from typing import Any

import pytest
from clocks import Stamp, alternate, spread
from conftest import Reference
from observe import Counting, activation_bytes
from records import Part
from yardstick import YARDSTICK, Pair, Stage, Workload, shape_id

# `sync` knows one stream, so it has no `split`. Each pair is offloaded once, for all shapes.
_PAIRS = [
    ("pipeline", "shared"),
    ("pipeline", "split"),
    ("events", "shared"),
    ("events", "split"),
    ("streams", "shared"),
    ("streams", "split"),
    ("sync", "shared"),
]


@pytest.mark.parametrize(
    ("mode", "streams", "shape_index"),
    [
        pytest.param(mode, streams, index, id=f"{mode}-{streams}-{shape_id(shape)}")
        for mode, streams in _PAIRS
        for index, shape in enumerate(YARDSTICK.shapes)
    ],
)
@pytest.mark.benchmark(group="torch_offload.modes.device-time", timer=Stamp)
def bench_forward_modes(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    mode: str,
    streams: str,
    shape_index: int,
) -> None:
    """One forward of a mode and a layout; the plain model was timed once, in this run."""
    plain_ms = reference.plain_ms(yardstick, yardstick.shapes[shape_index])
    pair = Pair.of(stage, yardstick, shape_index, mode=mode, streams=streams)
    floor_ms = reference.floor_ms(pair.streamed.streamed_bytes)
    activations = activation_bytes(pair.streamed_run) if mode == "pipeline" else None
    with Counting(pair.streamed) as counting:
        times = alternate(
            benchmark,
            None,
            pair.streamed_run,
            forwards=1,
            rounds=part.rounds(3, 2 * (floor_ms + plain_ms) * 1e-3, least=1),
            lead_in=mode in ("events", "pipeline"),
        )
    ours = spread(times.streamed_ms)
    roofline_ms = max(floor_ms, plain_ms)
    part.figures.update(
        **pair.header("mode"),
        shape_index=shape_index,
        link_bytes_per_s=reference.link_bytes_per_s,
        floor_ms=floor_ms,
        plain_ms=plain_ms,
        streamed_ms=ours,
        ratio=ours["median"] / roofline_ms,
        activation_bytes=activations,
        per_forward=counting.per_forward(),
    )
