"""Passes of a model that is edited between them, held against `tests.python.expect`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from tests.python import expect
from torch_offload.handle import Handle


class EditedPasses:
    """Remembers which units were edited, so that the oracle knows what must be copied again.

    What is copied of a packed unit, or decoded, is what it was when it was packed. So an edit of
    one is what a replaced Parameter is of a raw one: it is noticed when the unit is asked for, and
    what was brought ahead in that same pass was in vain.
    """

    def __init__(self, handle: Handle, *, knows_packing: bool = True) -> None:
        self._handle = handle
        self._knows_packing = knows_packing
        self._stale: set[str] = set()
        self._replaced: set[str] = set()

    def edited(self, parameters: Collection[str]) -> None:
        """In place."""
        self._add_edited(self._units_of(parameters))

    def replaced(self, parameters: Collection[str]) -> None:
        """By other Parameter objects."""
        self._replaced |= self._units_of(parameters)

    def refreshed(self, edited: Collection[str]) -> None:
        """All of them, by `Handle.refresh`, some behind an edit that no counter shows.

        With packed masters it finds every edit, packs those units on the spot, and no others: what
        is brought ahead from then on is new.
        """
        streamed = {unit.name for unit in self._handle.units if unit.place is not None}
        if self._handle.config.masters == "packed":
            found = (self._replaced | self._units_of(edited)) & self._packed()
            self._replaced -= found
            self._stale |= found | (streamed - self._packed())
        else:
            self._add_edited(streamed)

    def _add_edited(self, units: set[str]) -> None:
        packed = units & self._packed() if self._knows_packing else set()
        self._replaced |= packed
        self._stale |= units - packed

    def _packed(self) -> set[str]:
        return {unit.name for unit in self._handle.units if unit.transport != "raw"}

    def forget(self) -> None:
        """As if nothing had been edited: the oracle must then be found wrong."""
        self._stale.clear()
        self._replaced.clear()

    @contextmanager
    def watched(self) -> Iterator[expect.Calls]:
        """Asserts that the passes inside copy what they must."""
        with expect.watch(
            self._handle,
            stale=tuple(self._stale - self._replaced),
            replaced=tuple(self._replaced),
        ) as calls:
            yield calls
        if calls.passes:
            self._stale, self._replaced = calls.stale, calls.replaced
            expect.assert_copies(calls)

    def _units_of(self, parameters: Collection[str]) -> set[str]:
        return {
            unit.name
            for unit in self._handle.units
            if unit.place is not None and not set(parameters).isdisjoint(unit.parameters)
        }
