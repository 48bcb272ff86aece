"""The rules of the trace event format that a viewer relies on, as a checker of a document.

From "Trace Event Format" (Google) and Perfetto's importer: required fields of each phase, times in
microseconds, slices of one thread nested and never crossing, metadata by name, and flows whose two
ends have one id, run forward in time and lie inside a slice of their thread.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

_FIELDS = {
    "X": {"name": str, "cat": str, "ts": float, "dur": float, "pid": int, "tid": int, "args": dict},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
    "s": {"name": str, "cat": str, "id": str, "ts": float, "pid": int, "tid": int},
    "f": {"name": str, "cat": str, "id": str, "ts": float, "pid": int, "tid": int, "bp": str},
}
_METADATA = {
    "process_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def faults_of(document: Any) -> list[str]:
    """Returns what is wrong with a document, nothing if it is right."""
    faults = []
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        return ["no list of traceEvents"]
    if document.get("displayTimeUnit") not in ("ms", "ns"):
        faults.append("displayTimeUnit is neither ms nor ns")
    slices = defaultdict(list)
    flows = defaultdict(list)
    for index, event in enumerate(document["traceEvents"]):
        wrong = _wrong_fields(event)
        if wrong:
            faults.append(f"event {index}: {wrong}")
        elif event["ph"] == "X":
            end = round((event["ts"] + event["dur"]) * 1000)
            slices[event["pid"], event["tid"]].append((round(event["ts"] * 1000), end))
        elif event["ph"] in "sf":
            flows[event["cat"], event["name"], event["id"]].append(event)
    for thread, found in slices.items():
        faults += [f"thread {thread}: {crossing}" for crossing in _crossings(found)]
    for key, events in flows.items():
        faults += [f"flow {key}: {fault}" for fault in _flow_faults(events, slices)]
    return faults


def _wrong_fields(event: Any) -> str:
    fields = _FIELDS.get(event.get("ph"))
    if fields is None:
        return f"phase {event.get('ph')!r} is not one that we write"
    for name, kind in fields.items():
        value = event.get(name)
        if kind is float:
            if type(value) not in (int, float) or not math.isfinite(value):
                return f"{name} is {value!r}"
        elif type(value) is not kind:
            return f"{name} is {value!r}"
    if event["ph"] == "X" and event["dur"] < 0:
        return "negative duration"
    if event["ph"] == "f" and event["bp"] != "e":
        return "a flow must end in the slice around it"
    if event["ph"] == "M":
        name, kind = _METADATA[event["name"]]
        if type(event["args"].get(name)) is not kind:
            return f"{event['name']} without {name}"
    return ""


def _crossings(slices: list[tuple[int, int]]) -> list[str]:
    open_ends: list[int] = []
    crossings = []
    for begin, end in sorted(slices, key=lambda s: (s[0], -s[1])):
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        if open_ends and end > open_ends[-1]:
            crossings.append(f"slice {begin}..{end} ns crosses one that ends at {open_ends[-1]}")
        open_ends.append(end)
    return crossings


def _flow_faults(events: list[dict[str, Any]], slices: dict) -> list[str]:
    if [event["ph"] for event in events] != ["s", "f"]:
        return [f"its phases are {[event['ph'] for event in events]}"]
    begin, end = events
    faults = [] if begin["ts"] <= end["ts"] else ["it runs back in time"]
    for event in events:
        moment = round(event["ts"] * 1000)
        around = slices[event["pid"], event["tid"]]
        if not any(first <= moment < last for first, last in around):
            faults.append(f"its {event['ph']} at {moment} ns lies in no slice")
    return faults
