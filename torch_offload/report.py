"""The table that `Handle.report` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torch_offload.sizes import format_size

if TYPE_CHECKING:
    from torch_offload.handle import Handle

_MOST_ROWS = 40


def report_of(handle: Handle) -> RenderableType:
    """Builds the report of an offloaded model: units, sums, and what never ran."""
    stats = handle.stats
    units = handle.units
    table = Table(title=repr(handle).strip("<>"), title_justify="left")
    table.add_column("unit")
    table.add_column("kind")
    for heading in ("size", "place", "used", "onloads", "copies", "misses"):
        table.add_column(heading, justify="right")
    for unit in units[:_MOST_ROWS]:
        place = "resident" if unit.place is None else f"{unit.place[0]:,}"
        place += {"raw": "", "packed": " packed", "packed_resident": " stays packed"}[
            unit.transport
        ]
        table.add_row(
            unit.name,
            unit.kind,
            format_size(unit.size_bytes),
            place,
            "" if unit.place is None else str(unit.acquired),
            str(unit.onloads),
            str(unit.copies or ""),
            str(unit.misses),
        )
    if len(units) > _MOST_ROWS:
        table.add_row(f"... and {len(units) - _MOST_ROWS} more, see handle.units", *[""] * 7)
    summary = Table.grid(padding=(0, 2))
    for name, value in (
        ("forwards", str(stats.forwards)),
        ("onloads", f"{stats.onloads} ({stats.prefetched} prefetched, {stats.misses} misses)"),
        ("streamed", format_size(stats.bytes_onloaded)),
        ("window", format_size(stats.window_bytes)),
        ("resident", format_size(stats.bytes_resident)),
        ("page-locked host memory", format_size(stats.host_bytes)),
        ("CPU time of ours", f"{stats.cpu_seconds * 1e3:.2f} ms"),
    ):
        summary.add_row(name, value)
    if stats.staging_bytes or stats.packed_bytes:
        summary.add_row("staging ring", format_size(stats.staging_bytes))
        summary.add_row("packed on the device", format_size(stats.packed_bytes))
    in_files = sum(unit.bytes_in_files for unit in units)
    if in_files:
        summary.add_row("streamed from checkpoint files", format_size(in_files))
        summary.add_row("of files locked so far", format_size(stats.file_bytes_locked))
    parts: list[RenderableType] = [table, summary]
    idle = [unit.name for unit in units if unit.place is not None and not unit.acquired]
    if stats.forwards and idle:
        parts.append(Text(f"never ran: {', '.join(idle)}", style="bold"))
    return Group(*parts)
