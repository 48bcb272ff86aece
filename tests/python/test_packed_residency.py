"""Units that stay packed on the device: the plain model's bits, no copies, all bytes counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import assert_equal
from tests.python.test_packed_transport import (
    HOST,
    LAYOUTS,
    _beyond_packing,
    _by_data,
    _by_data_replaced,
    _in_place,
    expected_now,
    expected_of,
    llama,
    run,
)
from torch_offload import Config, Handle, offload
from torch_offload.offload import offload_with
from torch_offload.packing import MAX_SHARE


def deep_llama() -> Any:
    """Layers enough that their places are used in turn."""
    return llama(num_hidden_layers=6)


def weights_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def device_bytes(handle: Handle) -> int:
    stats = handle.stats
    return stats.bytes_resident + stats.window_bytes + stats.staging_bytes + stats.packed_bytes


def transports_of(handle: Handle) -> list[str]:
    """By unit; "resident" for one that stays as it is."""
    return ["resident" if unit.place is None else unit.transport for unit in handle.units]


def copied_in(handle: Handle, forward: Callable[[], object]) -> tuple[int, int]:
    """Bytes copied and onloads."""
    before = handle.stats
    forward()
    after = handle.stats
    return after.bytes_copied - before.bytes_copied, after.onloads - before.onloads


class _RoomyDevice:
    """Memory of a device on which everything fits at all times."""

    total_bytes = 80 * 2**30

    def available_bytes(self) -> int:
        return 40 * 2**30

    def allocated_bytes(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 2**20

    def reset_peak(self) -> None: ...


@pytest.mark.parametrize("masters", ["plain", "packed"])
@pytest.mark.parametrize("transport", ["packed", "packed_resident"])
def test_forwards_of_other_lengths_pack_nothing_that_lies_as_planned(
    monkeypatch: pytest.MonkeyPatch, transport: Any, masters: Any
) -> None:
    packed: list[list[str]] = []
    pack = torch_offload._C.Engine.pack

    def watched(engine: Any, *args: Any) -> Any:
        packed.append(list(engine.plan.transports))
        return pack(engine, *args)

    monkeypatch.setattr(torch_offload._C.Engine, "pack", watched)
    config = Config(transport=transport, masters=masters)
    model = deep_llama()
    with offload_with(model, HOST, config, _RoomyDevice()), torch.inference_mode():
        model(torch.full((1, 1), 5))  # shows how much may stay
        at_first = len(packed)
        for length in (2, 4, 8, 16, 1):
            model(torch.full((1, length), 5))
    assert 1 <= at_first == len(packed)


# --- everything stays ----------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
@pytest.mark.parametrize(("mode", "streams"), LAYOUTS)
def test_all_packed_and_resident_forward_is_equal_and_copies_nothing(
    mode: Any, streams: Any, granularity: Any
) -> None:
    model = deep_llama()
    expected = expected_of(model)
    with offload(
        model,
        HOST,
        mode=mode,
        streams=streams,
        granularity=granularity,
        transport="packed_resident",
    ) as handle:
        assert_equal(run(model), expected)
        for _ in range(2):
            bytes_copied, onloads = copied_in(handle, lambda: assert_equal(run(model), expected))
            assert bytes_copied == 0
            assert 0.5 * len(handle.units) < onloads <= len(handle.units) + 3
            expect.assert_at_rest(handle)
        assert set(transports_of(handle)) == {"packed_resident"}
        assert all(unit.copied_bytes == unit.copies == 0 for unit in handle.units)
        streamed = sum(unit.size_bytes for unit in handle.units)
        assert 0.5 * streamed < handle.stats.packed_bytes < MAX_SHARE * streamed
        assert handle.stats.staging_bytes == 0
        assert handle.stats.window_bytes < streamed
    assert_equal(run(model), expected)


def test_run_has_no_hazard_and_as_many_decoders_as_onloads() -> None:
    model = deep_llama()
    with offload(model, HOST, transport="packed_resident") as handle:
        run(model)
        with handle.record(times=True) as log:
            _, onloads = copied_in(handle, lambda: (run(model), run(model)))
        assert handle.check() == []
        kinds = [op.kind for op in log.ops]
        assert kinds.count("copy") == 0
        assert kinds.count("decode") == onloads > 0
        trace = handle.trace()
        assert [row.name for row in trace.rows if row.kind == "decode"] == [
            "weight_decode_resident"
        ]
        assert len(trace.of_kind("decode")) == onloads
        assert any(
            trace.rows[arrow.from_row].name == "weight_decode_resident" for arrow in trace.arrows
        )


@pytest.mark.parametrize("options", [{"debug": True}, {"poison": True}])
def test_poisoned_places_do_not_show(options: dict[str, bool]) -> None:
    model = deep_llama()
    expected = expected_of(model)
    config = Config(transport="packed_resident", **options)  # type: ignore[arg-type]
    with offload_with(model, HOST, config) as handle:
        for _ in range(3):
            assert_equal(run(model), expected)
        with handle.record():
            run(model)
        assert handle.check() == []


def test_weights_that_packing_would_not_shrink_travel_raw_and_the_handle_says_so() -> None:
    model = llama()
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            _beyond_packing(parameter)
    expected = expected_of(model)
    with offload(model, HOST, transport="packed_resident") as handle:
        assert_equal(run(model), expected)
        assert_equal(run(model), expected)
        raw = [unit.name for unit in handle.units if unit.transport == "raw"]
        assert raw == ["model.layers.1.mlp"]
        assert handle.stats.bytes_copied > 0
    model = llama().float()
    expected = expected_of(model)
    with offload(model, HOST, transport="packed_resident") as handle:
        assert_equal(run(model), expected)
        assert set(transports_of(handle)) == {"raw"}
        assert handle.stats.packed_bytes == 0


# --- within a budget -----------------------------------------------------------------------------


def test_units_travel_and_stay_within_every_budget_to_the_byte() -> None:
    model = deep_llama()
    expected = expected_of(model)
    total = weights_bytes(model)
    seen = set()
    with offload(model, HOST, transport="packed", gpu_budget=total) as handle:
        for percent in (100, 130, 115, 100, 92, 85, 80, 75, 70, 65, 75, 100):
            budget = total * percent // 100
            handle.replan(gpu_budget=budget)
            assert device_bytes(handle) <= budget
            for _ in range(2):
                assert_equal(run(model), expected)
            ways = transports_of(handle)
            seen.update(ways)
            travelling = [unit for unit in handle.units if unit.transport == "packed"]
            bytes_copied, _ = copied_in(handle, lambda: assert_equal(run(model), expected))
            assert (bytes_copied > 0) == bool(travelling)
            assert bytes_copied <= 2 * sum(unit.copied_bytes for unit in travelling)
            with handle.record():
                run(model)
            assert handle.check() == []
        assert seen == {"resident", "packed", "packed_resident"}
        handle.replan(gpu_budget=None)
        assert_equal(run(model), expected)
        assert set(transports_of(handle)) == {"packed"}
        assert handle.stats.packed_bytes == 0
    assert_equal(run(model), expected)


def test_packed_residency_streams_less_than_the_best_raw_plan() -> None:
    model = llama(num_hidden_layers=16)
    budget = int(0.6 * weights_bytes(model))
    copied = {}
    for transport in ("raw", "packed"):
        with offload(model, HOST, transport=transport, gpu_budget=budget) as handle:  # type: ignore[arg-type]
            run(model)
            copied[transport], _ = copied_in(handle, lambda: run(model))
    assert 0 < copied["packed"] < 0.85 * copied["raw"], copied


def test_budget_below_the_packed_weights_fails_and_names_the_least() -> None:
    model = llama()
    expected = expected_of(model)
    with pytest.raises(ValueError, match="all units packed") as caught:
        offload(model, HOST, transport="packed_resident", gpu_budget="1MiB")
    assert torch_offload.handle_of(model) is None
    least = int(str(caught.value).split("at least ")[1].split()[0])
    with offload(model, HOST, transport="packed_resident", gpu_budget=least) as handle:
        assert_equal(run(model), expected)
        assert device_bytes(handle) <= least
        with pytest.raises(ValueError, match="all units packed"):
            handle.replan(gpu_budget=least - 1)
        assert_equal(run(model), expected)
        assert set(transports_of(handle)) == {"packed_resident"}


# --- edits ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
@pytest.mark.parametrize("edit", [_in_place, _by_data, _by_data_replaced, _beyond_packing])
def test_edit_between_forwards_is_seen(edit: Callable[[nn.Parameter], None]) -> None:
    model = llama()
    with offload(model, HOST, transport="packed_resident") as handle:
        run(model)
        for layer in (1, 0):
            weight = model.model.layers[layer].mlp.up_proj.weight
            edit(weight)
            with handle.record():
                got = run(model)
            assert handle.check() == []
            assert_equal(got, expected_now(model))
            assert_equal(run(model), got)
        edited = [handle.units[index].transport for index in (1, 3)]
        assert set(edited) == ({"raw"} if edit is _beyond_packing else {"packed_resident"})
    assert_equal(run(model), got)


def test_edit_of_one_element_is_seen_after_refresh() -> None:
    model = llama()
    with offload(model, HOST, transport="packed_resident") as handle:
        run(model)
        model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 7.0
        handle.refresh()
        assert_equal(run(model), expected_now(model))
        bytes_copied, _ = copied_in(handle, lambda: run(model))
        assert bytes_copied == 0


def test_state_dict_is_the_plain_one_and_a_loaded_one_is_used() -> None:
    model = llama()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with offload(model, HOST, transport="packed_resident"):
        run(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, plain[name]), name
        model.load_state_dict({name: tensor * 0.5 for name, tensor in plain.items()})
        assert_equal(run(model), expected_now(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain[name] * 0.5), name


def test_an_edit_is_uploaded_once() -> None:
    model = llama()
    with offload(model, HOST, transport="packed_resident") as handle:
        run(model)
        _in_place(model.model.layers[0].mlp.up_proj.weight)
        first, _ = copied_in(handle, lambda: run(model))
        again, _ = copied_in(handle, lambda: run(model))
        size = next(u.size_bytes for u in handle.units if u.name == "model.layers.0.mlp")
        assert 0 < first < MAX_SHARE * size
        assert again == 0
