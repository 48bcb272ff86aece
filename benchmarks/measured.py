"""The parts of a run by what they are of, and how a figure is held against what it must be.

No torch in here: the tables of README and docs are made on machines that have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One figure: what it must be, what it should be, what it was, and whether that does."""

    figure: str
    must: str
    aim: str
    measured: str
    verdict: str
    machine: str = ""  # its GPU; several, where parts come from several runs


def _machine_of(document: Document) -> str:
    """Its GPU, without maker and memory: "H100"."""
    gpu = document["machine"]["gpu"]
    return gpu.removeprefix("NVIDIA ").split()[0] if gpu else "no GPU"


class Results:
    """The parts of all subjects that went well, by what they are of."""

    def __init__(self, documents: dict[str, Document]) -> None:
        self.documents = documents
        self._parts = [
            (part, _machine_of(document))
            for document in documents.values()
            for part in document["parts"].values()
            if part["status"] == "ok"
        ]
        self._machines_read: dict[str, None] = {}

    def all(self, what: str, **wanted: Any) -> list[Figures]:
        """Parts of a kind whose fields have these values, in the order they ran."""
        found = [
            (part, machine)
            for part, machine in self._parts
            if part.get("what") == what
            and all(part.get(name) == value for name, value in wanted.items())
        ]
        self._machines_read.update((machine, None) for _, machine in found)
        return [part for part, _ in found]

    def take_machines_read(self) -> str:
        """The GPUs of the parts that were asked for since this was called last."""
        machines = ", ".join(self._machines_read)
        self._machines_read.clear()
        return machines

    def one(self, what: str, **wanted: Any) -> Figures | None:
        """The first of them, or None."""
        return next(iter(self.all(what, **wanted)), None)

    def shapes(self) -> list[str]:
        """All shapes of the yardstick that were run, in their order."""
        found: dict[str, None] = {}
        for what in ("forward", "mode", "peer"):
            found.update(dict.fromkeys(part["shape"] for part in self.all(what)))
        return list(found)

    def failures(self) -> list[tuple[str, str, str]]:
        """(part, status, first line of the reason) of whatever did not go well."""
        return [
            (
                f"{subject}.{name}",
                part["status"],
                next(iter((part["error"] or "no reason given").splitlines())),
            )
            for subject, document in self.documents.items()
            for name, part in document["parts"].items()
            if part["status"] != "ok"
        ]


def tuple_of(shape: str) -> str:
    """Returns "(8,2048)" of "8x2048"."""
    return "(" + shape.replace("x", ",") + ")"


def verdict(value: float | None, must: float | None, aim: float | None, at_least: bool) -> str:
    """Says "aim", "must" or by how much `value` misses what it must be."""
    if value is None:
        return "not measured"

    def reaches(limit: float) -> bool:
        return value >= limit if at_least else value <= limit

    if aim is not None and reaches(aim):
        return "aim"
    if must is None:
        return "measured"
    if reaches(must):
        return "must"
    gap = abs(value - must)
    if gap == float("inf"):
        return "missed"
    return f"short by {gap:.3g}" if gap >= 0.001 else f"short by {gap:.1e}"


def row_of(
    figure: str,
    must: str,
    aim: str,
    measured: str,
    value: float | None,
    limits: tuple[float | None, float | None],
    at_least: bool = False,
) -> Row:
    text = measured if value is not None else "-"
    return Row(figure, must, aim, text, verdict(value, *limits, at_least))


def greatest(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
