"""Lanes that need the tests' oracle: each is a `torch_offload.selfcheck.lane.Lane`.

``python -m tests.lanes`` runs them in full and keeps their figures; `tests/python/test_lanes.py`
runs a slice of each.
"""

from __future__ import annotations

from torch_offload.selfcheck.lane import Lane


def all_lanes() -> list[Lane]:
    """Makes every lane."""
    from tests.lanes.bad_checkpoints import BadCheckpoints
    from tests.lanes.bad_input import BadInput
    from tests.lanes.faults import FaultSweep
    from tests.lanes.soak import Soak
    from tests.lanes.stateful import Stateful

    return [FaultSweep(), Soak(), Stateful(), BadInput(), BadCheckpoints()]
