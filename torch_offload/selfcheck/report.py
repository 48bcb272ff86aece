"""What came of the lanes: one table, one line of figures, the same as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Verdict: TypeAlias = Literal["passed", "failed", "not run"]

_STYLES: dict[Verdict, str] = {"passed": "green", "failed": "bold red", "not run": "yellow"}


@dataclass(frozen=True)
class LaneResult:
    """What came of one lane.

    Attributes:
        name: The lane's.
        tried: What was tried.
        count: How many things were tried.
        counts: What they are.
        control: Whether the planted control was caught; None if it was not run.
        verdict: ``"passed"`` only behind a control that was caught.
        reason: Why it failed or was not run, or what else should be known.
        seconds: How long it took.
        examples: The first faults, in words.
        figures: More numbers.
    """

    name: str
    tried: str
    count: int
    counts: str
    control: bool | None
    verdict: Verdict
    reason: str
    seconds: float
    examples: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All lanes, and the machine that they ran on."""

    lanes: tuple[LaneResult, ...]
    machine: dict[str, Any]
    full: bool

    @property
    def is_well(self) -> bool:
        """Whether something ran, and nothing failed."""
        verdicts = [lane.verdict for lane in self.lanes]
        return "passed" in verdicts and "failed" not in verdicts

    @property
    def last_line(self) -> str:
        """The figures that say it all."""
        by_verdict = {
            verdict: sum(lane.verdict == verdict for lane in self.lanes) for verdict in _STYLES
        }
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in by_verdict.items() if count)
        tried = "; ".join(
            f"{lane.count:,} {lane.counts}" for lane in self.lanes if lane.verdict != "not run"
        )
        seconds = sum(lane.seconds for lane in self.lanes)
        return f"{verdicts} in {seconds:.0f} s: {tried or 'nothing was tried'}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "full": self.full,
            "machine": self.machine,
            "lanes": [asdict(lane) for lane in self.lanes],
            "is_well": self.is_well,
            "last_line": self.last_line,
        }

    def __rich__(self) -> RenderableType:
        """For a terminal."""
        table = Table(show_lines=False)
        for name in ("lane", "what was tried"):
            table.add_column(name, overflow="fold")
        table.add_column("how many", justify="right", overflow="fold")
        for name in ("control", "verdict"):
            table.add_column(name, no_wrap=True)
        table.add_column("s", justify="right")
        for lane in self.lanes:
            tried = Text(lane.tried)
            if lane.reason:
                tried.append(f"\n{lane.reason}", "dim" if lane.verdict == "passed" else "")
            table.add_row(
                lane.name,
                tried,
                f"{lane.count:,}" if lane.control is not None else "",
                {True: "caught", False: "MISSED", None: ""}[lane.control],
                Text(lane.verdict, _STYLES[lane.verdict]),
                f"{lane.seconds:.1f}",
            )
        return Group(table, *self._examples(), Text(self.last_line, style="bold"))

    def _examples(self) -> Iterator[Text]:
        for lane in self.lanes:
            for example in lane.examples:
                yield Text(f"{lane.name}: {example}", style="red")
