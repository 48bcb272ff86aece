"""Units that travel packed and units that stay packed on the device: the resident model's bits."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.gpu.harness import assert_all_equal, offloaded, requested_bytes
from tests.python import expect
from tests.python.dropin import tiny_llama
from torch_offload import _C, Handle, packing
from torch_offload.exponents import count_exponents
from torch_offload.selfcheck.delays import RandomDelays
from torch_offload.selfcheck.schedules import MODES

WAYS = ["packed", "packed_resident"]
VOCAB = 512


def bf16_llama() -> Any:
    """Units of 2 and 5 MB."""
    return torch_offload.align(
        tiny_llama(
            hidden_size=512, intermediate_size=1536, num_hidden_layers=6, vocab_size=VOCAB
        ).bfloat16()
    )


def token_ids(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCAB, (2, 12), generator=generator).to(device)


def plain_on(model: nn.Module, device: torch.device) -> Any:
    return torch_offload.align(copy.deepcopy(model).to(device))


@torch.no_grad()
def logits(model: Any, device: torch.device) -> torch.Tensor:
    return model(token_ids(device)).logits  # type: ignore[no-any-return]


def on_device(handle: Handle) -> int:
    stats = handle.stats
    return stats.bytes_resident + stats.window_bytes + stats.staging_bytes + stats.packed_bytes


@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize(("mode", "streams"), MODES)
def test_outputs_equal_resident_with_exact_copies_and_decoders(
    device: torch.device, mode: str, streams: str, transport: str
) -> None:
    model = bf16_llama()
    must = logits(plain_on(model, device), device)
    with offloaded(
        model, device, mode=mode, streams=streams, transport=transport, depth=0
    ) as handle:
        logits(model, device)
        before = handle.stats
        with handle.record() as log:
            outputs = [logits(model, device) for _ in range(3)]
        assert_all_equal(outputs, must)
        assert handle.check() == []
        onloads = handle.stats.onloads - before.onloads
        kinds = [op.kind for op in log.ops]
        assert kinds.count("decode") == onloads >= 3 * expect.num_streamed(handle) - 2
        assert kinds.count("copy") == (onloads if transport == "packed" else 0)
        copied = handle.stats.bytes_copied - before.bytes_copied
        assert (copied == 0) == (transport == "packed_resident")
        assert {unit.transport for unit in handle.units if unit.place} == {transport}
    assert_all_equal([logits(model.to(device), device)], must)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("mode", "streams"), MODES)
def test_delayed_streams_change_nothing(
    device: torch.device, mode: str, streams: str, seed: int, transport: str
) -> None:
    model = bf16_llama()
    must = logits(plain_on(model, device), device)
    options: dict[str, Any] = {"poison": seed == 1, "depth": 0 if seed == 1 else None}
    with offloaded(
        model, device, mode=mode, streams=streams, transport=transport, **options
    ) as handle:
        delays = RandomDelays(handle, seed)
        outputs = []
        with delays.inside(model):
            for _ in range(4):
                delays.before_forward()
                outputs.append(logits(model, device))
        assert delays.count > 0, "nothing was delayed"
        assert_all_equal(outputs, must)


@pytest.mark.parametrize("transport", WAYS)
def test_edits_are_seen(device: torch.device, transport: str) -> None:
    model = bf16_llama()
    with offloaded(model, device, transport=transport) as handle:
        logits(model, device)
        for layer in (2, 0):
            with torch.no_grad():
                model.model.layers[layer].mlp.up_proj.weight.mul_(1.5)
                model.model.layers[layer].self_attn.o_proj.weight.data += 0.25
            with handle.record():
                got = [logits(model, device) for _ in range(2)]
            assert handle.check() == []
            twin = bf16_llama()
            twin.load_state_dict(model.state_dict())
            assert_all_equal(got, logits(plain_on(twin, device), device))


@pytest.mark.needs_cuda
@pytest.mark.knows_memory
def test_device_memory_is_what_the_handle_says_within_every_budget(device: torch.device) -> None:
    model = bf16_llama()
    must = logits(plain_on(model, device), device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    before = requested_bytes(device)
    with torch_offload.offload(model, device, transport="packed", gpu_budget=weights) as handle:
        seen = set()
        for percent in (100, 85, 75, 65, 85, 100):
            budget = weights * percent // 100
            handle.replan(gpu_budget=budget)
            assert_all_equal([logits(model, device) for _ in range(2)], must)
            used = requested_bytes(device) - before
            assert used <= on_device(handle) * 1.001 + 2**16, f"{used} used at {percent} %"
            assert on_device(handle) <= budget
            seen |= {unit.transport for unit in handle.units if unit.place}
        assert seen >= {"packed", "packed_resident"}
    assert requested_bytes(device) == before


# --- sizes of weights that lie on the device -----------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, _C.counted_weights, 17 * _C.counted_weights + 5])
def test_exponents_counted_on_the_device_are_those_of_the_host(
    device: torch.device, size: int
) -> None:
    words = torch.randint(-(2**15), 2**15, (size,), generator=torch.Generator().manual_seed(size))
    flat = words.to(torch.int16).view(torch.bfloat16)
    counts = count_exponents(flat.to(device))
    assert counts is not None
    assert counts.is_cpu
    assert torch.equal(counts, _C.count_exponents(flat))


def test_weights_are_counted_on_their_device_and_planned_as_packed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bf16_llama().to(device)
    must = logits(torch_offload.align(copy.deepcopy(model)), device)
    counted: list[torch.device] = []

    def counting(parameter: torch.Tensor) -> torch.Tensor | None:
        counted.append(parameter.device)
        return count_exponents(parameter)

    monkeypatch.setattr(packing, "count_exponents", counting)
    with offloaded(model, device, transport="packed") as handle:
        assert {one.type for one in counted} == {device.type}
        for unit in handle.units:
            if unit.transport == "packed":
                tensors = [model.get_parameter(name).detach().view(-1) for name in unit.parameters]
                assert unit.copied_bytes == _C.pack(tensors).blob.numel()
        assert torch.equal(logits(model, device), must)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("transport", WAYS)
def test_second_gpu_decodes_while_the_first_is_current(transport: str) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    model = bf16_llama()
    must = logits(plain_on(model, second), second)
    found: list[torch.Tensor] = []

    def run_in_a_thread_that_knows_no_gpu() -> None:
        found.extend(logits(model, second) for _ in range(3))

    with (
        torch.cuda.device(first),
        offloaded(model, second, transport=transport, depth=0, gpu_budget=None) as handle,
    ):
        assert {unit.transport for unit in handle.units if unit.place} == {transport}
        with expect.watch(handle) as calls:
            outputs = [logits(model, second) for _ in range(3)]
            thread = threading.Thread(target=run_in_a_thread_that_knows_no_gpu)
            thread.start()
            thread.join()
        expect.assert_streams_exactly(calls)
        assert torch.cuda.current_device() == 0
    assert len(found) == 3
    assert_all_equal([*outputs, *found], must)
