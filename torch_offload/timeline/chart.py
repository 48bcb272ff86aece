"""Sweeps as charts: ms per forward along depth and budget, and by layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch_offload.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 8.3
_PANEL_IN = 2.6
DPI = 200
FONT = 9
SMALL = 8
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
_TITLES = {
    "depth": "how far copies run ahead, nothing resident",
    "budget": "device memory for weights",
    "layout": "mode and stream layout",
}


def write_chart(sweeps: Sequence[Sweep], title: str, path: Path) -> None:
    """Draws a panel for each sweep.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        OSError: If the file cannot be written.
    """
    chart_of(sweeps, title).savefig(path, dpi=DPI)


def chart_of(sweeps: Sequence[Sweep], title: str) -> Figure:
    """The same as a figure."""
    figure = new_figure(WIDTH_IN, _PANEL_IN * len(sweeps) + 0.4, title)
    panels = figure.subplots(len(sweeps), 1, squeeze=False)[:, 0]
    for axes, sweep in zip(panels, sweeps, strict=True):
        axes.set_title(_TITLES[sweep.axis], loc="left", fontsize=FONT)
        if sweep.axis == "layout":
            _draw_bars(axes, sweep)
        else:
            _draw_curve(axes, sweep)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(labelsize=SMALL)
    return figure


def new_figure(width_in: float, height_in: float, title: str) -> Figure:
    """An empty one with a title.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"charts need matplotlib, which is not installed ({error}); run `pip install "
            "matplotlib`"
        ) from error

    figure = Figure(figsize=(width_in, height_in), dpi=DPI)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=FONT + 1, fontweight="bold", x=0.01, ha="left")
    return figure


def _draw_curve(axes: Axes, sweep: Sweep) -> None:
    """Time of a forward, and the two floors that it cannot go below."""
    per_gib = 2**30 if sweep.axis == "budget" else 1
    positions = [point.position / per_gib for point in sweep.points]
    predictions = [point.prediction for point in sweep.points]
    link = [p.streamed_bytes / p.scenario.link_bytes_per_second * 1e3 for p in predictions]
    series = (
        ("forward", [p.forward_ms for p in predictions], BLUE, "-", "o"),
        ("link alone", link, GREEN, "--", ""),
        ("compute alone", [p.compute_ms for p in predictions], ORANGE, ":", ""),
    )
    for name, values, colour, line, marker in series:
        axes.plot(
            positions,
            values,
            line,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms per forward", fontsize=FONT)
    unit = "GiB of device memory" if sweep.axis == "budget" else "layers ahead"
    axes.set_xlabel(unit, fontsize=FONT)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_bars(axes: Axes, sweep: Sweep) -> None:
    names = [point.label for point in sweep.points]
    values = [point.prediction.forward_ms for point in sweep.points]
    rows = range(len(names))
    axes.barh(rows, values, color=BLUE, height=0.7)
    axes.set_yticks(rows, names, fontsize=SMALL)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.12)
    for row, value in zip(rows, values, strict=True):
        axes.text(value, row, f" {value:,.1f} ms", va="center", fontsize=SMALL)
    axes.set_xlabel("ms per forward", fontsize=FONT)
