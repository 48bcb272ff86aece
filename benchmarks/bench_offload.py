"""`offload()` and `remove()` themselves: how fast, and how much host memory at the peak."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from clocks import DEVICE, ON_GPU, synchronize
from observe import HostMemoryPeak, resident_host_bytes
from records import Part
from torch import nn
from yardstick import Stage, Workload, empty_model, offload_with_device, require_equal

import torch_offload


def _on_the_host(plain: nn.Module, workload: Workload) -> nn.Module:
    """A copy in ordinary host memory, as `from_pretrained` with a cast would leave one."""
    model = empty_model(workload, torch.device("cpu"))
    source = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source[name])
    return torch_offload.align(model)


def _measure(
    benchmark: Any, part: Part, plain: nn.Module, model: nn.Module, workload: Workload
) -> None:
    """Offloads `model` once, checks it against `plain`, and gives it back."""
    bytes_of = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    before_bytes = resident_host_bytes()
    synchronize()
    with HostMemoryPeak() as peak:
        handle, device = benchmark.pedantic(offload_with_device, args=(model,), rounds=1)
    seconds = benchmark.stats.stats.data[0]
    streamed = [unit for unit in handle.units if unit.place is not None]
    weight_bytes = sum(bytes_of[name] for unit in streamed for name in unit.parameters)
    require_equal(plain, model, workload.tokens(workload.shapes[0]), attempts=2)
    assert handle.stats.bytes_onloaded >= 2 * weight_bytes, "nothing was streamed"
    stats, registered_bytes = handle.stats, device.counters.registered_bytes
    synchronize()
    begin = time.perf_counter()
    handle.remove()
    remove_seconds = time.perf_counter() - begin
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to(DEVICE), expected[name]), f"{name} came back different"
    part.figures.update(
        model_bytes=sum(bytes_of.values()),
        weight_bytes=weight_bytes,  # of those that stream
        largest_unit_bytes=max(unit.size_bytes for unit in streamed),
        offload_seconds=seconds,
        offload_bytes_per_s=weight_bytes / seconds,
        remove_seconds=remove_seconds,
        remove_bytes_per_s=weight_bytes / remove_seconds,
        page_locked_bytes=registered_bytes,
        page_locked_ratio=registered_bytes / weight_bytes,
        window_bytes=stats.window_bytes,
        host_bytes_before=before_bytes,
        host_bytes_peak=peak.peak_bytes,
        host_samples=peak.num_samples,
        bit_equal=True,
    )


def _torch_pins_bytes_per_s(model: nn.Module, most_bytes: int) -> float | None:
    """How fast torch's own ``pin_memory`` page-locks the same weights, one after the other."""
    if not ON_GPU:
        return None
    pinned: list[torch.Tensor] = []  # kept: torch would hand the same memory out again
    begin = time.perf_counter()
    for parameter in model.parameters():
        if sum(tensor.nbytes for tensor in pinned) < most_bytes:
            pinned.append(parameter.detach().pin_memory())
    return sum(tensor.nbytes for tensor in pinned) / (time.perf_counter() - begin)


@pytest.mark.benchmark(group="torch_offload.offload.move")
def bench_offload_from_gpu(benchmark: Any, part: Part, stage: Stage, peer: Workload) -> None:
    """From the execution device."""
    if not ON_GPU:
        pytest.skip("without a GPU this is bench_offload_from_cpu")
    plain = stage.plain(peer)
    model = stage.copy_of_plain(peer)
    _measure(benchmark, part, plain, model, peer)
    part.figures.update(what="offload", source="gpu")


@pytest.mark.benchmark(group="torch_offload.offload.move")
def bench_offload_from_cpu(benchmark: Any, part: Part, stage: Stage, peer: Workload) -> None:
    """From ordinary host memory; the peak of host memory is the model's plus a unit's."""
    plain = stage.plain(peer)
    stage.clear_streamed()
    empty_bytes = resident_host_bytes()
    model = _on_the_host(plain, peer)
    gc.collect()
    _measure(benchmark, part, plain, model, peer)
    figures = part.figures
    torch_rate = _torch_pins_bytes_per_s(model, 4 * 2**30)
    figures["torch_pins_bytes_per_s"] = torch_rate
    if torch_rate is not None:
        figures["times_torch"] = figures["offload_bytes_per_s"] / torch_rate
    allowed = figures["model_bytes"] + figures["largest_unit_bytes"]
    used = figures["host_bytes_peak"] - empty_bytes
    figures.update(what="offload", source="cpu", host_bytes_used=used, host_ratio=used / allowed)
