"""Timelines as JSON in the trace event format, which Perfetto and chrome://tracing open.

A trace is a process, a row is a thread, a bar is a complete event ("X"), an arrow is a flow from
"s" to "f". Times are in microseconds there, with the nanoseconds behind the point. What a viewer
has no use for is kept beside it, so that `read_traces` gives back what was written.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from torch_offload.trace import Arrow, Bar, BarKind, Row, RowKind, Trace

# Tells our files from other traces, and this version of them from later ones.
FORMAT = "torch_offload timeline 1"
# The clocks of two streams may differ by so much.
_CLOCK_NS = 1000
_MOST_NS = 2**62

Event = dict[str, Any]


def trace_events(traces: Sequence[Trace]) -> dict[str, Any]:
    """Returns the JSON object of some traces."""
    events: list[Event] = []
    for process, trace in enumerate(traces, start=1):
        events += _names(process, trace)
        events += [_complete(process, bar) for bar in trace.bars]
        events += _flows(process, trace)
    return {
        "displayTimeUnit": "ms",
        "otherData": {"format": FORMAT, "traces": [_rest_of(trace) for trace in traces]},
        "traceEvents": events,
    }


def write_trace_events(traces: Sequence[Trace], path: Path) -> None:
    """Writes it. Raises OSError if the file cannot be written."""
    path.write_text(json.dumps(trace_events(traces)) + "\n")


def read_traces(path: Path) -> list[Trace]:
    """Reads what `write_trace_events` wrote.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no timeline of ours.
    """
    try:
        document = json.loads(path.read_text())
        if document["otherData"]["format"] != FORMAT:
            raise KeyError("format")
        return [
            _trace_from(document["traceEvents"], process, rest)
            for process, rest in enumerate(document["otherData"]["traces"], start=1)
        ]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected a timeline as `handle.timeline('x.json')` or `torch-offload timeline --out "
            f"x.json` writes it, got something else in {path} ({type(error).__name__}: {error})"
        ) from error


def _names(process: int, trace: Trace) -> Iterator[Event]:
    yield _metadata("process_name", process, 0, name=trace.title or "torch_offload")
    yield _metadata("process_sort_index", process, 0, sort_index=process)
    for row, of in enumerate(trace.rows):
        yield _metadata("thread_name", process, row, name=of.name)
        yield _metadata("thread_sort_index", process, row, sort_index=row)


def _metadata(what: str, process: int, thread: int, **arguments: object) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": arguments}


def _complete(process: int, bar: Bar) -> Event:
    return {
        "ph": "X",
        "name": bar.label if bar.kind == "submit" else f"{bar.kind} {bar.label}",
        "cat": bar.kind,
        "pid": process,
        "tid": bar.row,
        "ts": bar.begin_ns / 1000,
        "dur": bar.duration_ns / 1000,
        "args": {
            "label": bar.label,
            "unit": bar.unit,
            "onload": bar.generation,
            "op": bar.op,
            "last_op": bar.last_op,
        },
    }


def _flows(process: int, trace: Trace) -> Iterator[Event]:
    """Both ends of each arrow, inside a bar: a flow binds to the slice around its moment."""
    rows = [
        sorted((bar for bar in trace.on_row(row) if bar.duration_ns > 0), key=_begin_of)
        for row in range(len(trace.rows))
    ]
    for number, arrow in enumerate(trace.arrows):
        # Behind which bar the event was recorded, and which one it was waited for.
        sources, targets = rows[arrow.from_row], rows[arrow.to_row]
        before = bisect_right(sources, arrow.from_ns + _CLOCK_NS, key=_end_of) - 1
        behind = bisect_left(targets, arrow.to_ns, key=_begin_of)
        if before < 0 or behind == len(targets):
            continue  # one of its ends was cut off
        source, target = sources[before], targets[behind]
        from_ns = min(source.end_ns - 1, target.begin_ns)
        if from_ns < source.begin_ns:
            continue
        common = {"cat": "event", "name": "event", "pid": process, "id": f"{process}.{number}"}
        arguments = {"event": arrow.event, "unit": arrow.unit}
        yield {
            **common,
            "ph": "s",
            "tid": arrow.from_row,
            "ts": from_ns / 1000,
            "args": {**arguments, "op": arrow.record_op},
        }
        yield {
            **common,
            "ph": "f",
            "bp": "e",
            "tid": arrow.to_row,
            "ts": target.begin_ns / 1000,
            "args": {**arguments, "op": arrow.wait_op},
        }


def _begin_of(bar: Bar) -> int:
    return bar.begin_ns


def _end_of(bar: Bar) -> int:
    return bar.end_ns


def _rest_of(trace: Trace) -> dict[str, Any]:
    return {
        "title": trace.title,
        "rows": [[row.name, row.stream, row.kind] for row in trace.rows],
        "arrows": [
            [
                arrow.event,
                arrow.from_row,
                arrow.from_ns,
                arrow.to_row,
                arrow.to_ns,
                arrow.unit,
                arrow.record_op,
                arrow.wait_op,
            ]
            for arrow in trace.arrows
        ],
        "unit_names": list(trace.unit_names),
        "unit_labels": list(trace.unit_labels),
        "unit_kinds": list(trace.unit_kinds),
        "end_ns": trace.end_ns,
        "origin_ns": trace.origin_ns,
    }


def _trace_from(events: Sequence[Event], process: int, rest: dict[str, Any]) -> Trace:
    rows = tuple(
        Row(_text(name), _index(stream), _one_of(kind, get_args(RowKind)))
        for name, stream, kind in rest["rows"]
    )
    return Trace(
        title=_text(rest["title"]),
        rows=rows,
        bars=tuple(
            _bar_from(event, len(rows))
            for event in events
            if event["ph"] == "X" and event["pid"] == process
        ),
        arrows=tuple(_arrow_from(arrow, len(rows)) for arrow in rest["arrows"]),
        unit_names=tuple(map(_text, rest["unit_names"])),
        unit_labels=tuple(map(_text, rest["unit_labels"])),
        unit_kinds=tuple(_one_of(kind, ("mha", "ffn")) for kind in rest["unit_kinds"]),
        end_ns=_time(rest["end_ns"]),
        origin_ns=_time(rest["origin_ns"]),
    )


def _bar_from(event: Event, rows: int) -> Bar:
    arguments = event["args"]
    begin_ns, duration_ns = _time(event["ts"] * 1000), _time(event["dur"] * 1000)
    if duration_ns < 0:
        raise ValueError(f"a bar of {duration_ns} ns")
    return Bar(
        row=_index(event["tid"], rows) or 0,
        kind=_one_of(event["cat"], get_args(BarKind)),
        begin_ns=begin_ns,
        end_ns=begin_ns + duration_ns,
        label=_text(arguments["label"]),
        unit=_index(arguments["unit"]),
        generation=_index(arguments["onload"]) or 0,
        op=_index(arguments["op"]) or 0,
        last_op=_index(arguments["last_op"]) or 0,
    )


def _arrow_from(fields: Sequence[Any], rows: int) -> Arrow:
    event, from_row, from_ns, to_row, to_ns, unit, record_op, wait_op = fields
    return Arrow(
        event=_index(event) or 0,
        from_row=_index(from_row, rows) or 0,
        from_ns=_time(from_ns),
        to_row=_index(to_row, rows) or 0,
        to_ns=_time(to_ns),
        unit=_index(unit),
        record_op=_index(record_op) or 0,
        wait_op=_index(wait_op) or 0,
    )


def _time(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST_NS:
        raise ValueError(f"{value!r} is no time")
    return round(value)


def _index(value: Any, below: int | None = None) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 0 or (below is not None and value >= below):
        raise ValueError(f"{value!r} is no index")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _one_of(value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {', '.join(choices)}")
    return value
