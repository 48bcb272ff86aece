"""Timelines for a terminal: a line for each row, as wide as there is room."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from torch_offload.timeline.palette import look_key, look_of, order_of
from torch_offload.timeline.scale import scale_of, ticks
from torch_offload.trace import CPU_ROW, Bar, Trace

_LEAST_CELLS = 20
_MOST_WAITS = 5
_CELLS_PER_TICK = 10


def text_of(traces: Sequence[Trace], width: int) -> RenderableType:
    """Draws the traces on one time axis, in `width` columns or less.

    Labels stand in the bars that have room for them; what is too short to be seen gets a cell
    where nothing longer is.
    """
    names = [row.name for trace in traces for row in trace.rows]
    # A very narrow terminal cuts the names, not the bars.
    name_width = max(3, min(max(map(len, names)), width - _LEAST_CELLS - 2))
    cells = max(_LEAST_CELLS, width - name_width - 2)
    span_ns = max(1, *(trace.end_ns for trace in traces))
    lines: list[RenderableType] = []
    keys: set[str] = set()
    for trace in traces:
        took = scale_of(trace.end_ns).text(trace.end_ns)
        lines.append(Text(f"{trace.title}: {took}" if trace.title else took, style="bold"))
        for index, row in enumerate(trace.rows):
            line = Text(f"{row.name[:name_width]:>{name_width}} ", no_wrap=True, overflow="crop")
            strip, shown = _strip(trace, index, span_ns, cells)
            keys |= shown
            lines.append(line.append_text(strip))
    lines.append(_axis(span_ns, name_width + 1, cells))
    lines.append(_legend(keys, width))
    for trace in traces:
        lines += _longest_waits(trace)
    return Group(*lines)


def plain_text_of(traces: Sequence[Trace], width: int) -> str:
    """The same without colours, for a file."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(text_of(traces, width))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _strip(trace: Trace, row: int, span_ns: int, cells: int) -> tuple[Text, set[str]]:
    """One row: in each cell the bar that fills most of it."""
    owner: list[Bar | None] = [None] * cells
    filled = [0.0] * cells
    per_cell = span_ns / cells
    for bar in trace.on_row(row):
        if bar.kind == "wait" and bar.duration_ns == 0:
            continue
        first = min(cells - 1, int(bar.begin_ns / per_cell))
        last = min(cells - 1, int(max(bar.begin_ns, bar.end_ns - 1) / per_cell))
        for cell in range(max(0, first), last + 1):
            begin_ns = max(bar.begin_ns, cell * per_cell)
            share = (min(bar.end_ns, (cell + 1) * per_cell) - begin_ns) / per_cell
            if owner[cell] is None or share > filled[cell]:
                owner[cell], filled[cell] = bar, share
    strip = Text(no_wrap=True)
    shown: set[str] = set()
    cell = 0
    while cell < cells:
        owned = owner[cell]
        end = cell + 1
        while end < cells and owner[end] is owned:
            end += 1
        if owned is None:
            strip.append(" " * (end - cell))
        else:
            key = look_key(trace, owned)
            shown.add(key)
            strip.append_text(_run(owned, key, end - cell))
        cell = end
    return strip, shown


def _run(bar: Bar, key: str, cells: int) -> Text:
    look = look_of(key)
    label = {"wait": "", "submit": "", "blocked": "blocked"}.get(bar.kind, bar.label)
    text = Text(look.letter * cells, style=look.face)
    if label and len(label) + 4 <= cells:
        before = (cells - len(label) - 2) // 2
        text = Text(look.letter * before, style=look.face)
        text.append(f" {label} ")
        text.append(look.letter * (cells - before - len(label) - 2), style=look.face)
    return text


def _axis(span_ns: int, indent: int, cells: int) -> RenderableType:
    scale = scale_of(span_ns)
    marks, labels = [" "] * cells, [" "] * (cells + 1)
    free_from = 0
    for moment in ticks(span_ns, max(2, cells // _CELLS_PER_TICK)):
        cell = min(cells - 1, round(moment / span_ns * cells))
        text = f"{moment / scale.ns:g}"
        if cell >= free_from and cell + len(text) <= cells:
            marks[cell] = "'"
            labels[cell : cell + len(text)] = text
            free_from = cell + len(text) + 1
    room = cells - len("".join(labels).rstrip())
    unit = f" {scale.name}" if room > len(scale.name) else ""
    ruler = " " * indent + "".join(marks).rstrip()
    return Text(f"{ruler}\n{' ' * indent}{''.join(labels).rstrip()}{unit}", style="dim")


def _legend(keys: set[str], width: int) -> RenderableType:
    """Each look once; an entry is never broken across lines."""
    legend, column = Text(), 0
    for key in sorted(keys, key=order_of):
        look = look_of(key)
        length = len(look.word) + 2
        if column and column + 2 + length > width:
            legend.append("\n")
            column = 0
        elif column:
            legend.append("  ")
            column += 2
        legend.append(look.letter, style=look.face).append(f" {look.word}")
        column += length
    return legend


def _longest_waits(trace: Trace) -> list[RenderableType]:
    """Says in words what a text cannot draw: which event each longest wait was for."""
    arrow_of = {arrow.wait_op: arrow for arrow in trace.arrows}
    waits = [
        bar
        for bar in trace.of_kind("wait")
        if bar.row != CPU_ROW and bar.op in arrow_of and bar.duration_ns > 0.001 * trace.end_ns
    ]
    lines: list[RenderableType] = []
    for bar in sorted(waits, key=lambda bar: -bar.duration_ns)[:_MOST_WAITS]:
        arrow = arrow_of[bar.op]
        source = trace.rows[arrow.from_row]
        what = "" if arrow.unit is None else f" of {trace.unit_labels[arrow.unit]}"
        work = "copy" if source.kind == "copy" else "end of use" if what else "work"
        took, at = (scale_of(ns).text(ns) for ns in (bar.duration_ns, bar.begin_ns))
        lines.append(
            Text(f"{trace.rows[bar.row].name} waited {took} from {at} on for the {work}{what}")
        )
    if lines:
        head = f"longest of {len(waits)} waits" + (f", {trace.title}" if trace.title else "")
        lines.insert(0, Text(f"{head}:", style="bold"))
    return lines
