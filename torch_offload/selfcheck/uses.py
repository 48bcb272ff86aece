"""How many uses of units were copied for: what tells streaming from a model that never left."""

from __future__ import annotations

from torch_offload.handle import Handle


class Uses:
    """Counts over a run of like forwards with poisoned places: each use needs a copy of its own."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._before = self._now()

    def _now(self) -> tuple[int, int]:
        engine, units = self._handle._engine, self._handle.units
        whole = sum(engine.is_whole(i) for i, unit in enumerate(units) if unit.place)
        uses = sum(unit.acquired for unit in units)
        return uses, self._handle.stats.onloads - whole

    def counts(self) -> tuple[int, int]:
        """Uses since this was made, and copies that were used up."""
        uses, copies = (now - was for now, was in zip(self._now(), self._before, strict=True))
        return uses, copies
