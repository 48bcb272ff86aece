"""Layers of Llama-3.1-70B's shape under a load like the reference's, and timelines of real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clocks import device_ms, spread
from conftest import Reference
from observe import Counting
from records import Part
from yardstick import Stage, Workload, bound, require_equal, shape_id

from torch_offload.timeline import write_timeline

_MODES = ("sync", "streams", "events", "pipeline")


@pytest.mark.parametrize("mode", _MODES)
def bench_layer_heavy(
    part: Part, stage: Stage, reference: Reference, heavy: Workload, mode: str
) -> None:
    """Batch and length such that a layer computes about nine times as long as it is copied."""
    shape = heavy.shapes[0]
    tokens = heavy.tokens(shape)
    plain = stage.plain(heavy)
    streamed = stage.streamed(heavy, mode=mode)
    require_equal(plain, streamed.model, tokens)
    plain_ms = reference.plain_ms(heavy, shape)
    floor_ms = reference.floor_ms(streamed.streamed_bytes)
    run = bound(streamed.model, tokens)
    with Counting(streamed):
        times = spread(device_ms(run, forwards=1, rounds=part.rounds(3, 2.5 * plain_ms * 1e-3)))
    part.figures.update(
        what="layer",
        mode_name=mode,
        shape=shape_id(shape),
        **streamed.describe(),
        layers=heavy.num_layers,
        floor_ms=floor_ms,
        plain_ms=plain_ms,
        streamed_ms=times,
        layer_ms=times["median"] / heavy.num_layers,
        compute_over_copy=plain_ms / floor_ms,
        bit_equal=True,
    )


def bench_layer_timelines(
    part: Part, stage: Stage, yardstick: Workload, results_folder: Path
) -> None:
    """Two forwards each of sync and pipeline, recorded and written as one timeline.

    `make figures` draws the README's picture from this file.
    """
    shape = yardstick.shapes[1]
    tokens = yardstick.tokens(shape)
    traces = []
    for mode in ("sync", "pipeline"):
        streamed = stage.streamed(yardstick, mode=mode)
        require_equal(stage.plain(yardstick), streamed.model, tokens)
        run: Any = bound(streamed.model, tokens)
        run()
        with streamed.handle.record(times=True):
            run()
            run()
        traces.append(streamed.handle.trace(mode))
    results_folder.mkdir(parents=True, exist_ok=True)
    write_timeline(traces, results_folder / "timeline.trace.json")
    part.figures.update(
        what="timeline",
        shape=shape_id(shape),
        shape_index=1,
        bars=[len(trace.bars) for trace in traces],
        ms=[trace.end_ns * 1e-6 for trace in traces],
    )
