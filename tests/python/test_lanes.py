"""A slice of each lane: first its planted control, then what it is for."""

from __future__ import annotations

import pytest

from tests.lanes import all_lanes
from torch_offload.selfcheck import Effort, Lane
from torch_offload.selfcheck.runner import run_lane


@pytest.mark.parametrize("lane", all_lanes(), ids=lambda lane: lane.name)
def test_slice_of_lane_finds_its_control_and_no_fault(lane: Lane) -> None:
    result = run_lane(lane, Effort())
    assert result.control, result.reason
    assert result.verdict == "passed", "\n".join((result.reason, *result.examples))
