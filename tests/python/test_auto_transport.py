"""`transport="auto"` from end to end: what is planned is what is done, to the byte and bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.lanes.leftovers import Devices
from tests.python.dropin import HOST, assert_equal, packable_llama
from tests.python.dropin import logits as run
from tests.python.test_packed_transport import _many_exponents, expected_of
from torch_offload import Handle, offload
from torch_offload.devices import devices_made_by
from torch_offload.measured_times import measured_times
from torch_offload.profile_file import read_profile


def deep_llama() -> Any:
    return packable_llama(num_hidden_layers=12)


def weights_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def ways_of(handle: Handle) -> list[str]:
    return ["resident" if unit.place is None else unit.transport for unit in handle.units]


@pytest.mark.parametrize("granularity", ["sublayer", "module", "auto"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.75, 1.2])
def test_auto_is_equal_and_uses_just_the_bytes_that_were_predicted(
    share: float, granularity: Any
) -> None:
    model = deep_llama()
    expected = expected_of(model)
    budget = int(share * weights_bytes(model))
    with offload(
        model, HOST, transport="auto", gpu_budget=budget, granularity=granularity
    ) as handle:
        for _ in range(4):
            assert_equal(run(model), expected)
        found = handle.explain()
        assert found.device_bytes == handle.stats.device_bytes <= budget
        before = handle.stats
        with handle.record():
            assert_equal(run(model), expected)
        assert handle.check() == []
        after = handle.stats
        # What a copy carries is the blob, what is planned its room.
        copied = after.bytes_copied - before.bytes_copied
        assert copied <= found.prediction.streamed_bytes <= 1.05 * copied + 2**12
        assert ways_of(handle).count("packed") == len(found.packed)
        assert ways_of(handle).count("packed_resident") == len(found.packed_resident)
    assert_equal(run(model), expected)


def test_auto_packs_where_that_is_faster_and_explains_it() -> None:
    model = deep_llama()
    budget = int(0.75 * weights_bytes(model))
    with offload(model, HOST, transport="auto", gpu_budget=budget) as handle:
        found = handle.explain()
        assert found.packed_resident
        assert "codec.json" in found.packing_basis
        raw = found.other_transport
        assert raw is not None
        assert raw.transport == "raw"
        assert raw.forward_ms > found.prediction.forward_ms
        assert "resident, packed" in str(found)
        assert all(change.device_bytes > 0 for change in found.changes)
    with offload(model, HOST, gpu_budget=budget) as handle:
        assert set(ways_of(handle)) <= {"resident", "raw"}
        found = handle.explain()
        auto = found.other_transport
        assert auto is not None
        assert auto.transport == "auto"
        assert auto.forward_ms < found.prediction.forward_ms
        assert "with 'auto'" in str(found)


def test_auto_without_a_budget_streams_packed() -> None:
    model = deep_llama()
    expected = expected_of(model)
    with offload(model, HOST, transport="auto", gpu_budget=None) as handle:
        assert_equal(run(model), expected)
        assert set(ways_of(handle)) == {"packed"}
        assert handle.explain().device_bytes == handle.stats.device_bytes


def test_auto_of_weights_that_do_not_pack_is_the_raw_plan() -> None:
    model = packable_llama(num_hidden_layers=6).float()
    expected = expected_of(model)
    budget = weights_bytes(model) // 2
    with offload(model, HOST, gpu_budget=budget) as handle:
        places = [unit.place for unit in handle.units]
    with offload(model, HOST, transport="auto", gpu_budget=budget) as handle:
        assert_equal(run(model), expected)
        assert [unit.place for unit in handle.units] == places
        assert handle.stats.staging_bytes + handle.stats.packed_bytes == 0


def test_replanning_keeps_bits_and_budgets() -> None:
    model = deep_llama()
    expected = expected_of(model)
    whole = weights_bytes(model)
    with offload(model, HOST, transport="auto", gpu_budget=whole) as handle:
        seen = set()
        for percent in (120, 80, 60, 40, 75, 90):
            handle.replan(gpu_budget=whole * percent // 100)
            assert_equal(run(model), expected)
            assert (
                handle.explain().device_bytes == handle.stats.device_bytes <= whole * percent // 100
            )
            seen.update(ways_of(handle))
        assert {"packed_resident", "resident"} <= seen


def test_weights_that_pack_worse_once_they_are_edited_keep_the_budget() -> None:
    model = deep_llama()
    budget = int(0.75 * weights_bytes(model))
    with offload(model, HOST, transport="auto", gpu_budget=budget) as handle:
        run(model)
        edited = next(i for i, unit in enumerate(handle.units) if unit.transport != "raw")
        names = handle.units[edited].parameters
        with torch.no_grad():
            for name in names:
                _many_exponents(model.get_parameter(name))
        # Another plan packs anew, by what the unit takes by now.
        for share in (0.8, 0.75):
            handle.replan(gpu_budget=int(share * weights_bytes(model)))
            twin = deep_llama()
            twin.load_state_dict(model.state_dict())
            assert_equal(run(model), run(twin))
            assert handle.stats.device_bytes <= int(share * weights_bytes(model))
        unit = handle.units[edited]
        assert unit.transport == "raw"
        assert unit.name not in (*handle.explain().packed, *handle.explain().packed_resident)


# --- measured times ------------------------------------------------------------------------------


@pytest.fixture
def profiled() -> Iterator[tuple[Any, Handle, Any]]:
    model = deep_llama()
    budget = int(0.5 * weights_bytes(model))
    with offload(model, HOST, transport="auto", gpu_budget=budget) as handle:
        run(model)
        with handle.profile() as profiler:
            run(model)
            run(model)
        yield model, handle, profiler.result


def test_profile_knows_every_unit_resident_ones_too(profiled: tuple[Any, Handle, Any]) -> None:
    _, handle, profile = profiled
    times = measured_times(profile)
    names = [unit.name for unit in handle.units]
    assert set(times.compute_ns) == set(names)
    assert all(ns > 0 for ns in times.compute_ns.values())
    assert all(ns > 0 for ns in times.copy_ns.values())


def test_profile_of_packed_units_counts_what_was_copied(tmp_path: Path) -> None:
    model = deep_llama()
    with offload(model, HOST, transport="packed", gpu_budget=None) as handle:
        run(model)
        before = handle.stats.bytes_copied
        with handle.profile() as profiler:
            run(model)
            run(model)
        copied = handle.stats.bytes_copied - before
    profile = profiler.result
    assert copied <= profile.streamed_bytes <= 1.05 * copied + 2**12
    assert all(unit.copied_bytes < unit.size_bytes for unit in profile.units)
    profile.save(tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile


def test_replan_by_a_profile_keeps_bits_and_the_budget(
    profiled: tuple[Any, Handle, Any],
) -> None:
    model, handle, profile = profiled
    expected = run(model)
    budget = int(0.5 * weights_bytes(model))
    for given in (profile, None):
        handle.replan(profile=given)
        assert_equal(run(model), expected)
        assert handle.stats.device_bytes <= budget


@pytest.mark.parametrize("transport", ["raw", "packed"])
def test_plans_that_come_again_need_no_more_events(transport: Any) -> None:
    model = deep_llama()
    expected = expected_of(model)
    budgets = [int(share * weights_bytes(model)) for share in (0.5, 0.9)]
    devices = Devices()
    with (
        devices_made_by(devices),
        offload(model, HOST, transport=transport, gpu_budget=budgets[-1]) as handle,
    ):
        held = []
        for _ in range(3):
            for budget in budgets:
                handle.replan(gpu_budget=budget)
                assert_equal(run(model), expected)
            held.append(devices.held().events)
        assert held == held[:1] * 3


def test_replan_goes_by_measured_times_until_told_otherwise(
    profiled: tuple[Any, Handle, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_offload import planning

    _, handle, profile = profiled
    asked: list[Any] = []
    choose = planning.choose
    monkeypatch.setattr(
        planning, "choose", lambda *a, **k: asked.append(k["times"]) or choose(*a, **k)
    )
    handle.replan()
    assert asked[-1] is not None
    assert list(asked[-1].compute_ns) == list(measured_times(profile).compute_ns.values())
    handle.replan(profile=None)
    assert asked[-1] is None
    handle.replan()
    assert asked[-1] is None, "it stays forgotten"
    handle.replan(profile=profile)
    assert asked[-1] is not None


def test_profile_of_another_model_is_refused_and_changes_nothing(
    profiled: tuple[Any, Handle, Any],
) -> None:
    _, _, profile = profiled
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64)) for _ in range(4)))
    with offload(model, HOST, gpu_budget=None) as handle:
        plan = handle.units
        with pytest.raises(ValueError, match="profile with times for every unit"):
            handle.replan(profile=profile, gpu_budget=2**20)
        assert [unit.place for unit in handle.units] == [unit.place for unit in plan]
