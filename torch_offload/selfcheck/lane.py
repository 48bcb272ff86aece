"""What a lane is: something tried many times, and a planted control that it must fail on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# How many faults a tally describes; their number is counted apart.
MAX_EXAMPLES = 5


def _ignore(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Effort:
    """How much a lane tries.

    Attributes:
        full: The full sizes, however long they take; else what fits a minute or two for all lanes.
        num_threads: How many threads may compute at once.
        progress: Told now and then how much is done, of how much.
    """

    full: bool = False
    num_threads: int = 1
    progress: Callable[[int, int], None] = _ignore

    def pick(self, quick: int, full: int) -> int:
        """Returns the number that this effort asks for."""
        return full if self.full else quick

    def chunks(self, total: int, chunk: int) -> Iterator[int]:
        """Yields the sizes of chunks that make up `total`, and tells progress after each.

        Work in C++ is done in chunks, so that Ctrl-C is noticed between two of them.
        """
        for begin in range(0, total, chunk):
            yield min(chunk, total - begin)
            self.progress(min(begin + chunk, total), total)


@dataclass
class Tally:
    """What a lane has tried, and what went wrong.

    Attributes:
        count: How many things were tried; what they are, the lane's `counts` says.
        note: What else should be known of them, in a few words.
        num_faults: How many of them went wrong.
        examples: The first of these, in words.
        figures: More numbers, for the JSON.
    """

    count: int = 0
    note: str = ""
    num_faults: int = 0
    examples: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add_fault(self, example: str) -> None:
        """Counts one more fault."""
        self.num_faults += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)

    def must(self, is_right: bool, example: str) -> None:
        """Counts one more thing tried, and a fault unless it is right."""
        self.count += 1
        if not is_right:
            self.add_fault(example)


def all_caught(controls: Mapping[str, Tally]) -> Tally:
    """The control of a lane with several plants: one of them that is not caught makes it blind."""
    caught = Tally()
    for plant, tally in controls.items():
        if not tally.num_faults:
            return Tally(note=plant)
        caught.add_fault(f"{plant}: {tally.examples[0]}")
    return caught


class Lane(ABC):
    """One way to try whether streaming can go wrong.

    A runner asks `why_not` first, then runs `control`, then `run`: nothing has passed that was not
    seen to fail. Whatever is raised is a failure of the lane.

    Attributes:
        name: One word or two, for ``--lanes``.
        tried: What is tried, in a few words.
        counts: What `Tally.count` counts, in the plural.
    """

    name: str
    tried: str
    counts: str

    def why_not(self) -> str | None:
        """Returns why this lane cannot be run on this machine; None if it can."""
        return None

    @abstractmethod
    def control(self) -> Tally:
        """Tries a planted fault. A tally without a fault shows that the lane is blind.

        Where there are several, `all_caught` makes one tally of them.
        """

    @abstractmethod
    def run(self, effort: Effort) -> Tally:
        """Tries what the lane is for."""
