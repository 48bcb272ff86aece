"""Passes of a model that is edited between them, held against `tests.python.expect`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from tests.python import expect
from torch_offload.handle import Handle


class EditedPasses:
    """Remembers which units were edited, so that the oracle knows what must be copied again."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._stale: set[str] = set()
        self._replaced: set[str] = set()

    def edited(self, parameters: Collection[str]) -> None:
        """In place."""
        self._stale |= self._units_of(parameters)

    def replaced(self, parameters: Collection[str]) -> None:
        """By other Parameter objects."""
        self._replaced |= self._units_of(parameters)

    def refreshed(self) -> None:
        """All of them, by `Handle.refresh`."""
        self._stale |= {unit.name for unit in self._handle.units if unit.place is not None}

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
