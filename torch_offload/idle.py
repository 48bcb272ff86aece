"""Names, once, the units that the first forward of the whole model did not call.

A unit that is never called streams nothing, and nobody would notice: its weights may be used by
``module.forward(...)`` or without their module at all. Or it is a part that this input skips.
"""

from __future__ import annotations

from torch_offload import _C
from torch_offload._C import StateError
from torch_offload.names import listed
from torch_offload.user_warning import warn_user


class IdleUnits:
    """Looks once at what was called so far."""

    def __init__(self) -> None:
        self._has_looked = False

    def tell(self, engine: _C.Engine) -> None:
        """Warns of units that were not called yet; at the first call of this only."""
        if self._has_looked:
            return
        try:
            plan = engine.plan
        except StateError:  # another thread's forward has begun: after that one
            return
        self._has_looked = True
        streamed = [index for index, place in enumerate(plan.places) if place is not None]
        idle = [
            plan.units[index].name for index in streamed if not engine.unit_stats(index).acquired
        ]
        if idle:
            warn_user(
                f"the first forward called {len(streamed) - len(idle)} of "
                f"{len(streamed)} units, and none of {listed(idle)}; "
                "that is fine for a part that this input does not need, but if it was used without "
                "a call (module.forward(...), or its weights alone), keep it on the device with "
                "resident=[...]"
            )
