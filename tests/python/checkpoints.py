"""Checkpoint folders for tests, and what must hold of models that are streamed from them."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_offload
from tests.python.dropin import assert_equal, tiny_llama
from torch_offload import Handle


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Saves a Llama wide enough to fill pages; returns it."""
    model = tiny_llama(hidden_size=128, intermediate_size=256).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def load(model_class: Any, folder: Path, device: torch.device, **options: Any) -> Any:
    """The offloaded model; transformers' own warnings are none of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        return torch_offload.from_pretrained(model_class, folder, device=device, **options)


def load_plain(model_class: Any, folder: Path, device: torch.device, **options: Any) -> Any:
    """The plain model to compare with."""
    return torch_offload.align(model_class.from_pretrained(folder, **options)).to(device)


def handle_of(model: nn.Module) -> Handle:
    handle = torch_offload.handle_of(model)
    assert handle is not None
    return handle


def streamed_bytes(handle: Handle) -> int:
    """Bytes of the parameters that stream, padding excluded."""
    assert handle.model is not None
    parameters = dict(handle.model.named_parameters(remove_duplicate=False))
    return sum(
        parameters[name].nbytes
        for unit in handle.units
        if unit.place is not None
        for name in unit.parameters
    )


def bytes_in_files(handle: Handle) -> int:
    return sum(unit.bytes_in_files for unit in handle.units)


def assert_streams_the_same(
    model: nn.Module, plain: nn.Module, inputs: dict[str, Any], passes: int = 2
) -> None:
    """Equal bits in every pass, and exactly the copies that the units need."""
    handle = handle_of(model)
    with torch.inference_mode():
        expected = plain(**inputs)
        for _ in range(passes):
            before = handle.stats
            with handle.record() as log:
                assert_equal(model(**inputs), expected)
            onloads = handle.stats.onloads - before.onloads
            copies = Counter(op.unit for op in log.ops if op.kind == "copy")
            units = handle.units
            assert all(copies[unit] % units[unit].copies == 0 for unit in copies)
            counted = sum(copies[unit] // units[unit].copies for unit in copies)
            assert counted == onloads
            copied = sum(op.memory[1] - op.memory[0] for op in log.ops if op.kind == "copy")
            assert copied == sum(
                copies[unit] // units[unit].copies * units[unit].size_bytes for unit in copies
            )
    used = [unit for unit in handle.units if unit.acquired]
    assert used
    assert all(unit.onloads for unit in used)
    assert handle.check() == []
