"""The self-check's lanes on a real GPU, full size."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from torch_offload.selfcheck import Effort, Lane, LaneResult, run_lanes
from torch_offload.selfcheck.equality import Equality, VisibleRaces
from torch_offload.selfcheck.overlap import Overlap
from torch_offload.selfcheck.races import PublishedRaces, TriedRaces

pytestmark = pytest.mark.needs_cuda


@pytest.fixture(autouse=True)
def _unguarded() -> Iterator[None]:
    """Without the guard of the masters: one race takes wrappers away, and lanes count copies."""
    with _disable_current_modes():
        yield


def _passed(lane: Lane) -> LaneResult:
    (result,) = run_lanes([lane], Effort(full=True)).lanes
    assert (result.verdict, result.examples) == ("passed", ()), result.reason
    assert result.control is True
    return result


def test_a_thousand_delayed_runs_are_bit_equal(device: torch.device) -> None:
    """All modes, layouts and granularities of several models, with poisoned places."""
    begin = time.monotonic()
    result = _passed(Equality(device))
    assert result.count >= 1000
    assert result.figures["copies"] >= result.figures["uses"] > 5000
    print(f"{result.count} runs in {time.monotonic() - begin:.1f} s: {result.reason}")


def test_planted_races_become_wrong_numbers(device: torch.device) -> None:
    """What shows that the delays of the test above are long enough to bite."""
    assert _passed(VisibleRaces(device)).count >= 4


def test_real_copy_overlaps_a_real_kernel_and_is_right(device: torch.device) -> None:
    result = _passed(Overlap(device))
    assert result.count >= 1
    print(result.reason)


@pytest.mark.parametrize(("lane", "caught"), [(PublishedRaces(), 18), (TriedRaces(), 6)])
def test_races_are_caught_on_the_gpu(device: torch.device, lane: Lane, caught: int) -> None:
    assert _passed(lane).figures["caught"] == caught
