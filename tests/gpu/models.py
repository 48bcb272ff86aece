"""Models big enough that their copies take time, and small enough that a test takes a second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

import torch_offload
from tests.python.dropin import Stack
from tests.python.zoo.text import pretrained

VOCAB = 256

# Units of 2 to 17 MB on a GPU: copies of 40 to 300 us each. Tiny where they only show that the
# tests themselves are right.
_WIDTH_CUDA = 512
_WIDTH_HOST = 64


@dataclass(frozen=True)
class Subject:
    """One model to test with.

    Attributes:
        name: Key in `SUBJECTS`.
        make: Makes the model from its width.
        inputs: Makes the keyword arguments of one forward from width and seed, on the CPU.
        takes_hooks: Whether module hooks leave its kernels alone; the fast path of
            ``nn.TransformerEncoderLayer`` is given up where a module has any.
    """

    name: str
    make: Callable[[int], nn.Module] = field(repr=False)
    inputs: Callable[[int, int], dict[str, Any]] = field(repr=False)
    takes_hooks: bool = True


def _token_ids(seed: int, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def _ids(width: int, seed: int) -> dict[str, Any]:
    return {"input_ids": _token_ids(seed)}


def _pair(width: int, seed: int) -> dict[str, Any]:
    return {"input_ids": _token_ids(seed), "decoder_input_ids": _token_ids(seed + 1, 7)}


def _rows(width: int, seed: int) -> dict[str, Any]:
    return {"x": torch.randn(16, width, generator=torch.Generator().manual_seed(seed))}


def _sequence(width: int, seed: int) -> dict[str, Any]:
    return {"src": torch.randn(2, 12, width, generator=torch.Generator().manual_seed(seed))}


def _llama(width: int) -> nn.Module:
    return pretrained(
        "LlamaConfig",
        "LlamaForCausalLM",
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _bert(width: int) -> nn.Module:
    return pretrained(
        "BertConfig",
        "BertModel",
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=VOCAB,
    )


def _t5(width: int) -> nn.Module:
    return pretrained(
        "T5Config",
        "T5ForConditionalGeneration",
        d_model=width,
        d_kv=width // 8,
        d_ff=4 * width,
        num_layers=3,
        num_heads=8,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
    )


def _mixtral(width: int) -> nn.Module:
    return pretrained(
        "MixtralConfig",
        "MixtralForCausalLM",
        hidden_size=width // 2,
        intermediate_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    ).to(torch.bfloat16)


def _encoder(width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, 7, enable_nested_tensor=False)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("llama", _llama, _ids),
        Subject("bert", _bert, _ids),
        Subject("t5", _t5, _pair),
        Subject("mixtral", _mixtral, _ids),
        Subject("encoder", _encoder, _sequence, takes_hooks=False),
        Subject("stack", lambda width: Stack(5, width), _rows),
    )
}


def _width_on(device: torch.device) -> int:
    return _WIDTH_CUDA if device.type == "cuda" else _WIDTH_HOST


@cache
def _prototype(name: str, width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(31)
        return torch_offload.align(SUBJECTS[name].make(width).eval())


@cache
def _resident(name: str, device: torch.device) -> nn.Module:
    prototype = _prototype(name, _width_on(device))
    return torch_offload.align(copy.deepcopy(prototype)).to(device)


def fresh(name: str, device: torch.device) -> Any:
    """The model on the CPU, with the same weights at every call, to be offloaded to `device`."""
    return torch_offload.align(copy.deepcopy(_prototype(name, _width_on(device))))


def resident(name: str, device: torch.device) -> Any:
    """The plain model on `device`: one for all tests of a process, so leave it as it is."""
    return _resident(name, device)


def inputs(name: str, device: torch.device, seed: int = 5) -> dict[str, Any]:
    """Keyword arguments of one forward, on `device`."""
    made = SUBJECTS[name].inputs(_width_on(device), seed)
    return {key: value.to(device) for key, value in made.items()}


def run(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """One forward; its main output. Without a cache, so that nothing is kept between two."""
    named = hasattr(model, "config")
    if named and hasattr(model.config, "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    output = model(**kwargs)
    return output[0] if named else output


def must_give(name: str, device: torch.device, seed: int = 5) -> torch.Tensor:
    """What the plain model gives, which is asserted to give it twice."""
    kwargs = inputs(name, device, seed)
    with torch.no_grad():
        first, second = (run(resident(name, device), kwargs) for _ in range(2))
    assert torch.equal(first, second), f"the plain {name} itself gives other bits every time"
    return first
