"""A slice of each lane: first its planted control, then what it is for."""

from __future__ import annotations

import pytest

from tests.lanes import all_lanes
from tests.lanes.fuzzed_commands import GOOD, options_of_commands
from tests.python.streamed_master_guard import unguarded_control
from torch_offload.selfcheck import Effort, Lane
from torch_offload.selfcheck.runner import run_lane


@pytest.mark.parametrize("lane", all_lanes(), ids=lambda lane: lane.name)
def test_slice_of_lane_finds_its_control_and_no_fault(lane: Lane) -> None:
    with unguarded_control(lane):
        result = run_lane(lane, Effort())
    assert result.control, result.reason
    assert result.verdict == "passed", "\n".join((result.reason, *result.examples))


def test_fuzzed_options_are_those_of_the_command_line() -> None:
    options = {
        (command, option.name): option.is_flag
        for command, all_options in options_of_commands().items()
        for option in all_options
    }
    assert options["plan", "--decode-rate"] is False
    assert options["selfcheck", "--full"] is True
    assert options["", "--version"] is True
    assert set(GOOD) <= {name for _, name in options}, "values of options that are no more"
