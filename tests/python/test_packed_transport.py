"""Units that travel packed: the plain model's bits, exactly counted bytes, and edits seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import assert_equal, plain_on
from tests.python.dropin import logits as run
from tests.python.dropin import packable_llama as llama
from torch_offload import _C, Config, offload
from torch_offload.offload import offload_with
from torch_offload.packing import MAX_SHARE
from torch_offload.transport import packing_for

HOST = torch.device("cpu")
# Large enough that packing pays for every unit, small enough for a second.
LAYOUTS = [
    ("sync", "shared"),
    ("streams", "shared"),
    ("streams", "split"),
    ("events", "shared"),
    ("events", "split"),
    ("pipeline", "shared"),
    ("pipeline", "split"),
]


def expected_of(model: nn.Module) -> torch.Tensor:
    return run(plain_on(model, HOST))


def expected_now(model: nn.Module) -> torch.Tensor:
    """Of an offloaded model, by a plain twin that gets its weights."""
    twin = llama()
    twin.load_state_dict(model.state_dict())
    return run(twin)


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
@pytest.mark.parametrize(("mode", "streams"), LAYOUTS)
def test_packed_forward_is_equal_and_copies_packed_bytes(
    mode: Any, streams: Any, granularity: Any
) -> None:
    model = llama()
    expected = expected_of(model)
    with offload(
        model, HOST, mode=mode, streams=streams, granularity=granularity, transport="packed"
    ) as handle:
        for _ in range(3):
            assert_equal(run(model), expected)
            expect.assert_at_rest(handle)
        units = [unit for unit in handle.units if unit.place is not None]
        assert all(unit.copied_bytes < MAX_SHARE * unit.size_bytes for unit in units)
        if granularity != "module":  # the first pass is another plan's there
            assert handle.stats.bytes_copied == sum(u.copied_bytes * u.onloads for u in units)
            assert handle.stats.bytes_onloaded == sum(u.size_bytes * u.onloads for u in units)
        assert 0 < handle.stats.bytes_copied < MAX_SHARE * handle.stats.bytes_onloaded
        assert handle.stats.staging_bytes > 0
    assert_equal(run(model), expected)


def test_packed_run_has_no_hazard_and_decodes_every_copy() -> None:
    model = llama()
    with offload(model, HOST, transport="packed", depth=0) as handle:
        run(model)
        with handle.record(times=True) as log:
            run(model)
            run(model)
        assert handle.check() == []
        kinds = [op.kind for op in log.ops]
        assert kinds.count("copy") == kinds.count("decode") > 0
        trace = handle.trace()
        assert [row.name for row in trace.rows if row.kind == "decode"] == ["weight_decode"]
        assert len(trace.of_kind("decode")) == kinds.count("decode")


def test_packed_debug_run_is_equal() -> None:
    model = llama()
    expected = expected_of(model)
    with offload(model, HOST, transport="packed", debug=True) as handle:
        assert_equal(run(model), expected)
        assert_equal(run(model), expected)
        assert handle.check() == []


def test_weights_that_packing_would_not_shrink_travel_raw() -> None:
    model = llama().float()
    expected = expected_of(model)
    with offload(model, HOST, transport="packed") as handle:
        assert_equal(run(model), expected)
        assert handle.stats.bytes_copied == handle.stats.bytes_onloaded > 0
        assert handle.stats.staging_bytes == 0


def _many_exponents(weight: torch.Tensor) -> None:
    """Small numbers, the exponents of which no palette holds."""
    bits = torch.randint(0, 118 << 7, weight.shape, dtype=torch.int16)
    weight.copy_(bits.view(torch.bfloat16))


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
@pytest.mark.parametrize("transport", ["packed", "packed_resident"])
def test_packed_copies_are_given_back_once_no_unit_is_packed(transport: Any) -> None:
    model = llama()
    with offload(model, HOST) as handle:
        raw_bytes = handle.stats.host_bytes
    with offload(model, HOST, transport=transport) as handle:
        assert handle.stats.host_bytes > raw_bytes
        run(model)
        with torch.no_grad():
            for unit in handle.units:
                for name in unit.parameters if unit.place else ():
                    _many_exponents(model.get_parameter(name))
        expected = expected_now(model)
        assert_equal(run(model), expected)
        assert {unit.transport for unit in handle.units} == {"raw"}
        assert handle.stats.host_bytes == raw_bytes
        assert_equal(run(model), expected)
    assert_equal(run(model), expected)


def test_units_of_both_sorts_travel_each_in_its_way() -> None:
    model = llama()
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            _many_exponents(parameter)
    expected = expected_of(model)
    with offload(model, HOST, transport="packed") as handle:
        assert_equal(run(model), expected)
        assert_equal(run(model), expected)
        raw = [unit.name for unit in handle.units if unit.copied_bytes == unit.size_bytes]
        assert raw == ["model.layers.1.mlp"]


# --- edits ---------------------------------------------------------------------------------------


def _in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def _by_data(weight: nn.Parameter) -> None:
    weight.data += 0.25


def _by_data_replaced(weight: nn.Parameter) -> None:
    weight.data = weight.data.flip(0).contiguous()


def _beyond_packing(weight: nn.Parameter) -> None:
    with torch.no_grad():
        _many_exponents(weight)


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
@pytest.mark.parametrize("depth", [None, "1GiB"])
@pytest.mark.parametrize("edit", [_in_place, _by_data, _by_data_replaced, _beyond_packing])
def test_edit_between_forwards_is_seen(
    edit: Callable[[nn.Parameter], None], depth: str | None
) -> None:
    model = llama()
    with offload(model, HOST, transport="packed", depth=depth) as handle:
        run(model)
        for layer in (1, 0):
            weight = model.model.layers[layer].mlp.up_proj.weight
            before = weight.detach().clone()
            edit(weight)
            assert not torch.equal(weight, before)
            with handle.record():
                got = run(model)
            assert handle.check() == []
            assert_equal(got, expected_now(model))
            assert_equal(run(model), got)
    assert_equal(run(model), got)


def test_edit_of_one_element_is_seen_after_refresh() -> None:
    model = llama()
    with offload(model, HOST, transport="packed") as handle:
        run(model)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data[3, 5] = 7.0
        handle.refresh()
        assert_equal(run(model), expected_now(model))


def test_state_dict_of_a_packed_model_is_the_plain_one() -> None:
    model = llama()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with offload(model, HOST, transport="packed"):
        run(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, plain[name]), name
        model.load_state_dict({name: tensor * 0.5 for name, tensor in plain.items()})
        assert_equal(run(model), expected_now(model))


# --- budgets, choices, failures ------------------------------------------------------------------


def test_staging_ring_counts_in_the_budget() -> None:
    model = llama()
    expected = expected_of(model)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with offload(model, HOST, transport="packed", gpu_budget=int(0.9 * size)) as handle:
        assert_equal(run(model), expected)
        stats = handle.stats
        packed = stats.staging_bytes + stats.packed_bytes
        assert packed > 0
        assert stats.bytes_resident + stats.window_bytes + packed <= 0.9 * size
        handle.replan(gpu_budget=None)
        assert_equal(run(model), expected)
        assert all(unit.copied_bytes < unit.size_bytes for unit in handle.units)


def test_packed_without_kernels_fails_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_C, "has_kernels", False)
    auto = packing_for(Config(transport="auto"), torch.device("cuda", 0))
    assert auto.transport == "raw"
    assert "no decoder for GPUs" in auto.basis
    with pytest.raises(NotImplementedError, match="transport='raw'"):
        packing_for(Config(transport="packed"), torch.device("cuda", 0))


def test_unknown_transport_fails() -> None:
    with pytest.raises(ValueError, match="transport"):
        offload_with(llama(), HOST, Config(transport="zip"))  # type: ignore[arg-type]


def test_packed_masters_without_host_memory_leave_the_model_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    expected = expected_of(model)

    def refuse(needed: int, reserve: int) -> None:
        raise MemoryError(f"{needed}")

    with offload(model, HOST) as handle:
        raw = handle.stats.host_bytes
    asked = []
    monkeypatch.setattr(_C, "check_host_memory", lambda needed, reserve: asked.append(needed))
    with offload(model, HOST, transport="packed"):
        pass
    assert asked[0] > 0.6 * raw
    monkeypatch.setattr(_C, "check_host_memory", refuse)
    with pytest.raises(MemoryError):
        offload(model, HOST, transport="packed")
    assert torch_offload.handle_of(model) is None
    assert_equal(run(model), expected)
