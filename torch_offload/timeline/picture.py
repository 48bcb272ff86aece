"""Timelines as pictures, by matplotlib: several traces above each other on one time axis."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch_offload.intervals import subtract, union
from torch_offload.timeline.palette import Look, look_key, look_of, order_of
from torch_offload.timeline.scale import Scale, scale_of, ticks
from torch_offload.trace import CPU_ROW, Bar, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

# GitHub shows a README's pictures about 830 pixels wide: drawn as wide as that at 100 dpi, stored
# with twice as many, so that a point here is a point there.
_WIDTH_IN = 8.3
_DPI = 200
_POINTS_PER_IN = 72
_ROW_IN = 0.36
_PANEL_HEAD_IN = 0.36
_AXIS_IN = 0.42
_LEGEND_ROW_IN = 0.17
_LEGEND_COLUMNS = 4
_TOP_IN = 0.0
_FONT = 9
_SMALL = 8
_BAR_HEIGHT = 0.72
# More arrows than this hide what they should show.
_MOST_ARROWS = 48
_TICKS = 9


def picture_of(traces: Sequence[Trace]) -> Figure:
    """Draws the traces on one time axis, a panel each.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pictures need matplotlib, which is not installed ({error}); run `pip install "
            "matplotlib`, or write .txt or .json instead"
        ) from error

    span_ns = max(trace.end_ns for trace in traces)
    scale = scale_of(span_ns)
    heights = [_PANEL_HEAD_IN + _ROW_IN * len(trace.rows) for trace in traces]
    handles = _legend_of(traces)
    legend_in = _LEGEND_ROW_IN * (1 + -(-len(handles) // _LEGEND_COLUMNS))
    height_in = _TOP_IN + sum(heights) + _AXIS_IN + legend_in
    figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI)
    names = [row.name for trace in traces for row in trace.rows]
    left_in = 0.15 + max(_width_in(name, _FONT) for name in names)
    right_in = 0.2
    top_in = height_in - _TOP_IN
    for index, (trace, panel_in) in enumerate(zip(traces, heights, strict=True)):
        rows_in = _ROW_IN * len(trace.rows)
        axes = figure.add_axes(
            (
                left_in / _WIDTH_IN,
                (top_in - panel_in) / height_in,
                1 - (left_in + right_in) / _WIDTH_IN,
                rows_in / height_in,
            )
        )
        panel = _Panel(axes, trace, span_ns)
        panel.draw()
        panel.draw_time_axis(scale, is_last=index == len(traces) - 1)
        top_in -= panel_in
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(_LEGEND_COLUMNS, len(handles)),
        fontsize=_SMALL,
        frameon=False,
        handlelength=1.4,
        columnspacing=1.4,
        bbox_to_anchor=(0.5, 0.0),
    )
    return figure


def write_picture(traces: Sequence[Trace], path: Path) -> None:
    """Writes them in the format that the suffix names, as matplotlib knows it.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        OSError: If the file cannot be written.
    """
    picture_of(traces).savefig(path, dpi=_DPI)


def picture_suffixes() -> set[str]:
    """The suffixes that matplotlib writes; empty without matplotlib."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        return set()
    return {f".{suffix}" for suffix in FigureCanvasBase.get_supported_filetypes()}


@functools.cache
def _width_in(text: str, size: int) -> float:
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=size).get_extents().width) / _POINTS_PER_IN


class _Panel:
    """One trace on its axes. Row r lies between -r - 0.5 and -r + 0.5."""

    def __init__(self, axes: Axes, trace: Trace, span_ns: int) -> None:
        self._axes = axes
        self._trace = trace
        self._span_ns = span_ns
        axes.set_xlim(-0.002 * span_ns, 1.002 * span_ns)
        axes.set_ylim(-len(trace.rows) + 0.5, 0.5)
        self._ns_per_in = span_ns * 1.004 / (axes.get_position().width * _WIDTH_IN)

    def draw(self) -> None:
        trace, axes = self._trace, self._axes
        for row in range(len(trace.rows)):
            if row % 2 == 0:
                axes.axhspan(-row - 0.5, -row + 0.5, color="#F7F7F7", zorder=0, linewidth=0)
        for bar in trace.bars:
            self._draw_bar(bar)
        self._say_where_the_cpu_is_free()
        self._draw_arrows()
        axes.set_yticks(
            [-row for row in range(len(trace.rows))],
            [row.name for row in trace.rows],
            fontsize=_FONT,
        )
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_title(self._title(), loc="left", fontsize=_FONT + 1, fontweight="bold", pad=4)
        if trace.end_ns < 0.995 * self._span_ns:
            axes.axvline(trace.end_ns, color="#222222", linewidth=1, linestyle=(0, (4, 2)))

    def _title(self) -> str:
        trace = self._trace
        took = scale_of(trace.end_ns).text(trace.end_ns)
        return f"{trace.title}: {took}" if trace.title else took

    def draw_time_axis(self, scale: Scale, *, is_last: bool) -> None:
        moments = ticks(self._span_ns, _TICKS)
        labels = [f"{moment / scale.ns:g}" for moment in moments]
        self._axes.set_xticks(moments, labels if is_last else [], fontsize=_SMALL)
        self._axes.tick_params(axis="x", length=3 if is_last else 0)
        self._axes.grid(axis="x", color="#DDDDDD", linewidth=0.6, zorder=0.5)
        self._axes.set_axisbelow(True)
        if is_last:
            self._axes.set_xlabel(f"time in {scale.name}", fontsize=_FONT)

    def _draw_bar(self, bar: Bar) -> None:
        from matplotlib.patches import Rectangle

        look = look_of(look_key(self._trace, bar))
        if bar.kind == "submit":
            self._axes.plot(
                [bar.begin_ns] * 2,
                [-bar.row - 0.36, -bar.row + 0.36],
                color=look.face,
                linewidth=0.7,
                solid_capstyle="butt",
                zorder=4,
            )
            return
        width_in = bar.duration_ns / self._ns_per_in
        if bar.duration_ns == 0 or (bar.kind == "wait" and width_in < 0.02):
            return
        is_wide = width_in > 0.04
        self._axes.add_patch(
            Rectangle(
                (bar.begin_ns, -bar.row - _BAR_HEIGHT / 2),
                # What is there must be seen: nothing is thinner than a point or so.
                max(bar.duration_ns, 0.012 * self._ns_per_in),
                _BAR_HEIGHT,
                facecolor=look.face,
                edgecolor="#999999" if look.hatch else "white",
                hatch=look.hatch or None,
                linewidth=0.5 if is_wide else 0,
                zorder=2 if look.hatch else 3,
            )
        )
        self._write_on(bar, look, width_in)

    def _write_on(self, bar: Bar, look: Look, width_in: float) -> None:
        for text in _texts_on(bar):
            if _width_in(text, _SMALL) + 0.06 < width_in:
                self._axes.text(
                    bar.begin_ns + bar.duration_ns / 2,
                    -bar.row - 0.02,
                    text,
                    ha="center",
                    va="center",
                    fontsize=_SMALL,
                    color=look.ink,
                    # On its own ground: hatches and arrows may pass behind it.
                    bbox={"facecolor": look.face, "edgecolor": "none", "pad": 0.8},
                    zorder=7,
                )
                return

    def _say_where_the_cpu_is_free(self) -> None:
        """In the longest stretch without a call, if it is worth a word."""
        trace = self._trace
        taken = union((bar.begin_ns, bar.end_ns + 1) for bar in trace.on_row(CPU_ROW))
        gaps = subtract([(0, trace.end_ns)], taken)
        begin_ns, end_ns = max(gaps, key=lambda gap: gap[1] - gap[0], default=(0, 0))
        if end_ns - begin_ns > 0.15 * self._span_ns:
            self._axes.text(
                (begin_ns + end_ns) / 2,
                -CPU_ROW - 0.02,
                "free",
                ha="center",
                va="center",
                fontsize=_SMALL,
                style="italic",
                color="#00664A",
            )

    def _draw_arrows(self) -> None:
        arrows = [arrow for arrow in self._trace.arrows if arrow.from_row != arrow.to_row]
        if len(arrows) > _MOST_ARROWS:
            return
        for arrow in arrows:
            down = arrow.to_row > arrow.from_row
            edge = _BAR_HEIGHT / 2
            begin = (arrow.from_ns, -arrow.from_row + (-edge if down else edge))
            end = (arrow.to_ns, -arrow.to_row + (edge if down else -edge))
            self._axes.annotate(
                "",
                xy=end,
                xytext=begin,
                arrowprops={
                    "arrowstyle": "-|>,head_width=0.14,head_length=0.28",
                    "color": "#222222",
                    "linewidth": 0.8,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
                zorder=6,
            )


def _texts_on(bar: Bar) -> tuple[str, ...]:
    """What may stand on a bar, the longest first."""
    if bar.kind == "wait":
        return ("waits",)
    if bar.kind == "blocked":
        return ("blocked in synchronize", "blocked")
    stem, _, layer = bar.label.rpartition(" ")
    return (bar.label, f"{stem[:1]}{layer}") if stem else (bar.label,)


def _legend_of(traces: Sequence[Trace]) -> list[Patch | Line2D]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys = {
        look_key(trace, bar)
        for trace in traces
        for bar in trace.bars
        if bar.duration_ns or bar.kind == "submit"
    }
    handles: list[Patch | Line2D] = []
    for key in sorted(keys, key=order_of):
        look = look_of(key)
        if key == "submit":
            handles.append(
                Line2D([], [], color=look.face, marker="|", linestyle="", label=look.word)
            )
        else:
            handles.append(
                Patch(
                    facecolor=look.face,
                    edgecolor="#999999" if look.hatch else look.face,
                    hatch=look.hatch or None,
                    label=look.word,
                )
            )
    shown = [sum(arrow.from_row != arrow.to_row for arrow in trace.arrows) for trace in traces]
    if any(0 < count <= _MOST_ARROWS for count in shown):
        handles.append(
            Line2D(
                [],
                [],
                color="#222222",
                marker=r"$\rightarrow$",
                markersize=9,
                linestyle="",
                label="event: recorded, waited for",
            )
        )
    return handles
