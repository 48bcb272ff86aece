"""Names as people read them: short ones in pictures and tables, some of many in messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol


class UnitLike(Protocol):
    """What `_C.Unit` says of a unit."""

    @property
    def name(self) -> str:
        """Qualified name of its module."""

    @property
    def size_bytes(self) -> int:
        """Flat size."""

    @property
    def layer_index(self) -> int:
        """Running number of its layer."""

    @property
    def kind(self) -> str:
        """``"mha"`` or ``"ffn"``."""


def short_names(units: Sequence[UnitLike]) -> list[str]:
    """Returns ``"MHA 3"`` for the only attention unit of layer 3, else ``"q_proj 3"``.

    Names need not be unique: they label bars, whose units are known by index.
    """
    of_a_kind = Counter((unit.layer_index, unit.kind) for unit in units)
    names = []
    for unit in units:
        is_only = of_a_kind[unit.layer_index, unit.kind] == 1
        stem = unit.kind.upper() if is_only else unit.name.rpartition(".")[2]
        names.append(stem if stem.isdecimal() else f"{stem} {unit.layer_index}")
    return names


def listed(names: Iterable[str], most: int = 6) -> str:
    """Returns ``"'a', 'b' and 3 more"``, with at most so many by name."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more


def first_line(error: BaseException) -> str:
    """Returns what an error says before it goes into detail; its type if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
