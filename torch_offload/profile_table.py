"""A profile as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torch_offload.profile import Profile, UnitProfile
from torch_offload.rates import format_byte_rate
from torch_offload.sizes import format_size
from torch_offload.timeline.scale import duration

_MOST_ROWS = 24


def table_of(profile: Profile) -> RenderableType:
    """The sums, the units that took most, and the sentence that counts."""
    measured, total = profile.measured, profile.total
    wall = max(1, measured.wall_ns)

    def part(ns: float) -> str:
        return f"{duration(ns)} ({100 * ns / wall:.1f} %)"

    sums = Table.grid(padding=(0, 2))
    rows = (
        ("wall time", f"{duration(wall)}, {measured.forwards} forwards"),
        ("units compute", part(total.compute_ns)),
        ("compute waits for copies", part(total.stall_ns)),
        ("between units", f"{part(total.between_ns)}: other kernels, launching, resident units"),
        ("outside units", f"{part(total.outside_ns)}: before the first and behind the last one"),
        ("attributed", f"{100 * profile.attributed_share:.1f} % of the wall time"),
        ("copy engine busy", part(total.copy_ns)),
        ("copy engine idle", part(total.copy_idle_ns)),
        ("copy time hidden", f"{100 * total.hidden_share:.1f} %"),
        (
            "copied",
            f"{format_size(profile.streamed_bytes)}, "
            f"{format_byte_rate(profile.link_bytes_per_second)}",
        ),
        ("CPU in our calls", part(measured.cpu_ns)),
        ("CPU blocked by us", part(total.blocked_ns)),
        ("of the roofline", f"{100 * profile.roofline_share:.1f} %"),
    )
    for name, value in rows:
        sums.add_row(name, value)
    where = f"{measured.mode}, {measured.streams} streams, {measured.device}"
    title = Text(f"profile: {where}", style="bold")
    return Group(title, sums, _units(profile), Text(profile.sentence, style="bold"))


def _units(profile: Profile) -> RenderableType:
    """By unit; of many, those whose copies or waits took longest."""
    table = Table()
    table.add_column("unit", overflow="fold")
    for heading in ("size", "uses", "copy", "compute", "waits for its copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = profile.units
    if len(shown) > _MOST_ROWS:
        longest = sorted(shown, key=_weight, reverse=True)[:_MOST_ROWS]
        shown = tuple(unit for unit in shown if unit in longest)
    for unit in shown:
        times = unit.times
        table.add_row(
            unit.name,
            format_size(unit.size_bytes),
            str(times.uses),
            "resident" if unit.is_resident else _mean(times.copy_ns, times.copies),
            _mean(times.compute_ns, times.uses),
            _mean(times.stall_ns, times.uses),
        )
    hidden = len(profile.units) - len(shown)
    if hidden:
        table.add_row(f"... and {hidden} that took less, see profile.units", *[""] * 5)
    table.caption = "times are means of one copy or use"
    return table


def _weight(unit: UnitProfile) -> int:
    return unit.times.stall_ns + unit.times.compute_ns + unit.times.copy_ns


def _mean(ns: int, count: int) -> str:
    return duration(ns / count) if count else "-"
