"""Layers of Llama-70B's shape, which the benchmarks measure: bits, and just the copies it needs."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

import torch_offload
from tests.gpu.harness import assert_all_equal, offloaded
from tests.python import expect

_SHAPES = ((1, 1), (8, 512), (1, 2048), (8, 2048))
_SHAPES_HOST = ((1, 1), (2, 8))
_VOCAB = 256


@cache
def _resident(device: torch.device) -> Any:
    """Two layers, made where they are to stay: 3.4 GB on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = device.type == "cpu"
    config = LlamaConfig(
        hidden_size=256 if small else 8192,
        intermediate_size=896 if small else 28672,
        num_hidden_layers=2,
        num_attention_heads=4 if small else 64,
        num_key_value_heads=2 if small else 8,
        vocab_size=_VOCAB,
    )
    with torch.random.fork_rng([] if small else [device]), torch.device(device):
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    return torch_offload.align(model)


@pytest.mark.parametrize("transport", ["raw", "packed"])
@torch.no_grad()
def test_yardstick_equals_resident_with_exact_copies(device: torch.device, transport: str) -> None:
    plain = _resident(device)
    model = torch_offload.align(copy.deepcopy(plain))
    # Two layers fit into the window that is laid for one ahead; this one holds one unit ahead.
    with offloaded(model, device, depth=0, gpu_budget=None, transport=transport) as handle:
        assert {unit.transport for unit in handle.units if unit.place} == {transport}
        for shape in _SHAPES if device.type == "cuda" else _SHAPES_HOST:
            generator = torch.Generator().manual_seed(shape[1])
            tokens = torch.randint(0, _VOCAB, shape, generator=generator).to(device)
            must = plain(tokens, use_cache=False).logits
            with expect.watch(handle) as calls:
                outputs = [model(tokens, use_cache=False).logits for _ in range(3)]
            assert_all_equal(outputs, must)
            expect.assert_streams_exactly(calls)
            assert calls.passes[-1].onloads == 4, "the last pass did not copy every half"
