"""What others see of an offloaded model: state, signature, device, reports; and the way back."""

from __future__ import annotations

import gc
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    IDLE_WARNING,
    assert_equal,
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)


def test_forward_signature_and_outputs_are_untouched(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    with streamed(model, device) as handle:
        assert inspect.signature(model.forward) == inspect.signature(plain.forward)
        assert "forward" not in vars(model)
        assert_streams_like_plain(
            model,
            plain,
            handle,
            lambda m: m(ids, output_hidden_states=True, use_cache=False),
            forwards=3,
        )
        with torch.no_grad():
            assert isinstance(model(input_ids=ids, return_dict=False, use_cache=False), tuple)


@torch.no_grad()
def test_outputs_pickle_after_the_model_is_gone(device: torch.device) -> None:
    model = tiny_llama()
    ids = tokens(device)
    with streamed(model, device):
        output = model(ids, use_cache=False)
    del model
    gc.collect()
    again = pickle.loads(pickle.dumps(output))
    assert_equal(again, output)


def test_state_dict_equals_plain_and_saves_its_own_bytes_only(device: torch.device) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = tokens(device)
    with streamed(model, device) as handle, torch.no_grad():
        with expect.watch(handle) as calls:
            model(ids)
        expect.assert_streams_exactly(calls)
        state = model.state_dict()
        assert list(state) == list(before)
        for name, value in before.items():
            assert torch.equal(state[name].cpu(), value), name
        name = "model.layers.1.mlp.up_proj.weight"
        assert state[name].untyped_storage().nbytes() == state[name].nbytes
        file = io.BytesIO()
        torch.save(state[name], file)
        assert file.tell() < state[name].nbytes + 2048
        file = io.BytesIO()
        torch.save(state, file)
        assert file.tell() < sum(value.nbytes for value in before.values()) + 32 * 2**10


@torch.no_grad()
def test_save_pretrained_gives_the_same_files(device: torch.device, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "plain")
    with streamed(model, device) as handle:
        with expect.watch(handle) as calls:
            model(tokens(device))
        expect.assert_streams_exactly(calls)
        model.save_pretrained(tmp_path / "streamed")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "streamed" / name
        ).read_bytes()


def test_named_parameters_are_the_same_objects(device: torch.device) -> None:
    model = tiny_llama()
    before = dict(model.named_parameters())
    with streamed(model, device) as handle, torch.no_grad():
        model(tokens(device))
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        streamed_names = {name for unit in handle.units for name in unit.parameters}
        assert streamed_names
        for name in streamed_names:
            assert after[name].device.type == "cpu"
            assert isinstance(after[name], nn.Parameter)
        others = after.keys() - streamed_names
        assert {after[name].device for name in others} == {device}
    assert all(dict(model.named_parameters())[name] is before[name] for name in before)


def test_model_device_is_the_execution_device_with_its_index(device: torch.device) -> None:
    model = tiny_llama()
    with streamed(model, device):
        assert model.device == device
        assert model.device.index == device.index
        assert not hasattr(model, "hf_device_map")


@torch.no_grad()
def test_to_the_device_it_is_on_changes_nothing(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    with streamed(model, device) as handle:
        assert model.to(device) is model
        assert model.to(device, torch.float32) is model
        assert model.to(dtype=torch.float32) is model
        assert model.float() is model
        assert model.model.to(device) is model.model
        assert model.model.layers[0].to(device) is model.model.layers[0]
        expect.assert_at_rest(handle)
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids, use_cache=False))


@torch.no_grad()
def test_train_eval_and_requires_grad_work(device: torch.device) -> None:
    model = tiny_llama(attention_dropout=0.0)
    plain = plain_on(model, device)
    ids = tokens(device)
    with streamed(model, device) as handle:
        assert model.train() is model
        assert model.eval() is model
        assert model.requires_grad_(False) is model
        model.zero_grad()
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids, use_cache=False))


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
def test_remove_gives_the_plain_model_back(device: torch.device, granularity: Any) -> None:
    model = tiny_llama()
    before = expect.snapshot(model)
    ids = tokens(device)
    handle = torch_offload.offload(model, device, granularity=granularity, depth=0)
    with torch.no_grad():
        model(ids)
        model(ids)
    assert handle.stats.onloads > 0
    handle.remove()
    expect.assert_unchanged(model, before, same_memory=False)
    assert handle.is_removed
    assert torch_offload.handle_of(model) is None
    for parameter in model.parameters():
        assert not parameter.is_pinned()
    handle.remove()  # does nothing
    expect.assert_unchanged(model, expect.snapshot(model))


def test_remove_model_can_be_offloaded_again(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    for _ in range(3):
        with streamed(model, device) as handle:
            assert_streams_like_plain(model, plain, handle, lambda m: m(x))


def test_remove_during_a_forward_fails(device: torch.device) -> None:
    model = tiny_stack()
    x = rows(device)
    with streamed(model, device) as handle, torch.no_grad():
        must = model(x)
        hook = model.blocks[1].register_forward_pre_hook(lambda *_: handle.remove())
        with pytest.raises(torch_offload.StateError, match=r"expected remove\(\)"):
            model(x)
        hook.remove()
        hook = model.blocks[1].register_forward_pre_hook(lambda *_: handle.refresh())
        with pytest.raises(torch_offload.StateError, match=r"expected refresh\(\)"):
            model(x)
        hook.remove()
        expect.assert_at_rest(handle)
        assert torch.equal(model(x), must)


def test_context_manager_removes_after_an_exception(device: torch.device) -> None:
    model = tiny_stack()
    before = expect.snapshot(model)
    with pytest.raises(ZeroDivisionError), torch_offload.offload(model, device):
        raise ZeroDivisionError
    expect.assert_unchanged(model, before, same_memory=False)


def test_handle_stats_units_and_repr_tell_what_is_there(device: torch.device) -> None:
    model = tiny_stack(4)
    x = rows(device)
    with streamed(model, device) as handle, torch.no_grad():
        assert torch_offload.handle_of(model) is handle
        assert torch_offload.handle_of(model.blocks) is None
        assert handle.model is model
        assert handle.device == device
        assert [unit.name for unit in handle.units] == [
            f"blocks.{index}.{half}" for index in range(4) for half in ("attn", "mlp")
        ]
        assert [unit.layer_index for unit in handle.units] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert {unit.kind for unit in handle.units} == {"mha", "ffn"}
        for unit in handle.units:
            assert unit.place is not None
            assert unit.place[1] - unit.place[0] == unit.size_bytes
            assert unit.place[1] <= handle.stats.window_bytes
            owned = [model.get_parameter(name) for name in unit.parameters]
            assert unit.size_bytes == sum((p.nbytes + 255) // 256 * 256 for p in owned)
        outside = [p for name, p in model.named_parameters() if name.startswith("embed")]
        assert handle.stats.bytes_resident == sum(p.nbytes for p in outside)
        with expect.watch(handle) as calls:
            model(x)
            model(x)
        expect.assert_streams_exactly(calls)
        stats = handle.stats
        assert stats.forwards == 2
        assert stats.onloads == stats.misses + stats.prefetched
        assert stats.onloads == sum(unit.onloads for unit in handle.units)
        assert stats.misses == sum(unit.misses for unit in handle.units) == 1
        assert [unit.acquired for unit in handle.units] == [2] * 8
        assert 0 < stats.cpu_seconds < 10
        least = sum(unit.size_bytes for unit in handle.units)
        assert least <= stats.host_bytes <= least + 2 * 4096
        text = repr(handle)
        assert "Stack" in text
        assert "8 units" in text
        assert str(device) in text
    assert "removed" in repr(handle)
    with pytest.raises(torch_offload.StateError, match="live handle"):
        _ = handle.stats


@pytest.mark.parametrize("granularity", ["sublayer", "module"])
def test_units_that_the_first_forward_leaves_out_are_named_once(
    device: torch.device, granularity: Any
) -> None:
    model = tiny_stack(6)
    x = rows(device)
    with streamed(model, device, granularity=granularity), torch.no_grad():
        model.blocks[5](x)  # a part alone says nothing of the others
        model.sequence = [0, 2]
        with pytest.warns(UserWarning, match="called 6 of 12 units") as caught:
            model(x)
        (warning,) = caught
        assert warning.filename == __file__
        text = str(warning.message)
        assert "'blocks.1.attn', 'blocks.1.mlp', 'blocks.3.attn', 'blocks.3.mlp'" in text
        assert "blocks.5" not in text
        model.sequence = [0]
        model(x)
    with streamed(model, device, granularity=granularity), torch.no_grad():
        model.sequence = list(range(6))
        model(x)
        model.sequence = [0]
        model(x)  # the first one called them all


@pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")
def test_report_names_units_that_never_ran(device: torch.device) -> None:
    model = tiny_stack(4)
    model.sequence = [0, 1, 3]
    with streamed(model, device) as handle, torch.no_grad():
        console = Console(file=io.StringIO(), width=200)
        handle.report(console)
        assert "never ran" not in console.file.getvalue()  # type: ignore[attr-defined]
        model(rows(device))
        handle.report(console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "blocks.0.attn" in text
        assert "never ran: blocks.2.attn, blocks.2.mlp" in text


def test_resident_stays_on_the_device_and_is_not_copied(device: torch.device) -> None:
    model = tiny_stack(4)
    plain = plain_on(model, device)
    x = rows(device)
    options = {"resident": ["blocks.1.attn", "blocks.2.mlp.up.*"]}
    with streamed(model, device, **options) as handle:
        names = {name for unit in handle.units for name in unit.parameters}
        assert "blocks.2.mlp.down.weight" in names
        assert not any(name.startswith(("blocks.1.attn", "blocks.2.mlp.up")) for name in names)
        assert model.blocks[1].attn.weight.device == device
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)


def test_gpu_budget_keeps_units_resident(device: torch.device) -> None:
    model = tiny_stack(6)
    plain = plain_on(model, device)
    x = rows(device)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    with streamed(model, device, gpu_budget=whole * 3 // 4, depth=None) as handle:
        stats = handle.stats
        assert stats.bytes_resident + stats.window_bytes <= whole * 3 // 4
        kept = [unit for unit in handle.units if unit.place is None]
        assert kept
        assert len(kept) < len(handle.units)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)
