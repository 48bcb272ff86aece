"""Times for people: which unit a stretch of time is told in."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A unit of time that suits a stretch of it.

    Attributes:
        name: ``"us"``, ``"ms"`` or ``"s"``.
        ns: Its length.
    """

    name: str
    ns: int

    def text(self, ns: float, digits: int = 4) -> str:
        """A duration with its unit, to so many digits: ``"185.1 ms"``."""
        value = ns / self.ns
        whole = 1 if value == 0 else math.floor(math.log10(abs(value))) + 1
        return f"{value:,.{max(0, digits - max(1, whole))}f} {self.name}"


def scale_of(span_ns: int) -> Scale:
    """The unit in which a stretch of time has no more than four digits before the point."""
    if span_ns < 200_000:
        return Scale("us", 1000)
    if span_ns < 10_000_000_000:
        return Scale("ms", 1_000_000)
    return Scale("s", 1_000_000_000)


def duration(ns: float) -> str:
    """A duration in the unit that suits it."""
    return scale_of(round(abs(ns))).text(ns)


def ticks(span_ns: int, most: int) -> list[int]:
    """Round moments from 0 to the end of a stretch, at most so many."""
    if span_ns <= 0:
        return [0]
    raw = span_ns / max(1, most - 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    step = max(1, round(step))
    return list(range(0, span_ns + 1, step))
