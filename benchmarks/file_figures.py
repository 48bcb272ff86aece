"""Rows of the table of figures for what lies between the disk and the first forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from measured import Results, Row, greatest, row_of

if TYPE_CHECKING:
    from typing import Any


def _arena_fill(results: Results) -> Row:
    part: dict[str, Any] | None = results.one("offload", source="cpu")
    ours = part["offload_bytes_per_s"] / 1e9 if part else None
    times = part.get("times_torch") if part else None
    return row_of(
        "filling the arena from host memory, and times `torch.pin_memory`",
        ">= 5 GB/s, >= 3 times",
        "7 GB/s",
        f"{ours:.1f} GB/s, {times:.1f} times" if ours is not None and times is not None else "",
        min(ours, times * 5 / 3) if ours is not None and times is not None else None,
        (5.0, 7.0),
        at_least=True,
    )


def _first_forward(results: Results) -> Row:
    parts = results.all("first forward")
    return row_of(
        "checkpoint in the page cache to the end of the first forward / floor",
        "<= 1.1",
        "1.05",
        ", ".join(
            f"{part['ratio']:.3f} ({min(part['seconds']):.2f} s for "
            f"{part['checkpoint_bytes'] / 1e9:.1f} GB)"
            for part in parts
        ),
        greatest(part["ratio"] for part in parts),
        (1.1, 1.05),
    )


def _private_memory(results: Results) -> Row:
    value = greatest(part["private_ratio"] for part in results.all("first forward"))
    return row_of(
        "private host memory / weights, read in place",
        "<= 0.05",
        "",
        f"{value:.4f}" if value is not None else "",
        value,
        (0.05, None),
    )


def _from_disk(results: Results) -> Row:
    part = results.one("disk")
    value = part["ratio"] if part else None
    return row_of(
        "a checkpoint larger than the memory for it: forward / (bytes it reads / rate of the disk)",
        "measured, predicted",
        "",
        f"{value:.2f} ({part['bytes_per_s'] / 1e9:.2f} GB/s of "
        f"{max(filter(None, part['disk_bytes_per_s'])) / 1e9:.2f} GB/s)"
        if part and value is not None
        else "",
        value,
        (None, None),
    )


FILE_ROWS: tuple[Callable[[Results], Row], ...] = (
    _arena_fill,
    _first_forward,
    _private_memory,
    _from_disk,
)
