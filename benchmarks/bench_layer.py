"""Layers of Llama-3.1-70B's shape under a load like the reference's, and timelines of real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from clocks import device_ms, spread
from conftest import Reference
from observe import Counting
from recorded import record_timelines
from records import Part
from yardstick import Pair, Stage, Workload

_MODES = ("sync", "streams", "events", "pipeline")


@pytest.mark.parametrize("mode", _MODES)
def bench_layer_heavy(
    part: Part, stage: Stage, reference: Reference, heavy: Workload, mode: str
) -> None:
    """Batch and length such that a layer computes about nine times as long as it is copied."""
    pair = Pair.of(stage, heavy, 0, mode=mode)
    plain_ms = reference.plain_ms(heavy, pair.shape)
    floor_ms = reference.floor_ms(pair.streamed.streamed_bytes)
    rounds = part.rounds(3, 2.5 * plain_ms * 1e-3)
    with Counting(pair.streamed):
        times = spread(device_ms(pair.streamed_run, forwards=1, rounds=rounds))
    part.figures.update(
        **pair.header("layer"),
        mode_name=mode,
        layers=heavy.num_layers,
        floor_ms=floor_ms,
        plain_ms=plain_ms,
        streamed_ms=times,
        layer_ms=times["median"] / heavy.num_layers,
        compute_over_copy=plain_ms / floor_ms,
    )


def bench_layer_timelines(
    part: Part, stage: Stage, yardstick: Workload, results_folder: Path
) -> None:
    """Two forwards each of sync and pipeline, recorded and written as one timeline.

    `make figures` draws the README's picture from this file.
    """
    record_timelines(
        part,
        stage,
        yardstick,
        {mode: {"mode": mode} for mode in ("sync", "pipeline")},
        results_folder / "timeline.trace.json",
        what="timeline",
    )
