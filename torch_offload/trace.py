"""From an op log with times to what can be drawn and summed: rows, bars and arrows.

Pure functions. A bar or an arrow names the op that it comes from by its index in the log, so that
whatever a picture shows can be looked up in the one record of what was submitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

from torch_offload.names import UnitLike, short_names

BarKind: TypeAlias = Literal[
    "copy", "decode", "fill", "compute", "wait", "launch", "submit", "blocked"
]
RowKind: TypeAlias = Literal["cpu", "copy", "decode", "compute", "mixed", "idle"]

CPU_ROW = 0
# Calls that cost the host no more than their submission.
_SUBMITTED = frozenset({"copy", "decode", "fill", "record", "wait", "query"})


class OpLike(Protocol):
    """One call to a device, as `_C.Op` has it. Times in ns of one monotonic clock."""

    @property
    def kind(self) -> str:
        """What was called."""

    @property
    def stream(self) -> int | None:
        """The stream it was submitted to."""

    @property
    def event(self) -> int | None:
        """The event it recorded or waited for."""

    @property
    def unit(self) -> int | None:
        """Index of the unit it is for."""

    @property
    def generation(self) -> int:
        """Which onload of the unit, from 1."""

    @property
    def host_time_ns(self) -> int:
        """When the host submitted it."""

    @property
    def begin_ns(self) -> int | None:
        """When the device began it; None if unknown."""

    @property
    def end_ns(self) -> int | None:
        """When the device ended it; None if unknown."""


class LogLike(Protocol):
    """A log of such calls, as `_C.OpLog` is."""

    @property
    def ops(self) -> Sequence[OpLike]:
        """All calls, in the order of submission."""

    @property
    def stream_names(self) -> Sequence[str]:
        """By number of the stream."""

    @property
    def unit_names(self) -> Sequence[str]:
        """By index of the unit."""

    @property
    def has_times(self) -> bool:
        """Whether it was kept with times."""


@dataclass(frozen=True)
class Row:
    """The CPU, or one stream.

    Attributes:
        name: ``"CPU"``, or the name of the stream.
        stream: Its number in the log; None for the CPU.
        kind: What its bars are: copies, computes, both (``"mixed"``), or neither.
    """

    name: str
    stream: int | None
    kind: RowKind


@dataclass(frozen=True)
class Bar:
    """Something that lasted. Times in ns since the trace's origin.

    Attributes:
        row: Index in `Trace.rows`.
        kind: ``"copy"``, ``"decode"``, ``"fill"`` and ``"compute"`` are work of a stream,
            ``"wait"`` its stall; ``"launch"`` is the host between the first and the last kernel of
            a unit, ``"submit"`` the moment of any other call, ``"blocked"`` the host in a
            synchronize.
        begin_ns: When it began.
        end_ns: When it ended; the same for a ``"submit"``, and for a wait that cost nothing.
        label: Short name of the unit, or of the call.
        unit: Index of the unit it is for, if it is for one.
        generation: Which onload of the unit, from 1; 0 where there is none.
        op: Index of its op in the log.
        last_op: Index of the op that ended it: another one for computes and launches.
    """

    row: int
    kind: BarKind
    begin_ns: int
    end_ns: int
    label: str
    unit: int | None
    generation: int
    op: int
    last_op: int

    @property
    def duration_ns(self) -> int:
        """How long it lasted."""
        return self.end_ns - self.begin_ns


@dataclass(frozen=True)
class Arrow:
    """An event: from where it was recorded to a stream that waited for it.

    Attributes:
        event: Its number in the log.
        from_row: Row of the stream that it was recorded on, last before the wait.
        from_ns: When that stream reached it.
        to_row: Row of the stream that waited.
        to_ns: When that stream had passed the wait.
        unit: Index of the unit whose copy or use the event stands behind.
        record_op: Index of the record in the log.
        wait_op: Index of the wait.
    """

    event: int
    from_row: int
    from_ns: int
    to_row: int
    to_ns: int
    unit: int | None
    record_op: int
    wait_op: int


@dataclass(frozen=True)
class Trace:
    """What one run did, when, and what waited for what.

    Attributes:
        title: For the reader.
        rows: The CPU first, then copy streams, then the others.
        bars: In the order of submission.
        arrows: Likewise.
        unit_names: Qualified names, by unit index.
        unit_labels: Short ones.
        unit_kinds: ``"mha"`` or ``"ffn"``, where known.
        end_ns: When all was over; the origin is 0.
        origin_ns: The origin, in the clock of the log.
    """

    title: str
    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    arrows: tuple[Arrow, ...]
    unit_names: tuple[str, ...]
    unit_labels: tuple[str, ...]
    unit_kinds: tuple[str, ...]
    end_ns: int
    origin_ns: int = 0

    def of_kind(self, *kinds: BarKind) -> list[Bar]:
        """The bars of these kinds."""
        return [bar for bar in self.bars if bar.kind in kinds]

    def on_row(self, row: int) -> list[Bar]:
        """The bars of one row."""
        return [bar for bar in self.bars if bar.row == row]

    def between(self, begin_ns: int, end_ns: int) -> Trace:
        """What lies in a stretch of time, cut off at its ends, with its begin as the new origin.

        Arrows stay only where both of their ends do.
        """
        bars = tuple(
            replace(
                bar,
                begin_ns=max(bar.begin_ns, begin_ns) - begin_ns,
                end_ns=min(bar.end_ns, end_ns) - begin_ns,
            )
            for bar in self.bars
            if bar.begin_ns < end_ns and max(bar.end_ns, bar.begin_ns + 1) > begin_ns
        )
        arrows = tuple(
            replace(arrow, from_ns=arrow.from_ns - begin_ns, to_ns=arrow.to_ns - begin_ns)
            for arrow in self.arrows
            if begin_ns <= arrow.from_ns <= end_ns and begin_ns <= arrow.to_ns <= end_ns
        )
        last_ns = min(self.end_ns, end_ns) - begin_ns
        return replace(
            self, bars=bars, arrows=arrows, end_ns=last_ns, origin_ns=self.origin_ns + begin_ns
        )


def trace_of(log: LogLike, *, title: str = "", units: Sequence[UnitLike] = ()) -> Trace:
    """Reads a log with times.

    Args:
        log: What was submitted, and when it ran.
        title: For the reader.
        units: The plan's units, for short names and kinds; the log's names do without.

    Raises:
        ValueError: If the log is empty or has no times.
    """
    ops = log.ops
    if not ops or not log.has_times:
        what = "one without times" if ops else "an empty one"
        raise ValueError(
            f"expected an op log with times, got {what}; write "
            "`with handle.record(times=True) as log:` around a forward"
        )
    names = list(log.unit_names) or [unit.name for unit in units]
    if [unit.name for unit in units] != names:
        units = ()  # the log is of a run before the units were cut anew
    labels = short_names(units) if units else [name.rpartition(".")[2] for name in names]
    rows = _rows(ops, log.stream_names)
    reader = _Reader(ops, rows, labels)
    bars, arrows = reader.bars(), reader.arrows()
    origin_ns = min((bar.begin_ns for bar in bars), default=0)
    end_ns = max((bar.end_ns for bar in bars), default=0)
    return Trace(
        title=title,
        rows=tuple(rows),
        bars=tuple(
            replace(bar, begin_ns=bar.begin_ns - origin_ns, end_ns=bar.end_ns - origin_ns)
            for bar in bars
        ),
        arrows=tuple(
            replace(arrow, from_ns=arrow.from_ns - origin_ns, to_ns=arrow.to_ns - origin_ns)
            for arrow in arrows
        ),
        unit_names=tuple(names),
        unit_labels=tuple(labels),
        unit_kinds=tuple(unit.kind for unit in units),
        end_ns=end_ns - origin_ns,
        origin_ns=origin_ns,
    )


def _rows(ops: Iterable[OpLike], stream_names: Sequence[str]) -> list[Row]:
    """The CPU and every stream that was given something: copies first, idle ones last."""
    does: dict[int, set[str]] = {}
    for op in ops:
        if op.stream is not None:
            does.setdefault(op.stream, set()).add(op.kind)
    order: tuple[RowKind, ...] = ("copy", "decode", "mixed", "compute", "idle")
    rows = []
    for stream, kinds in does.items():
        copies, computes = bool(kinds & {"copy"}), bool(kinds & {"read", "read_end"})
        kind: RowKind = "mixed" if copies and computes else "copy" if copies else "idle"
        if computes and not copies:
            kind = "compute"
        elif "decode" in kinds and not copies:
            kind = "decode"
        name = stream_names[stream] if stream < len(stream_names) else f"stream {stream}"
        rows.append(Row(name, stream, kind))
    rows.sort(key=lambda row: (order.index(row.kind), row.stream))
    return [Row("CPU", None, "cpu"), *rows]


class _Reader:
    """Walks through the ops once for the bars and once for the arrows."""

    def __init__(self, ops: Sequence[OpLike], rows: Sequence[Row], labels: Sequence[str]) -> None:
        self._ops = ops
        self._labels = labels
        self._row_of = {row.stream: index for index, row in enumerate(rows)}

    def _label(self, unit: int | None, otherwise: str) -> str:
        known = unit is not None and unit < len(self._labels)
        return self._labels[unit] if known and unit is not None else otherwise

    def bars(self) -> list[Bar]:
        bars: list[Bar] = []
        open_reads: dict[tuple[int | None, int | None, int], list[int]] = {}
        served = self._units_served()
        for index, op in enumerate(self._ops):
            key = (op.stream, op.unit, op.generation)
            if op.kind == "read":
                open_reads.setdefault(key, []).append(index)
            elif op.kind == "read_end" and open_reads.get(key):
                bars += self._use(open_reads[key].pop(), index)
            elif op.kind == "synchronize":
                bars += self._timed(index, "blocked", CPU_ROW, None, "synchronize")
            elif op.kind in _SUBMITTED:
                unit = served.get(index, op.unit)
                label = f"{op.kind} {self._label(unit, '')}".rstrip()
                at = op.host_time_ns
                bars.append(
                    Bar(CPU_ROW, "submit", at, at, label, unit, op.generation, index, index)
                )
                row = self._row_of[op.stream] if op.stream is not None else CPU_ROW
                if op.kind == "copy":
                    bars += self._timed(index, "copy", row, unit, "copy")
                elif op.kind == "decode":
                    bars += self._timed(index, "decode", row, unit, "decode")
                elif op.kind == "fill":
                    bars += self._timed(index, "fill", row, unit, "fill")
                elif op.kind == "wait":
                    bars += self._timed(index, "wait", row, unit, "wait")
        return bars

    def _timed(
        self, index: int, kind: BarKind, row: int, unit: int | None, otherwise: str
    ) -> list[Bar]:
        op = self._ops[index]
        if op.begin_ns is None or op.end_ns is None:
            return []
        label = self._label(unit, otherwise)
        end_ns = max(op.begin_ns, op.end_ns)
        return [Bar(row, kind, op.begin_ns, end_ns, label, unit, op.generation, index, index)]

    def _use(self, first: int, last: int) -> list[Bar]:
        """One use of a unit: what the stream computed, and the host's part in it."""
        begin, end = self._ops[first], self._ops[last]
        label = self._label(begin.unit, "compute")
        unit, generation = begin.unit, begin.generation

        def bar(row: int, kind: BarKind, begin_ns: int, end_ns: int) -> Bar:
            until_ns = max(begin_ns, end_ns)
            return Bar(row, kind, begin_ns, until_ns, label, unit, generation, first, last)

        bars = [bar(CPU_ROW, "launch", begin.host_time_ns, end.host_time_ns)]
        if begin.end_ns is not None and end.begin_ns is not None:
            bars.append(bar(self._row_of[begin.stream], "compute", begin.end_ns, end.begin_ns))
        return bars

    def _units_served(self) -> dict[int, int]:
        """For each wait and record, the unit that it is for.

        A wait is for the next thing on its stream that has a unit; a record is of the last one.
        """
        served: dict[int, int] = {}
        waiting: dict[int, list[int]] = {}
        last: dict[int, int] = {}
        for index, op in enumerate(self._ops):
            if op.stream is None:
                continue
            if op.kind == "wait":
                waiting.setdefault(op.stream, []).append(index)
            elif op.kind == "record":
                if op.stream in last:
                    served[index] = last[op.stream]
            elif op.unit is not None and op.kind in (
                "copy",
                "decode",
                "fill",
                "read",
                "read_end",
            ):
                last[op.stream] = op.unit
                if op.kind in ("copy", "decode", "read"):
                    served.update(dict.fromkeys(waiting.pop(op.stream, []), op.unit))
        return served

    def arrows(self) -> list[Arrow]:
        arrows = []
        recorded: dict[int, tuple[int, int]] = {}  # event -> (record's index, when)
        reached: dict[int, int] = {}  # stream -> how far it had got by what we know
        served = self._units_served()
        for index, op in enumerate(self._ops):
            if op.stream is None:
                continue
            if op.end_ns is not None and op.kind != "synchronize":  # whose times are the host's
                reached[op.stream] = op.end_ns
            if op.event is None:
                continue
            if op.kind == "record" and op.stream in reached:
                recorded[op.event] = (index, reached[op.stream])
            elif op.kind == "wait" and op.event in recorded and op.end_ns is not None:
                record_op, from_ns = recorded[op.event]
                source = self._ops[record_op].stream
                arrows.append(
                    Arrow(
                        event=op.event,
                        from_row=self._row_of[source],
                        from_ns=from_ns,
                        to_row=self._row_of[op.stream],
                        to_ns=max(from_ns, op.end_ns),
                        unit=served.get(record_op),
                        record_op=record_op,
                        wait_op=index,
                    )
                )
        return arrows
