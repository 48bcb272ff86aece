"""Published faults that live in Python only, each planted and each with its clean twin.

The others are calls of a Device: see csrc/check/published_races.cpp and tests/python/test_check.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.python.dropin import Stack, assert_equal, raising, rows, streamed, tiny_stack
from tests.python.streamed_master_guard import StreamedMasterGuard, StreamedMasterReadError
from torch_offload.calls import unwrap

HOST = torch.device("cpu")


class _Normed(nn.Module):
    """A unit with buffers: it normalizes by statistics that it keeps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.norm(x))


def _stack_with_buffers() -> Stack:
    model = tiny_stack()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for block in model.blocks:
            block.mlp = _Normed(16)
            block.mlp.norm.running_mean.normal_()
    return model.eval()


def _places_of_buffers(model: nn.Module) -> dict[str, tuple[torch.device, int]]:
    return {name: (buffer.device, buffer.data_ptr()) for name, buffer in model.named_buffers()}


def _assert_buffers_stay(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Asserts that buffers lie where they lay after a forward, and after one that fails inside."""
    before = _places_of_buffers(model)
    must = forward()
    assert _places_of_buffers(model) == before
    mlp = model.get_submodule("blocks.1.mlp.up")
    hook = mlp.register_forward_hook(raising(RuntimeError("in a layer")))
    with pytest.raises(RuntimeError, match="in a layer"):
        forward()
    hook.remove()
    assert _places_of_buffers(model) == before
    assert_equal(forward(), must)


@torch.no_grad()
def test_h4_buffers_lie_where_they_lay_after_any_path(device: torch.device) -> None:
    # https://github.com/huggingface/diffusers/issues/13238
    model = _stack_with_buffers()
    with streamed(model, device):
        _assert_buffers_stay(model, lambda: model(rows(device)))


@torch.no_grad()
def test_h4_buffers_restored_on_one_path_only_are_seen() -> None:
    model = _stack_with_buffers()
    norm = model.blocks[1].mlp.norm
    lay = norm.running_mean

    def onload(module: nn.Module, args: Any) -> None:
        module.norm.running_mean = lay.clone()

    def offload(module: nn.Module, args: Any, output: Any) -> None:  # not after an exception
        module.norm.running_mean = lay

    model.blocks[1].mlp.register_forward_pre_hook(onload)
    model.blocks[1].mlp.register_forward_hook(offload)
    with pytest.raises(AssertionError):
        _assert_buffers_stay(model, lambda: model(rows(HOST)))


@torch.no_grad()
def test_h11_wrappers_that_are_not_there_are_seen_in_the_counts(
    master_guard: StreamedMasterGuard,
) -> None:
    # https://github.com/vllm-project/vllm/issues/51462
    model = tiny_stack()
    must = model(rows(HOST))
    with streamed(model, HOST) as handle:
        streamed_bytes = sum(unit.size_bytes for unit in handle.units if unit.place is not None)
        assert_equal(model(rows(HOST)), must)
        assert handle.stats.bytes_onloaded >= streamed_bytes
        for block in model.blocks:  # the planted fault: nothing is installed
            unwrap(block.attn)
            unwrap(block.mlp)
        before = handle.stats
        with master_guard.expect_reads(), pytest.raises(StreamedMasterReadError, match="attn"):
            model(rows(HOST))
        assert handle.stats.onloads == before.onloads, "which no comparison of outputs shows"


@torch.no_grad()
def test_h12_weight_used_without_its_module_is_its_master(
    master_guard: StreamedMasterGuard,
) -> None:
    # https://github.com/huggingface/transformers/issues/46978
    model = tiny_stack()
    weight = model.blocks[0].attn.weight
    truth = weight.clone()
    with streamed(model, HOST) as handle:
        model(rows(HOST))
        begin, end = handle._engine.window
        assert not begin <= weight.data_ptr() < end
        assert_equal(nn.functional.linear(rows(HOST), weight), rows(HOST) @ truth.T)
        # Inside a forward, but outside its module: nobody has brought it, and that is no secret.
        model.blocks[1].mlp.register_forward_pre_hook(lambda *_: weight.sum())
        with master_guard.expect_reads() as reads, pytest.raises(StreamedMasterReadError):
            model(rows(HOST))
        assert reads == ["blocks.0.attn.weight"]
