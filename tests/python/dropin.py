"""Tiny models and comparisons for the tests of the drop-in rules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from torch_offload import _C
from torch_offload.selfcheck.subjects import Stack

HOST = torch.device("cpu")
VOCAB = 64
# The beginning of what is said of units that the first forward leaves out.
IDLE_WARNING = "torch_offload. the first forward called"


def tiny_llama(**changes: Any) -> Any:
    """A Llama of three layers, fp32, eval mode, with the same weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    return torch_offload.align(model.eval())


def packable_llama(**changes: Any) -> Any:
    """`tiny_llama` in bf16, of units that are worth packing."""
    return tiny_llama(**({"hidden_size": 256, "intermediate_size": 512} | changes)).bfloat16()


def tiny_stack(num_blocks: int = 4, width: int = 16) -> Stack:
    """A `Stack` with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        model = Stack(num_blocks, width)
    torch_offload.align(model)
    return model.eval()


def tokens(device: torch.device, *, batch: int = 2, length: int = 6, seed: int = 3) -> torch.Tensor:
    """Token ids, int64, [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator).to(device)


def logits(model: nn.Module, device: torch.device = HOST) -> torch.Tensor:
    """Of a Llama of these, for `tokens`, by one forward without gradients."""
    with torch.inference_mode():
        found = model(tokens(device)).logits
    assert isinstance(found, torch.Tensor)
    return found


def planned_bytes(model: nn.Module) -> int:
    """Of its weights, as they are planned: each aligned."""
    return sum(_C.aligned_size(parameter.nbytes) for parameter in model.parameters())


def rows(device: torch.device, *, batch: int = 3, width: int = 16, seed: int = 4) -> torch.Tensor:
    """Standard normal fp32, [batch, width]."""
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed)).to(device)


def raising(error: BaseException) -> Callable[..., None]:
    """A hook that raises."""

    def hook(*args: Any) -> None:
        raise error

    return hook


def plain_on(model: nn.Module, device: torch.device) -> Any:
    """An aligned copy of a plain model on a device, to compare with."""
    return torch_offload.align(copy.deepcopy(model)).to(device)


@contextmanager
def streamed(
    model: nn.Module, device: torch.device, **options: Any
) -> Iterator[torch_offload.Handle]:
    """An offloaded model, removed at the end. Window so small that every unit must be copied."""
    with torch_offload.offload(model, device, **({"depth": 0} | options)) as handle:
        yield handle
        if not handle.is_removed:
            expect.assert_at_rest(handle)


@contextmanager
def refused(
    model: nn.Module, kind: type[Exception], match: str, *, same_memory: bool = True
) -> Iterator[None]:
    """Asserts that `offload` refuses a plain model, which then is exactly what it was."""
    before = expect.snapshot(model)
    with pytest.raises(kind, match=match) as caught:
        yield
    assert caught.type in (kind, *kind.__subclasses__())
    expect.assert_unchanged(model, before, same_memory=same_memory)
    assert torch_offload.handle_of(model) is None


def assert_equal(got: Any, must: Any) -> None:
    """Asserts that two outputs are of one type and equal to the last bit, all the way down."""
    assert type(got) is type(must), f"got {type(got)}, expected {type(must)}"
    if isinstance(must, torch.Tensor):
        assert (got.dtype, got.device) == (must.dtype, must.device)
        assert torch.equal(got, must), f"differs by up to {(got - must).abs().max()}"
    elif isinstance(must, dict):
        assert list(got) == list(must)
        for key in must:
            assert_equal(got[key], must[key])
    elif isinstance(must, list | tuple):
        assert len(got) == len(must)
        for one, other in zip(got, must, strict=True):
            assert_equal(one, other)


def assert_streams_like_plain(
    model: nn.Module,
    plain: nn.Module,
    handle: torch_offload.Handle,
    run: Callable[[Any], Any],
    *,
    forwards: int = 2,
    stale: tuple[str, ...] = (),
    replaced: tuple[str, ...] = (),
) -> None:
    """Asserts that `run` gives the plain model's bits, and has copied exactly what it must."""
    with torch.no_grad():
        must = run(plain)
        with expect.watch(handle, stale=stale, replaced=replaced) as calls:
            for _ in range(forwards):
                assert_equal(run(model), must)
    expect.assert_streams_exactly(calls)
    expect.assert_at_rest(handle)


def tiny_tokenizer() -> Any:
    """Letters and a few words, within the vocabulary of `tiny_llama`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        chr(ord("a") + index): 3 + index for index in range(26)
    }
    words |= {f"w{index}": index for index in range(len(words), 64)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
