"""Weights streamed to a GPU from the page cache: locked read-only, in place, by real copies."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_offload
from tests.python.checkpoints import (
    assert_streams_the_same,
    bytes_in_files,
    handle_of,
    load,
    load_plain,
    save_llama,
    streamed_bytes,
)
from tests.python.dropin import assert_equal, tokens

pytestmark = pytest.mark.needs_cuda


def _inputs(device: torch.device) -> dict[str, Any]:
    return {"input_ids": tokens(device)}


def _load(folder: Path, device: torch.device, **options: Any) -> tuple[Any, Any]:
    source = save_llama(folder)
    return load(type(source), folder, device, **options), load_plain(type(source), folder, device)


def test_pages_are_locked_read_only_and_unlocked_at_the_end(
    tmp_path: Path, device: torch.device
) -> None:
    model, plain = _load(tmp_path, device)
    handle = handle_of(model)
    assert bytes_in_files(handle) == streamed_bytes(handle)
    assert_streams_the_same(model, plain, _inputs(device))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size <= handle.stats.host_bytes < size + 4096
    handle.remove()
    again = load(type(model), tmp_path, device)
    assert bytes_in_files(handle_of(again)) == streamed_bytes(handle_of(again))


def test_two_handles_lock_the_same_file(tmp_path: Path, device: torch.device) -> None:
    first, plain = _load(tmp_path, device)
    second = load(type(first), tmp_path, device)
    for model in (first, second, first):
        assert_streams_the_same(model, plain, _inputs(device))


@pytest.mark.parametrize("streams", ["shared", "split"])
@pytest.mark.parametrize("mode", ["streams", "events", "pipeline"])
def test_modes_and_layouts_stream_from_files(
    tmp_path: Path, device: torch.device, mode: str, streams: str
) -> None:
    model, plain = _load(tmp_path, device, mode=mode, streams=streams)
    assert_streams_the_same(model, plain, _inputs(device), passes=3)


def test_edited_weight_is_locked_where_it_lies(tmp_path: Path, device: torch.device) -> None:
    model, plain = _load(tmp_path, device)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    before = weight.data_ptr()
    assert not weight.is_pinned()
    with torch.no_grad():
        weight.mul_(2)
        plain.get_parameter(name).mul_(2)
    # What was on its way from the file when the edit is noticed is copied once more.
    with torch.inference_mode():
        assert_equal(model(**_inputs(device)), plain(**_inputs(device)))
    assert_streams_the_same(model, plain, _inputs(device))
    assert weight.data_ptr() == before
    assert weight.is_pinned()
    handle_of(model).remove()
    assert not weight.is_pinned()
    assert torch.equal(weight, plain.get_parameter(name).cpu())


def test_forward_from_files_allocates_nothing_of_ours(tmp_path: Path, device: torch.device) -> None:
    model, plain = _load(tmp_path, device)
    inputs = _inputs(device)
    with torch.inference_mode():
        for _ in range(2):
            model(**inputs)
        torch.cuda.synchronize(device)
        counts = []
        for one in (plain, model):
            before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
            one(**inputs)
            counts.append(torch.cuda.memory_stats(device)["allocation.all.allocated"] - before)
    assert counts[0] == counts[1]


def test_delayed_copies_are_waited_for(tmp_path: Path, device: torch.device) -> None:
    model, plain = _load(tmp_path, device)
    copies = next(iter(handle_of(model).streams.values()))
    with torch.inference_mode():
        expected = plain(**_inputs(device))
        for _ in range(3):
            with torch.cuda.stream(copies):
                torch.cuda._sleep(20_000_000)
            assert_equal(model(**_inputs(device)), expected)


def test_deleting_the_model_unlocks_its_files(tmp_path: Path, device: torch.device) -> None:
    model, plain = _load(tmp_path, device)
    assert_streams_the_same(model, plain, _inputs(device))
    gc.collect()
    gc.disable()
    try:
        del model
        again = load(type(plain), tmp_path, device, masters="mmap")
        assert torch_offload.handle_of(again) is not None
    finally:
        gc.enable()
    assert_streams_the_same(again, plain, _inputs(device))
