"""A plan as a picture: where every byte lies, and what other budgets would come to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch_offload.packing import packed_host_bytes
from torch_offload.timeline.chart import (
    BLUE,
    DPI,
    FONT,
    GREEN,
    ORANGE,
    SMALL,
    WIDTH_IN,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torch_offload.plan_report import PlanReport

_GIB = 2**30
_GREY, _YELLOW, _SKY, _PURPLE = "#999999", "#E69F00", "#56B4E9", "#CC79A7"
# Of a unit that is not resident as it is, by how it travels.
_COLOURS = {"raw": GREEN, "packed": _PURPLE, "packed_resident": _SKY}
_HEIGHT_IN = 5.4
# Names stand inside a bar from this part of the whole on.
_ROOM_FOR_A_NAME = 0.08


def write_plan_chart(report: PlanReport, path: Path) -> None:
    """Draws it.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        OSError: If the file cannot be written.
    """
    plan_chart_of(report).savefig(path, dpi=DPI)


def plan_chart_of(report: PlanReport) -> Figure:
    """The same as a figure."""
    figure = new_figure(WIDTH_IN, _HEIGHT_IN, report.title)
    homes, units, curve = figure.subplots(3, 1, height_ratios=(1.1, 0.7, 2.2))
    _draw_homes(homes, report)
    _draw_units(units, report)
    _draw_curve(curve, report)
    for axes in (homes, units, curve):
        axes.tick_params(labelsize=SMALL)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def _draw_homes(axes: Axes, report: PlanReport) -> None:
    """Device and host, each a bar of what lies there."""
    fit, plan = report.fit, report.fit.planned.plan
    tables = sum(table.size_bytes for table in fit.planned.tables)
    packed = packed_host_bytes(plan, fit.planned.packable.packed_bytes)
    bars = (
        (
            "device",
            (
                ("always there", fit.planned.outside_bytes, _GREY),
                ("resident units", plan.resident_bytes, BLUE),
                ("resident units, packed", fit.planned.packed_resident_bytes, _SKY),
                ("window", plan.window_bytes, ORANGE),
                ("staging ring", fit.planned.staging_bytes, _PURPLE),
            ),
        ),
        (
            "host",
            (
                ("masters, page-locked", fit.token.host_bytes - packed, GREEN),
                ("packed copies beside them", packed, _PURPLE),
                ("table, its rows gathered", tables, _YELLOW),
            ),
        ),
    )
    longest = max(sum(size for _, size, _ in parts) for _, parts in bars)
    for row, (_, parts) in enumerate(bars):
        left = 0.0
        for name, size, colour in parts:
            if size == 0:
                continue
            width = size / _GIB
            axes.barh(row, width, left=left, color=colour, height=0.75, label=name)
            if size > _ROOM_FOR_A_NAME * longest:
                axes.text(
                    left + width / 2,
                    row,
                    f"{width:.1f}",
                    ha="center",
                    va="center",
                    fontsize=SMALL,
                    color="white",
                )
            left += width
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=FONT)
    axes.invert_yaxis()
    axes.set_title("where the weights are, GiB", loc="left", fontsize=FONT)
    axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_units(axes: Axes, report: PlanReport) -> None:
    """Every unit in its order, as wide as it is large: what stays and what streams."""
    plan = report.fit.planned.plan
    left = 0.0
    for unit, place, transport in zip(plan.units, plan.places, plan.transports, strict=True):
        width = unit.size_bytes / _GIB
        colour = BLUE if place is None else _COLOURS[transport]
        axes.barh(0, width, left=left, color=colour, height=0.8, edgecolor="white", linewidth=0.3)
        left += width
    axes.set_xlim(0, max(left, 1e-9))
    axes.set_yticks([])
    title = "the units in the order of a forward: blue stays, green streams"
    if any(transport != "raw" for transport in plan.transports):
        title += ", light blue stays packed, purple travels packed"
    axes.set_title(title, loc="left", fontsize=FONT)
    axes.spines["left"].set_visible(False)


def _draw_curve(axes: Axes, report: PlanReport) -> None:
    budgets = [fit.budget_bytes / _GIB for fit in report.curve]
    for name, values, colour in (
        ("a prompt", [fit.prompt.forward_ms for fit in report.curve], ORANGE),
        ("a token", [fit.token.forward_ms for fit in report.curve], BLUE),
    ):
        axes.plot(budgets, values, "-o", color=colour, markersize=4, linewidth=1.6, label=name)
    asked = report.fit.budget_bytes / _GIB
    if budgets and asked <= budgets[-1]:
        axes.axvline(asked, color=_GREY, linestyle="--", linewidth=1.0, label="this budget")
    if report.knee_bytes is not None:
        axes.axvline(report.knee_bytes / _GIB, color=GREEN, linestyle=":", label="the knee")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms per forward", fontsize=FONT)
    axes.set_xlabel("GiB that weights may take on the device", fontsize=FONT)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
