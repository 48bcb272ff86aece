"""Quantized weights are refused by name: parts of them lie where they would not be streamed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python.dropin import (
    Stack,
    assert_streams_like_plain,
    plain_on,
    refused,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
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
    """As bitsandbytes has: packed bytes, a state beside the tensor, conversions that pack."""

    quant_state = None

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Quantizes."""
        raise NotImplementedError


class GGUFParameter(nn.Parameter):
    """As diffusers has: blocks of bytes that an operator finds the type of."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("unit", ["blocks", "embed"])
def test_wrapper_subclass_parameter_fails_by_name(unit: str) -> None:
    for kind in (_Subclass, Params4bit, GGUFParameter):
        model = tiny_stack()
        module = model.embed if unit == "embed" else model.blocks[2].attn
        inner = module.weight.detach()
        wrapped = nn.Parameter(_Subclass(inner), False) if kind is _Subclass else kind(inner, False)
        module.weight = wrapped
        before = [dict(vars(one)) for one in model.modules()]
        with pytest.raises(
            ValueError, match=rf"{unit}.*of class {kind.__name__}.*(of its own|no subclass)"
        ):
            torch_offload.offload(model, HOST)
        assert [dict(vars(one)) for one in model.modules()] == before
        assert module.weight is wrapped


class _Named(nn.Parameter):
    """Ordinary: what some loaders make to keep notes beside a weight."""

    def __new__(cls, data: torch.Tensor, note: str) -> _Named:
        made: _Named = super().__new__(cls, data, requires_grad=False)
        made.note = note
        return made

    def __repr__(self) -> str:
        return f"{self.note}: {super().__repr__()}"

    def shout(self) -> str:
        return self.note.upper()


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "module"}, {"transport": "packed", "masters": "packed"}],
    ids=str,
)
def test_ordinary_subclass_of_parameters_streams(
    device: torch.device, options: dict[str, Any]
) -> None:
    model = tiny_llama(hidden_size=256, intermediate_size=512).bfloat16()
    plain = plain_on(model, device)
    ids = tokens(device)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight = _Named(module.weight.detach(), f"weight of {name}")
    before = dict(model.named_parameters())
    with streamed(model, device, **options) as handle:
        named = {
            n
            for unit in handle.units
            for n in unit.parameters
            if type(before[n]) is not nn.Parameter
        }
        assert "model.layers.1.mlp.up_proj.weight" in named
        if handle.config.granularity == "module":
            model(ids)  # cuts the leaves
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids).logits)
        for one in (model, plain):
            with torch.no_grad():
                one.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(ids).logits)
        for name, parameter in model.named_parameters():
            assert parameter is before[name]
            assert (
                not name.endswith("proj.weight")
                or parameter.shout() == f"WEIGHT OF {name[:-7].upper()}"
            )
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert type(parameter) is (
            _Named if name.endswith(("proj.weight", "head.weight")) else nn.Parameter
        )
    assert repr(model.model.layers[1].mlp.up_proj.weight).startswith("weight of model.layers.1")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "torchao"])
def test_quantized_model_of_transformers_fails_by_name(method: str) -> None:
    model = tiny_llama()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    with refused(model, ValueError, f"quantized by {method}"):
        torch_offload.offload(model, HOST)


@pytest.mark.parametrize("left", [{"quant_method": "gguf"}, {"dequantize": True}], ids=str)
def test_model_that_its_loader_has_dequantized_streams(left: dict[str, Any]) -> None:
    model = tiny_llama()
    plain = plain_on(model, HOST)
    config = {"quant_method": "mxfp4", "dequantize": False} | left
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(**config))
    ids = tokens(HOST)
    with streamed(model, HOST) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids).logits)


class QuantLinear(nn.Module):
    """As GPTQ and AWQ have: packed integers in buffers, eight of four bits in one."""

    def __init__(self, plain: nn.Linear, *, in_buffers: bool) -> None:
        super().__init__()
        ones = torch.ones(plain.in_features // 8, plain.out_features, dtype=torch.int32)
        if in_buffers:
            self.register_buffer("qweight", ones)
        else:
            self.qweight = ones
        self.register_buffer("scales", torch.ones(1, plain.out_features))
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1, keepdim=True) * self.scales[0] + self.qweight.sum(0)


def _pack(model: nn.Module, *, in_buffers: bool) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantLinear(child, in_buffers=in_buffers))


@pytest.mark.parametrize("in_buffers", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocabulary", [64, 4096])  # a table outweighs what is packed
def test_packed_weights_outside_parameters_fail_by_name(
    in_buffers: bool, bias: bool, vocabulary: int
) -> None:
    model = tiny_llama(vocab_size=vocabulary, attention_bias=bias, tie_word_embeddings=True)
    _pack(model.model, in_buffers=in_buffers)
    with refused(model, ValueError, r"packed integers.*QuantLinear; GPTQ, AWQ"):
        torch_offload.offload(model, HOST)


class _Float8Linear(nn.Module):
    """As checkpoints in float8 have that no library unpacks: the weight is a buffer."""

    def __init__(self, plain: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", plain.weight.detach().to(dtype))
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_weights_in_buffers_fail(dtype: torch.dtype) -> None:
    model = tiny_stack()
    for block in model.blocks:
        block.mlp.up = _Float8Linear(block.mlp.up, dtype)
        block.mlp.down = _Float8Linear(block.mlp.down, dtype)
    model(rows(HOST))
    with refused(model, ValueError, r"8-bit floats.*_Float8Linear.*float8 models"):
        torch_offload.offload(model, HOST)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("make", [tiny_llama, tiny_stack])
def test_dynamically_quantized_modules_fail_by_name(make: Callable[[], Any]) -> None:
    """All linear layers, or those of one block alone."""
    model = torch.ao.quantization.quantize_dynamic(make(), {nn.Linear})
    with refused(model, ValueError, r"quantized by torch\.ao\.quantization"):
        torch_offload.offload(model, HOST)
    some = tiny_stack()
    some.blocks[2] = torch.ao.quantization.quantize_dynamic(some.blocks[2], {nn.Linear})
    with refused(some, ValueError, r"'blocks\.2\.\S+' of it is quantized by torch\.ao"):
        torch_offload.offload(some, HOST)


def test_calls_that_quantization_would_replace_are_no_weights() -> None:
    model = tiny_stack()
    model.add = torch.ao.nn.quantized.FloatFunctional()
    plain = plain_on(model, HOST)
    with streamed(model, HOST) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))


def _bitsandbytes_8(model: Stack) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = model.blocks[1].attn.weight.detach()
    model.blocks[1].attn = bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False)
    model.blocks[1].attn.weight = bnb.nn.Int8Params(weight, False, has_fp16_weights=False)


def _bitsandbytes_4(model: Stack) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = model.blocks[1].attn.weight.detach()
    model.blocks[1].attn = bnb.nn.Linear4bit(16, 16)
    model.blocks[1].attn.weight = bnb.nn.Params4bit(weight, False)


def _torchao(model: Stack) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def _quanto(model: Stack) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def _compressed_tensors(model: Stack) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.preset_name_to_scheme("W8A16", ["Linear"])
    config = quantization.QuantizationConfig(config_groups={"all": scheme})
    quantization.apply_quantization_config(model, config)


@pytest.mark.filterwarnings("ignore")  # of libraries that this environment may lack
@pytest.mark.parametrize(
    ("quantize", "match"),
    [
        (_bitsandbytes_8, r"class Int8Params \(bitsandbytes"),
        (_bitsandbytes_4, r"class Params4bit \(bitsandbytes"),
        (_torchao, r"of class \w+ \(torchao"),
        (_quanto, r"of class \w+ \(optimum\.quanto"),
        (_compressed_tensors, r"quantized by compressed-tensors"),
    ],
)
def test_weights_quantized_by_a_library_fail_by_name(
    quantize: Callable[[Stack], None], match: str
) -> None:
    model = tiny_stack()
    quantize(model)
    before = [dict(vars(one)) for one in model.modules()]
    with pytest.raises(ValueError, match=match):
        torch_offload.offload(model, HOST)
    assert [dict(vars(one)) for one in model.modules()] == before


def test_scheme_of_compressed_tensors_fails_by_name() -> None:
    scheme = type("QuantizationScheme", (), {"__module__": "compressed_tensors.quantization"})
    model = tiny_stack()
    model.blocks[1].attn.quantization_scheme = scheme()
    with refused(model, ValueError, r"'blocks\.1\.attn' of it is quantized by compressed-tensors"):
        torch_offload.offload(model, HOST)


def test_masks_and_indices_in_buffers_are_no_packed_weights() -> None:
    model = tiny_stack()
    model.embed.register_buffer("mask", torch.ones(256, 256, dtype=torch.bool))
    model.embed.register_buffer("index", torch.ones(256, 256, dtype=torch.int64))
    plain = plain_on(model, HOST)
    with streamed(model, HOST) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))
