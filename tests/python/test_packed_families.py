"""Families of the zoo once more, in bf16 and packed: the plain model's bits, exact copies.

Those with units that are worth packing beside others that are not, as a model has them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torch_offload
from tests.python import expect
from tests.python.models import CASES
from tests.python.test_families import Family, assert_same_bits, assert_streams, bits_of

HOST = torch.device("cpu")
# Decoders, encoder and decoder, experts of several kinds, stages of windows, a diffusion model.
FAMILIES = ("llama", "gpt2", "t5", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "swin", "flux")
WAYS: tuple[dict[str, Any], ...] = (
    {"mode": "pipeline", "streams": "shared", "transport": "packed"},
    {"mode": "events", "streams": "split", "transport": "packed"},
    {"mode": "pipeline", "streams": "split", "transport": "packed_resident", "depth": None},
    {"mode": "pipeline", "streams": "shared", "transport": "packed", "masters": "packed"},
)


def build(name: str) -> Family:
    case = CASES[name]
    inputs = {
        key: value.bfloat16()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in case.inputs().items()
    }
    plain, model = (torch_offload.align(case.build().bfloat16()) for _ in range(2))
    must = bits_of(plain(**inputs))
    assert_same_bits(bits_of(plain(**inputs)), must)  # else no comparison would mean anything
    return Family(case, model, inputs, must, None, frozenset())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_family_streams_packed_as_plain(name: str) -> None:
    family = build(name)
    for way in WAYS:
        before = {name: (p, p.detach().clone()) for name, p in family.model.named_parameters()}
        options = {"depth": 0, "gpu_budget": None} | way
        with torch_offload.offload(family.model, HOST, **options) as handle:
            uploaded = handle.stats.bytes_copied  # what stays packed, once
            assert_streams(family, handle)
            expect.assert_at_rest(handle)
            streamed = [unit for unit in handle.units if unit.place is not None]
            packed = [unit for unit in streamed if unit.transport == way["transport"]]
            assert packed, f"{way}: nothing is packed"
            stats = handle.stats
            copied = stats.bytes_copied - uploaded
            assert copied == sum(u.copied_bytes * u.onloads for u in streamed)
            assert stats.bytes_onloaded == sum(u.size_bytes * u.onloads for u in streamed)
            assert all(u.copied_bytes <= 0.75 * u.size_bytes for u in packed)
        for name, now in family.model.named_parameters():
            was, values = before[name]
            assert now is was, f"{name} is another Parameter"
            assert torch.equal(now, values), f"{name} has other values"
    family.forward()  # the plain model again
