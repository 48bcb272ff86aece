"""Budgets, plans that change, and the end of device memory on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.gpu import models
from tests.gpu.harness import assert_all_equal, requested_bytes
from tests.python.dropin import Stack, tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.needs_cuda, pytest.mark.knows_memory]

MIB = 2**20
# What torch's allocator may round up, of a few tensors of some MiB.
_ROUNDING_SHARE = 0.97


def large_stack(num_blocks: int = 8, width: int = 1024) -> Stack:
    """Blocks of 20 MiB each: large enough that the allocator's granularity does not matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return torch_offload.align(Stack(num_blocks, width).eval())  # type: ignore[return-value]


def weights_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def on_device(handle: torch_offload.Handle) -> int:
    return handle.stats.bytes_resident + handle.stats.window_bytes


def take_workspaces(x: torch.Tensor) -> None:
    """The first product of each kind takes memory for good, for this process and stream."""
    weight, bias = x.new_zeros(8, x.shape[-1]), x.new_zeros(8)
    for product in (
        x @ x.mT,
        nn.functional.linear(x, weight),
        nn.functional.linear(x, weight, bias),
    ):
        assert product.isfinite().all()


@contextmanager
def memory_left(device: torch.device, size_bytes: int) -> Iterator[None]:
    """Lets this process have just so much more device memory; others on the GPU are not touched."""
    requested_bytes(device)  # frees what is due
    total = torch.cuda.get_device_properties(device).total_memory
    limit = torch.cuda.memory_reserved(device) + size_bytes
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.55, 0.7, 0.85])
@torch.no_grad()
def test_device_memory_used_is_what_was_planned(device: torch.device, share: float) -> None:
    model = large_stack()
    x = torch.randn(2, 3, 1024, device=device)
    take_workspaces(x)
    before = requested_bytes(device)
    budget = int(share * weights_of(model))
    with torch_offload.offload(model, device, gpu_budget=budget) as handle:
        planned = handle.explain().device_bytes
        model(x)
        used = requested_bytes(device) - before
        assert planned <= budget
        assert planned <= on_device(handle) * 1.001
        assert used <= planned * 1.001 + MIB, f"{used} used, {planned} planned"
        assert used >= planned * _ROUNDING_SHARE
    assert requested_bytes(device) == before


@torch.no_grad()
def test_every_plan_gives_the_same_bits(device: torch.device) -> None:
    model = tiny_llama(vocab_size=4096)
    ids = torch.tensor([[3, 9, 4095, 3]], device=device)
    plain = tiny_llama(vocab_size=4096).to(device)
    must = plain(ids).logits
    generated = plain.generate(ids, max_new_tokens=8, do_sample=False)
    whole = weights_of(model)
    with torch_offload.offload(model, device, gpu_budget=whole * 2) as handle:
        least = torch_offload_least(model)
        for budget in (least, whole // 2, whole * 2, None, least, whole * 3 // 4):
            handle.replan(gpu_budget=budget)
            assert model.device == device
            assert model.model.device == device
            assert_all_equal([model(ids).logits for _ in range(2)], must)
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)
    assert model.device.type == "cpu"


def torch_offload_least(model: nn.Module) -> int:
    from torch_offload.config import Config
    from torch_offload.planning import cut_model, least_budget

    return least_budget(cut_model(model, Config())[0])


@torch.no_grad()
def test_table_stays_on_the_host_and_rows_are_right(device: torch.device) -> None:
    model = tiny_llama(vocab_size=4096, tie_word_embeddings=True)
    plain = tiny_llama(vocab_size=4096, tie_word_embeddings=True).to(device)
    ids = torch.randint(0, 4096, (3, 11), device=device)
    with torch_offload.offload(model, device, gpu_budget=torch_offload_least(model)) as handle:
        assert handle.explain().gathered
        assert model.model.embed_tokens.weight.device.type == "cpu"
        assert_all_equal([model(ids).logits for _ in range(3)], plain(ids).logits)
        from transformers import pipeline

        task = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
        assert task.device == device


@torch.no_grad()
def test_auto_takes_what_forwards_leave(device: torch.device) -> None:
    model, x = large_stack(), torch.randn(2, 3, 1024, device=device)
    must = large_stack().to(device)(x)
    whole = weights_of(model)
    torch.cuda.synchronize(device)
    with torch_offload.offload(model, device, headroom="64MiB") as handle:
        assert all(unit.place is not None for unit in handle.units), "before the first forward"
        assert_all_equal([model(x)], must)
        assert all(unit.place is None for unit in handle.units), "there is room for all"
        assert on_device(handle) >= whole * 0.99
        onloads = handle.stats.onloads
        assert_all_equal([model(x)], must)
        assert handle.stats.onloads == onloads


@pytest.mark.parametrize("on_oom", ["shrink", "raise"])
@torch.no_grad()
def test_forward_that_runs_out_of_memory(device: torch.device, on_oom: Any) -> None:
    model = large_stack()
    whole = weights_of(model)
    small = torch.randn(2, 3, 1024, device=device)
    # As much as most of the residents: it fits beside a window, not beside them.
    rows = int(0.5 * whole) // (1024 * 4) // 6
    large = torch.randn(1, rows, 1024, device=device)
    plain = large_stack().to(device)
    must_small, must_large = plain(small), plain(large)
    del plain
    with torch_offload.offload(model, device, gpu_budget=int(0.9 * whole), on_oom=on_oom) as handle:
        assert_all_equal([model(small)], must_small)
        before = on_device(handle)
        with memory_left(device, 16 * MIB):
            with pytest.raises(torch.OutOfMemoryError, match="torch_offload") as caught:
                model(large)
            if on_oom == "raise":
                assert "set a smaller gpu_budget" in str(caught.value)
                assert on_device(handle) == before
                return
            assert "gave back" in str(caught.value)
            del caught
            assert on_device(handle) < before
            assert_all_equal([model(large)], must_large)
        assert_all_equal([model(small)], must_small)


@torch.no_grad()
def test_replan_that_finds_no_room_leaves_all_as_it_was(device: torch.device) -> None:
    model, x = large_stack(), torch.randn(2, 3, 1024, device=device)
    whole = weights_of(model)
    with torch_offload.offload(model, device, gpu_budget=whole // 3) as handle:
        must = model(x)
        before = [unit.place for unit in handle.units]
        with memory_left(device, 8 * MIB), pytest.raises(torch.OutOfMemoryError):
            handle.replan(gpu_budget=whole)
        assert [unit.place for unit in handle.units] == before
        assert_all_equal([model(x) for _ in range(2)], must)
        handle.replan(gpu_budget=whole * 2)
        assert_all_equal([model(x)], must)


@torch.no_grad()
def test_fraction_of_the_device_is_a_budget(device: torch.device) -> None:
    model, kwargs = models.fresh("llama", device), models.inputs("llama", device)
    with torch_offload.offload(model, device, gpu_budget=0.9) as handle:
        models.run(model, kwargs)
        assert all(unit.place is None for unit in handle.units)
