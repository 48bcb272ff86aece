"""Tells, once for a plan, that edited units are not packed any more.

Whether a unit has room for what it packs to after an edit is found out in the middle of a forward.
What its copies carry then changes, and that is compared when the forward is over.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from torch_offload import _C
from torch_offload._C import StateError
from torch_offload.names import listed
from torch_offload.placed import Placed
from torch_offload.user_warning import warn_user


class PackingWatch:
    """Watches the units of one model.

    Args:
        engine: Of the model.
        placed: How the units were planned.
    """

    def __init__(self, engine: _C.Engine, placed: Placed) -> None:
        self._engine = engine
        self._has_told = False
        self.follow(placed)

    def follow(self, placed: Placed) -> None:
        """Goes by another plan from now on."""
        self._placed = placed
        self._is_needed = any(way != "raw" for way in placed.planned_transports)
        self._copied_bytes: list[int] | None = None  # when it was last looked

    def begin_anew(self) -> None:
        """Lets the next unit that loses its packing be told of."""
        self._has_told = False

    def tell(self) -> None:
        """Warns if a unit has lost its packing. Takes some microseconds where none has."""
        if not self._is_needed or self._has_told:
            return
        with suppress(StateError):  # another thread's forward has begun: after that one
            lost = self._engine.at_rest("a look at what is packed", self._look)
            if lost:
                self._has_told = True
                self._warn(lost)

    def _look(self) -> tuple[str, ...]:
        copied_bytes = self._engine.transport_bytes
        if copied_bytes == self._copied_bytes:
            return ()
        self._copied_bytes = copied_bytes
        return replace(self._placed, plan=self._engine.plan).no_longer_packed

    def _warn(self, lost: tuple[str, ...]) -> None:
        warn_user(
            f"{listed(lost)} travel raw from now on: edited, they take more packed than there is "
            "room for. Results are the same; handle.replan() counts edited units anew and packs "
            "those again that packing still shrinks"
        )
