"""Profiles and timelines of real streams: the device's times against events of torch's own."""

from __future__ import annotations

import pytest
import torch

import torch_offload
from tests.python.test_profile import Model

pytestmark = pytest.mark.needs_cuda

FORWARDS = 20


@pytest.fixture
def inputs(device: torch.device) -> torch.Tensor:
    return torch.ones(2048, 1024, device=device)


@pytest.mark.parametrize("mode", ["sync", "pipeline"])
def test_profile_agrees_with_events_around_the_same_forwards(
    inputs: torch.Tensor, mode: torch_offload.config.Mode
) -> None:
    model = Model(layers=8, width=1024).eval()
    with torch_offload.offload(model, inputs.device, mode=mode) as handle, torch.inference_mode():
        model(inputs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with handle.profile() as p:
            begin.record()
            for _ in range(FORWARDS):
                model(inputs)
            end.record()
        end.synchronize()
        measured_ms = begin.elapsed_time(end)
    total = p.result.total
    lane_ms = (total.compute_ns + total.stall_ns + total.between_ns) / 1e6
    assert lane_ms == pytest.approx(measured_ms, rel=0.05)
    assert all(unit.times.uses == FORWARDS for unit in p.result.units)
    assert (total.blocked_ns > 0) == (mode == "sync")


def test_copies_of_a_real_run_lie_beside_computes(inputs: torch.Tensor) -> None:
    model = Model(layers=8, width=1024).eval()
    with torch_offload.offload(model, inputs.device) as handle, torch.inference_mode():
        model(inputs)
        with handle.record(times=True):
            for _ in range(FORWARDS):
                model(inputs)
        trace = handle.trace()
    computes = trace.of_kind("compute")
    beside = [
        copy
        for copy in trace.of_kind("copy")
        if any(c.begin_ns < copy.end_ns and copy.begin_ns < c.end_ns for c in computes)
    ]
    assert len(beside) > len(trace.of_kind("copy")) / 2
    for arrow in trace.arrows:
        # Two streams are timed by events of their own: to some microseconds.
        assert arrow.from_ns <= arrow.to_ns
