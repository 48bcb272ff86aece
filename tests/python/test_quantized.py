"""Quantized weights are refused by name: parts of them lie where they would not be streamed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python.dropin import (
    assert_streams_like_plain,
    plain_on,
    refused,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
)

HOST = torch.device("cpu")


class _Subclass(torch.Tensor):
    """A wrapper subclass, as torchao's quantized tensors are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Subclass:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(func))


class Params4bit(nn.Parameter):
    """As bitsandbytes has: packed bytes, and a state beside the tensor."""


@pytest.mark.parametrize("unit", ["blocks", "embed"])
def test_wrapper_subclass_parameter_fails_by_name(unit: str) -> None:
    for kind in (_Subclass, Params4bit):
        model = tiny_stack()
        module = model.embed if unit == "embed" else model.blocks[2].attn
        inner = module.weight.detach()
        wrapped = (
            nn.Parameter(_Subclass(inner), False) if kind is _Subclass else Params4bit(inner, False)
        )
        module.weight = wrapped
        before = [dict(vars(one)) for one in model.modules()]
        with pytest.raises(ValueError, match=rf"{unit}.*of class {kind.__name__}"):
            torch_offload.offload(model, HOST)
        assert [dict(vars(one)) for one in model.modules()] == before
        assert module.weight is wrapped


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "torchao"])
def test_quantized_model_of_transformers_fails_by_name(method: str) -> None:
    model = tiny_llama()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    with refused(model, ValueError, f"quantized by {method}"):
        torch_offload.offload(model, HOST)


class QuantLinear(nn.Module):
    """As GPTQ and AWQ have: packed integers in buffers."""

    def __init__(self, width: int, *, in_buffers: bool) -> None:
        super().__init__()
        packed = torch.zeros(width, width, dtype=torch.int32)
        if in_buffers:
            self.register_buffer("qweight", packed)
        else:
            self.qweight = packed
        self.scales = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scales + self.qweight.sum()


@pytest.mark.parametrize("in_buffers", [True, False])
def test_packed_weights_outside_parameters_fail_by_name(in_buffers: bool) -> None:
    model = tiny_stack()
    for block in model.blocks:
        block.attn = QuantLinear(64, in_buffers=in_buffers)
    with refused(model, ValueError, r"packed integers.*QuantLinear"):
        torch_offload.offload(model, HOST)


def test_masks_and_indices_in_buffers_are_no_packed_weights() -> None:
    model = tiny_stack()
    model.embed.register_buffer("mask", torch.ones(256, 256, dtype=torch.bool))
    model.embed.register_buffer("index", torch.ones(256, 256, dtype=torch.int64))
    plain = plain_on(model, HOST)
    with streamed(model, HOST) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))
