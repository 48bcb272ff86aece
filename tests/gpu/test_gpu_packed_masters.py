"""Packed masters and kept blobs on a GPU: copied from page-locked memory, decoded by the kernel."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.python.dropin import assert_equal, logits, packable_llama, plain_on, raising
from torch_offload import _C, Handle, offload
from torch_offload.packed_parameter import PackedParameter

pytestmark = [
    pytest.mark.needs_cuda,
    pytest.mark.skipif(not _C.has_kernels, reason="a build without nvcc has no decoder for GPUs"),
]


@contextmanager
def packed(model: nn.Module, device: torch.device, **options: Any) -> Iterator[Handle]:
    options = {"transport": "packed", "masters": "packed", "depth": 0} | options
    with offload(model, device, **options) as handle:
        yield handle


def assert_packed(handle: Handle) -> None:
    model = handle.model
    assert model is not None
    names = [name for unit in handle.units if unit.place for name in unit.parameters]
    assert names
    for name in names:
        assert isinstance(model.get_parameter(name), PackedParameter), name


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
@pytest.mark.parametrize("streams", ["shared", "split"])
@pytest.mark.parametrize("mode", ["streams", "events", "pipeline"])
def test_forward_is_equal_and_leaves_packed_parameters(
    device: torch.device, mode: Any, streams: Any, granularity: Any
) -> None:
    model = packable_llama()
    expected = logits(plain_on(model, device), device)
    with packed(model, device, mode=mode, streams=streams, granularity=granularity) as handle:
        for _ in range(3):
            assert_equal(logits(model, device), expected)
            assert_packed(handle)
    assert_equal(logits(model.to(device), device), expected)


def test_locked_bytes_are_072_of_realistic_weights(device: torch.device) -> None:
    model = packable_llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    expected = logits(plain_on(model, device), device)
    with packed(model, device) as handle:
        weights = sum(unit.size_bytes for unit in handle.units if unit.place is not None)
        assert handle.stats.host_bytes / weights <= 0.72
        assert_equal(logits(model, device), expected)


def test_weight_used_outside_its_unit_is_the_device_error(device: torch.device) -> None:
    model = packable_llama()
    with packed(model, device) as handle, torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        assert weight.device.type == "cpu"
        x = torch.ones(1, weight.shape[1], device=device).bfloat16()
        with pytest.raises(RuntimeError, match="device"):
            nn.functional.linear(x, weight)
        assert_equal(logits(model, device), logits(plain_on(_twin(model), device), device))
        gc.collect()
        handle.refresh()
        assert_packed(handle)


def _twin(model: nn.Module) -> Any:
    twin = packable_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            twin.get_parameter(name).copy_(parameter.clone())
    return twin


def test_edits_of_any_size_are_seen(device: torch.device) -> None:
    model = packable_llama()
    with packed(model, device, depth=None) as handle:
        logits(model, device)
        for value in (3.0, 4.0):
            model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
            model.model.layers[0].mlp.up_proj.weight.data *= 1.5
            with handle.record():
                got = logits(model, device)
            assert handle.check() == []
            assert_equal(got, logits(plain_on(_twin(model), device), device))
        gc.collect()
        handle.refresh()
        assert_packed(handle)


def test_interrupted_forward_leaves_packed_parameters(device: torch.device) -> None:
    model = packable_llama()
    expected = logits(plain_on(model, device), device)
    with packed(model, device) as handle:
        hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            raising(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            logits(model, device)
        hook.remove()
        assert_packed(handle)
        assert_equal(logits(model, device), expected)


def test_forward_allocates_what_the_plain_model_does(device: torch.device) -> None:
    model = packable_llama()
    plain = plain_on(model, device)
    with packed(model, device):
        counts = []
        for one in (plain, model):
            for _ in range(2):
                logits(one, device)
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
            logits(one, device)
            counts.append(torch.cuda.memory_stats(device)["allocation.all.allocated"] - before)
    assert counts[0] == counts[1]


def test_model_on_the_gpu_comes_from_there_and_goes_back(device: torch.device) -> None:
    model = packable_llama().to(device)
    expected = logits(model, device)
    with packed(model, device) as handle:
        assert_packed(handle)
        assert_equal(logits(model, device), expected)
    assert {parameter.device for parameter in model.parameters()} == {device}
    assert_equal(logits(model, device), expected)


def test_budgets_move_weights_both_ways(device: torch.device) -> None:
    model = packable_llama()
    expected = logits(plain_on(model, device), device)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with packed(model, device, gpu_budget=size) as handle:
        for budget in (None, size, None):
            handle.replan(gpu_budget=budget)
            assert_equal(logits(model, device), expected)
            assert_packed(handle)


def test_kept_blobs_are_taken(device: torch.device, tmp_path: Path) -> None:
    model = packable_llama()
    expected = logits(plain_on(model, device), device)
    for masters in ("plain", "packed", "plain"):
        with (
            warnings.catch_warnings(),
            packed(model, device, masters=masters, packed_cache=tmp_path),
        ):
            warnings.simplefilter("error")
            assert_equal(logits(model, device), expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_units_that_stay_packed_copy_nothing_and_see_edits(device: torch.device) -> None:
    model = packable_llama()
    expected = logits(plain_on(model, device), device)
    with packed(model, device, transport="packed_resident", depth=None) as handle:
        for _ in range(2):
            assert_equal(logits(model, device), expected)
        before = handle.stats.bytes_copied
        assert_equal(logits(model, device), expected)
        assert handle.stats.bytes_copied == before
        assert_packed(handle)
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 3.0
        with handle.record():
            got = logits(model, device)
        assert handle.check() == []
        assert handle.stats.bytes_copied > before
        assert_equal(got, logits(plain_on(_twin(model), device), device))
        gc.collect()
        handle.refresh()
        assert_packed(handle)
        assert {unit.transport for unit in handle.units if unit.place} == {"packed_resident"}


def test_blobs_that_stay_on_the_device_are_kept_as_those_that_travel(
    device: torch.device, tmp_path: Path
) -> None:
    model = packable_llama()
    expected = logits(plain_on(model, device), device)
    for masters, transport in (
        ("plain", "packed_resident"),
        ("packed", "packed_resident"),
        ("plain", "packed"),
    ):
        with (
            warnings.catch_warnings(),
            packed(model, device, masters=masters, transport=transport, packed_cache=tmp_path),
        ):
            warnings.simplefilter("error")  # as it does of a blob that is damaged or another's
            assert_equal(logits(model, device), expected)
    assert len(list(tmp_path.iterdir())) == 1


def _by_data(model: nn.Module, name: str, value: torch.Tensor) -> None:
    model.get_parameter(name).data = value


def _by_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, nn.Parameter(value))


def _by_state_dict(model: nn.Module, name: str, value: torch.Tensor) -> None:
    model.load_state_dict({name: value}, strict=False, assign=True)


@pytest.mark.parametrize("edit", [_by_data, _by_parameter, _by_state_dict])
@pytest.mark.parametrize("masters", ["plain", "packed"])
def test_weight_replaced_by_one_on_the_gpu_is_used_and_given_back(
    device: torch.device, masters: Any, edit: Any
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = packable_llama()
    plain = plain_on(model, device)
    with packed(model, device, masters=masters):
        logits(model, device)
        value = torch.full_like(plain.get_parameter(name), 0.125)
        edit(model, name, value)
        with torch.no_grad():
            plain.get_parameter(name).copy_(value)
        expected = logits(plain, device)
        for _ in range(2):
            assert_equal(logits(model, device), expected)
    assert torch.equal(model.get_parameter(name).cpu(), value.cpu())
