"""Timelines of real runs, for the pictures of README and docs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import Part
from yardstick import Stage, Workload, bound, require_equal, shape_id

from torch_offload.timeline import write_timeline


def record_timelines(
    part: Part,
    stage: Stage,
    workload: Workload,
    options: Mapping[str, dict[str, Any]],
    path: Path,
    *,
    what: str,
) -> None:
    """Records two forwards with each of the options, by their titles, as one timeline."""
    shape_index = 1
    shape = workload.shapes[shape_index]
    tokens = workload.tokens(shape)
    traces = []
    for title, chosen in options.items():
        streamed = stage.streamed(workload, **chosen)
        require_equal(stage.plain(workload), streamed.model, tokens)
        run = bound(streamed.model, tokens)
        run()
        with streamed.handle.record(times=True):
            run()
            run()
        traces.append(streamed.handle.trace(title))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_timeline(traces, path)
    part.figures.update(
        what=what,
        shape=shape_id(shape),
        shape_index=shape_index,
        bars=[len(trace.bars) for trace in traces],
        ms=[trace.end_ns * 1e-6 for trace in traces],
    )
