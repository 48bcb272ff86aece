"""What is known of one unit: where it lives, when it came there, who else uses the room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_offload.names import listed
from torch_offload.sizes import format_size
from torch_offload.timeline.scale import duration

if TYPE_CHECKING:
    from torch_offload.counts import UnitInfo
    from torch_offload.trace import Trace


@dataclass(frozen=True)
class UnitDescription:
    """One unit, for people; `print` it.

    Attributes:
        unit: Its name, sizes and counts.
        device: Where the window is.
        is_whole: Whether its place holds its bytes now, or will once its copy is done.
        overlaps: Names of the units whose places share bytes with its own.
        copies_ms: Begin and end of each copy in the recorded run, since the run began.
        uses_ms: Likewise of each use.
    """

    unit: UnitInfo
    device: str
    is_whole: bool
    overlaps: tuple[str, ...]
    copies_ms: tuple[tuple[float, float], ...]
    uses_ms: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        unit = self.unit
        lines = [
            f"{unit.name}: {'attention' if unit.kind == 'mha' else 'FFN'} of layer "
            f"{unit.layer_index}, {format_size(unit.size_bytes)}, "
            f"{len(unit.parameters)} parameters"
        ]
        if unit.place is None:
            return "\n".join([*lines, f"  lives on {self.device} for good"])
        begin, end = unit.place
        state = "holds its bytes" if self.is_whole else "holds other bytes, or none"
        lies = "page-locked host memory"
        if unit.bytes_in_files:
            lies = f"checkpoint files with {format_size(unit.bytes_in_files)} of it"
        lines += [
            f"  at rest in {lies}, copied in {unit.copies}; in use at bytes {begin:,} to {end:,} "
            f"of the window on {self.device}, which now {state}",
            f"  used {unit.acquired} times, onloaded {unit.onloads} times, "
            f"{unit.misses} of them a miss",
            f"  shares its place with {listed(self.overlaps) or 'nobody'}",
        ]
        for what, moments in (("copied", self.copies_ms), ("used", self.uses_ms)):
            if moments:
                lines.append(f"  {what} in the recorded run: {_moments(moments)}")
        return "\n".join(lines)


def describe_unit(
    units: Sequence[UnitInfo],
    unit: str | int,
    *,
    device: str,
    is_whole: Sequence[bool],
    overlaps: Sequence[Sequence[int]],
    trace: Trace | None,
) -> UnitDescription:
    """Looks a unit up by its name or index.

    Raises:
        ValueError: If there is none of that name, or several that end in it.
        IndexError: If the index is out of range.
    """
    index = _find([info.name for info in units], unit)

    def moments(kind: str) -> tuple[tuple[float, float], ...]:
        bars = () if trace is None else trace.bars
        return tuple(
            (bar.begin_ns / 1e6, bar.end_ns / 1e6)
            for bar in bars
            if bar.kind == kind and bar.unit == index
        )

    return UnitDescription(
        unit=units[index],
        device=device,
        is_whole=is_whole[index],
        overlaps=tuple(units[other].name for other in overlaps[index]),
        copies_ms=moments("copy"),
        uses_ms=moments("compute"),
    )


def _find(names: Sequence[str], unit: str | int) -> int:
    if isinstance(unit, int):
        if not 0 <= unit < len(names):
            raise IndexError(f"expected a unit from 0 to {len(names) - 1}, got {unit}")
        return unit
    if unit in names:
        return list(names).index(unit)
    found = [index for index, name in enumerate(names) if name.endswith(f".{unit}")]
    if len(found) == 1:
        return found[0]
    close = [names[index] for index in found] or [name for name in names if unit in name] or names
    problem = "several that end in it" if found else "none"
    raise ValueError(
        f"expected the name of one unit, got {unit!r}, of which there are {problem}; "
        f"as in {listed(close)}"
    )


def _moments(moments: Sequence[tuple[float, float]]) -> str:
    shown = ", ".join(
        f"{duration(begin * 1e6)} for {duration((end - begin) * 1e6)}"
        for begin, end in moments[-3:]
    )
    return f"{len(moments)} times, last at {shown}" if len(moments) > 3 else f"at {shown}"
