"""What `handle.explain` says."""

from __future__ import annotations

import json

import pytest
import torch

import torch_offload
from tests.python.dropin import Stack, planned_bytes

HOST = torch.device("cpu")


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(5)
    return torch_offload.align(Stack(8, 64).eval())  # type: ignore[return-value]


def test_every_unit_is_resident_or_streamed_and_the_bytes_add_up(model: Stack) -> None:
    with torch_offload.offload(model, HOST, gpu_budget=planned_bytes(model) // 2) as handle:
        found = handle.explain()
        names = {unit.name: unit.place for unit in handle.units}
        assert set(found.resident) == {name for name, place in names.items() if place is None}
        assert set(found.streamed) == {name for name, place in names.items() if place is not None}
        assert found.rule
        assert found.granularity == "sublayer"
        plan = found.prediction.plan
        assert plan.window_bytes == handle.stats.window_bytes
        assert found.device_bytes <= planned_bytes(model) // 2
        streamed = sum(unit.size_bytes for unit in handle.units if unit.place is not None)
        assert found.prediction.streamed_bytes == streamed
        assert 0 < found.roofline_share <= 1


def test_more_memory_is_never_slower_and_less_never_faster(model: Stack) -> None:
    with torch_offload.offload(model, HOST, gpu_budget=planned_bytes(model) // 2) as handle:
        found = handle.explain()
        now = found.prediction.forward_ms
        times = [change.forward_ms for change in found.changes]
        assert [change.device_bytes for change in found.changes] == sorted(
            change.device_bytes for change in found.changes
        )
        assert len(times) >= 3
        for change in found.changes:
            if change.forward_ms is None:
                continue
            if change.device_bytes > found.device_bytes:
                assert change.forward_ms <= now * 1.02
            else:
                assert change.forward_ms >= now * 0.98


def test_other_rules_are_named_and_none_is_faster(model: Stack) -> None:
    with torch_offload.offload(model, HOST, gpu_budget=planned_bytes(model) // 2) as handle:
        found = handle.explain()
        assert found.alternatives
        assert all(share >= 0 for _, share in found.alternatives)
        assert found.rule not in [rule for rule, _ in found.alternatives]


def test_plain_data_and_table_say_the_same(model: Stack) -> None:
    with torch_offload.offload(model, HOST, gpu_budget=None) as handle:
        found = handle.explain(link="25GB/s")
        document = json.loads(json.dumps(found.to_json()))
        assert document["resident"] == []
        assert document["link_bytes_per_second"] == 25e9
        assert document["device_bytes"] == found.device_bytes
        text = str(found)
        assert "nothing was to be chosen" in text
        assert "25.0 GB/s" in text
        assert "% of the roofline" in text


@torch.no_grad()
def test_profile_of_this_plan_gives_the_durations(model: Stack) -> None:
    with torch_offload.offload(model, HOST, gpu_budget=None) as handle:
        x = torch.randn(2, 3, 64)
        model(x)
        assert "assumed" in handle.explain().basis
        with handle.profile() as profiler:
            model(x)
            model(x)
        found = handle.explain()
        assert "last profile" in found.basis
        assert found.prediction.compute_ms > 0
        assert profiler.result.streamed_bytes > 0


def test_after_remove_fails(model: Stack) -> None:
    handle = torch_offload.offload(model, HOST)
    handle.remove()
    with pytest.raises(torch_offload.StateError):
        handle.explain()


def test_rate_of_no_meaning_fails(model: Stack) -> None:
    with (
        torch_offload.offload(model, HOST) as handle,
        pytest.raises(ValueError, match="expected link as a rate"),
    ):
        handle.explain(link="fast")
