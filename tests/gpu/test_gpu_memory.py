"""Device memory: known to torch, none of it taken in a forward, given back; and host memory."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.gpu import models
from tests.gpu.harness import assert_all_equal, offloaded, requested_bytes
from tests.python import expect
from tests.python.dropin import Stack
from torch_offload.selfcheck.schedules import MODES

pytestmark = pytest.mark.needs_cuda

# One element of each dtype, for the guards of `.to()`.
_PROBE_BYTES = 64


@contextmanager
def _device_memory_left(device: torch.device, size_bytes: int) -> Iterator[None]:
    """Lets this process have just so much more device memory; others on the GPU are not touched."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.memory_reserved(device) + size_bytes
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _cost_of_forward(
    run: Callable[[], torch.Tensor], device: torch.device
) -> tuple[int, int, torch.Tensor]:
    """Allocations, and bytes at the peak beyond those at rest, of the third of three forwards."""
    for _ in range(2):
        run()
    at_rest = requested_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    output = run()
    after = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    return after - before, requested_bytes(device, "peak") - at_rest, output


@pytest.mark.parametrize(("mode", "streams"), MODES)
@pytest.mark.parametrize("name", ["llama", "encoder"])
@torch.no_grad()
def test_forward_allocates_what_the_resident_model_does(
    device: torch.device, name: str, mode: str, streams: str
) -> None:
    model, kwargs = models.fresh(name, device), models.inputs(name, device)
    plain = models.resident(name, device)
    allocations, peak, must = _cost_of_forward(lambda: models.run(plain, kwargs), device)
    assert allocations > 0
    with offloaded(model, device, mode=mode, streams=streams) as handle:
        before = handle.stats.onloads
        ours = _cost_of_forward(lambda: models.run(model, kwargs), device)
        assert handle.stats.onloads > before
        assert_all_equal([ours[2]], must)
        assert ours[0] == allocations, f"{ours[0]} allocations, not {allocations}"
        assert ours[1] <= peak, f"a peak of {ours[1]} bytes, the resident model has {peak}"


@pytest.mark.parametrize("streams", ["shared", "split"])
@torch.no_grad()
def test_window_and_residents_are_all_that_is_taken_and_given_back(
    device: torch.device, streams: str
) -> None:
    model = models.fresh("llama", device)
    before, counted = requested_bytes(device), torch.cuda.memory_allocated(device)
    with offloaded(model, device, streams=streams) as handle:
        taken = requested_bytes(device) - before
        must = handle.stats.window_bytes + handle.stats.bytes_resident
        assert 0 <= taken - must <= _PROBE_BYTES, f"{taken} bytes taken, {must} are told"
        assert torch.cuda.memory_allocated(device) - counted >= must
        begin, end = handle._engine.window
        blocks = [
            (block["address"], block["address"] + block["size"])
            for segment in torch.cuda.memory_snapshot()
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        ]
        assert any(first <= begin and end <= last for first, last in blocks)
    del handle
    assert requested_bytes(device) == before
    assert torch.cuda.memory_allocated(device) == counted


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("streams", ["shared", "split"])
@torch.no_grad()
def test_autocast_keeps_no_cast_weights(device: torch.device, name: str, streams: str) -> None:
    model, kwargs = models.fresh(name, device), models.inputs(name, device)
    plain = models.resident(name, device)
    with torch.autocast("cuda", torch.bfloat16):
        must = models.run(plain, kwargs)
    with offloaded(model, device, streams=streams) as handle:
        with torch.autocast("cuda", torch.bfloat16):
            for _ in range(2):
                models.run(model, kwargs)
            before = requested_bytes(device)
            for _ in range(5):
                output = models.run(model, kwargs)
            grown = requested_bytes(device) - before - output.nbytes
        assert grown <= 0, f"{grown} bytes more after five forwards"
        assert_all_equal([output], must)
        assert handle.stats.onloads >= 6 * expect.num_streamed(handle)


# --- out of memory -------------------------------------------------------------------------------


def test_window_that_does_not_fit_fails_and_leaves_the_model_as_it_was(
    device: torch.device,
) -> None:
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    before = expect.snapshot(model)
    counted = requested_bytes(device)
    with (
        _device_memory_left(device, 2**20),
        pytest.raises(MemoryError, match=r"expected .* of memory on cuda:\d+, got out of memory"),
    ):
        torch_offload.offload(model, device, depth="200GiB")
    expect.assert_unchanged(model, before)
    assert requested_bytes(device) == counted
    with offloaded(model, device), torch.no_grad():
        assert_all_equal([models.run(model, kwargs)], must)


def test_residents_that_do_not_fit_fail_and_leave_the_model_as_it_was(
    device: torch.device,
) -> None:
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    # Larger than whatever PyTorch's allocator has left of the memory that it holds.
    model.large = nn.Linear(8192, 4096)
    stays = ["large"]
    left = 2**26
    with torch_offload.offload(model, device, depth=0, resident=stays) as handle:
        assert handle.stats.window_bytes < left < model.large.weight.nbytes
    del handle
    before = expect.snapshot(model)
    counted = requested_bytes(device)
    with _device_memory_left(device, left), pytest.raises(torch.OutOfMemoryError):
        torch_offload.offload(model, device, depth=0, resident=stays)
    expect.assert_unchanged(model, before)
    assert requested_bytes(device) == counted
    with offloaded(model, device, depth=0, resident=stays), torch.no_grad():
        assert_all_equal([models.run(model, kwargs)], must)


@pytest.mark.parametrize("streams", ["shared", "split"])
@torch.no_grad()
def test_activations_that_do_not_fit_leave_the_model_at_rest(
    device: torch.device, streams: str
) -> None:
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    large = {"x": torch.ones(2**15, model.embed.in_features, device=device)}
    with offloaded(model, device, streams=streams) as handle:
        models.run(model, kwargs)
        with _device_memory_left(device, 3 * large["x"].nbytes // 2):
            with pytest.raises(torch.OutOfMemoryError):
                models.run(model, large)
            expect.assert_at_rest(handle)
        assert_all_equal([models.run(model, kwargs) for _ in range(2)], must)


# --- host memory ---------------------------------------------------------------------------------


def _large_stack(device: torch.device) -> Any:
    """1.4 GiB, so wide that the first GiB ends between two weights of one MLP."""
    with torch.random.fork_rng(devices=[device]), device:
        torch.manual_seed(3)
        return Stack(4, width=4352).eval()


@torch.no_grad()
def test_weights_beyond_one_registration_are_copied_by_us_and_by_the_user(
    device: torch.device,
) -> None:
    model = _large_stack(device)  # on the GPU already, and back there behind `remove`
    plain = copy.deepcopy(model)
    x = torch.randn(4, 4352, device=device)
    must = plain(x)
    with offloaded(model, device) as handle:
        assert handle.stats.host_bytes > 2**30
        assert re.fullmatch(r"cuda:\d+", str(handle.device))
        with expect.watch(handle) as calls:
            outputs = [model(x) for _ in range(3)]
        assert_all_equal(outputs, must)
        expect.assert_streams_exactly(calls)
        # No copy may cross from one registration into another: the user's own must not fail.
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.to(device), plain.get_parameter(name)), name
            on_device = parameter.detach().to(device, non_blocking=True)
            assert torch.equal(on_device, plain.get_parameter(name)), name
    for name, parameter in model.named_parameters():
        assert parameter.device == device, name
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert_all_equal([model(x)], must)


@pytest.mark.parametrize("origin", ["cpu", "cuda", "mixed"])
@pytest.mark.parametrize("granularity", ["sublayer", "module"])
@torch.no_grad()
def test_remove_gives_weights_back_where_they_were(
    device: torch.device, origin: str, granularity: str
) -> None:
    model, kwargs = models.fresh("llama", device), models.inputs("llama", device)
    must = models.must_give("llama", device)
    if origin == "cuda":
        model.to(device)
    elif origin == "mixed":
        model.model.layers[1].to(device)
        model.lm_head.to(device)
    before = {name: (p, p.device, p.clone()) for name, p in model.named_parameters()}
    buffers = {name: buffer.device for name, buffer in model.named_buffers()}
    with offloaded(model, device, granularity=granularity) as handle:
        assert_all_equal([models.run(model, kwargs) for _ in range(3)], must)
        assert handle.stats.onloads > expect.num_streamed(handle)
    for name, (parameter, where, values) in before.items():
        now = model.get_parameter(name)
        assert now is parameter, name
        assert now.device == where, name
        assert torch.equal(now, values), name
        assert not now.is_pinned() or where.type == "cuda", name
    assert {name: buffer.device for name, buffer in model.named_buffers()} == buffers
    assert_all_equal([models.run(model.to(device), kwargs)], must)


def test_masters_are_real_parameters_for_the_user(device: torch.device) -> None:
    model = models.fresh("llama", device)
    plain = models.resident("llama", device)
    with offloaded(model, device):
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            assert torch.equal(parameter.detach().to("cuda"), plain.get_parameter(name)), name
