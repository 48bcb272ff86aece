"""What a unit costs the host, by itself and beside a model's launches, and what it must cost.

The units weigh little, so that thousands of them are seen in seconds and noise averages out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from clocks import DEVICE, ON_GPU, HostCost, spread, synchronize
from conftest import Reference
from records import Part
from submission import beyond, measure_submission
from torch import nn
from yardstick import Pair, Stage, Workload, bound, offload_with_device, shape_id

_NUM_UNITS = 32


@pytest.mark.benchmark(group="torch_offload.forward.submit")
def bench_submit_thin(
    benchmark: Any, part: Part, stage: Stage, reference: Reference, thin: Workload
) -> None:
    """The same calls where forwards follow one another closely, and so often that noise averages.

    In between the yardstick's the host does nothing for half a second.
    """
    pair = Pair.of(stage, thin, 0, granularity="sublayer")
    measure_submission(benchmark, part, pair, reference, "submit_thin", wanted_rounds=200)


class _Idle(nn.Module):
    """A unit that computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2**16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@torch.no_grad()
def bench_submit_idle(part: Part) -> None:
    """Wrapper, acquire, release and copies of units that compute nothing: all of ours, no more."""
    model = nn.Sequential(*(_Idle() for _ in range(1 + _NUM_UNITS))).eval()
    x = torch.ones(1, device=DEVICE)
    plain = [HostCost.of(lambda: model(x)) for _ in range(200)]
    # The first holds the model's first parameter, which stays on the device.
    names = [name for name, _ in model.named_children()][1:]
    handle, _ = offload_with_device(model, units=names)
    for _ in range(3):
        model(x)
    before = handle.stats
    ours = []
    for _ in range(200):
        synchronize()
        ours.append(HostCost.of(lambda: model(x)))
    after = handle.stats
    num_calls = (after.forwards - before.forwards) * _NUM_UNITS
    assert after.onloads - before.onloads == num_calls, "some units were not copied"
    beyond_ms = beyond(plain, ours)
    inside_us = (after.cpu_seconds - before.cpu_seconds) * 1e6 / num_calls
    part.figures.update(
        what="submit_idle",
        num_units=_NUM_UNITS,
        us_per_unit=beyond_ms["median"] * 1e3 / _NUM_UNITS,
        least_us_per_unit=beyond_ms["min"] * 1e3 / _NUM_UNITS,
        inside_us_per_unit=inside_us,
    )
    handle.remove()


class _DriverCalls:
    """The five calls into the driver that an event pipeline makes a unit, and nothing of ours.

    A wait of the copy stream for the place, a copy (of 4 KiB: the wire has no part in this), its
    event; the wait of the compute stream for it; the event behind the last kernel.
    """

    _COPY_BYTES = 4096

    def __init__(self, units: Sequence[nn.Module]) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        pointer = ctypes.c_void_p
        self._wait = driver.cuStreamWaitEvent
        self._wait.argtypes = [pointer, pointer, ctypes.c_uint]
        self._record = driver.cuEventRecord
        self._record.argtypes = [pointer, pointer]
        self._copy = driver.cuMemcpyHtoDAsync_v2
        self._copy.argtypes = [pointer, pointer, ctypes.c_size_t, pointer]
        self._source = torch.zeros(self._COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        self._target = torch.zeros_like(self._source, device=DEVICE)
        self._side = torch.cuda.Stream(DEVICE)
        self._compute = torch.cuda.current_stream(DEVICE)
        self._events: list[torch.cuda.Event] = []
        self._units = units

    def __enter__(self) -> _DriverCalls:
        for unit in self._units:
            vars(unit)["_call_impl"] = self._wrapper(unit)
        return self

    def __exit__(self, *failure: object) -> None:
        synchronize()
        for unit in self._units:
            del vars(unit)["_call_impl"]

    def _event(self) -> int:
        event = torch.cuda.Event()
        event.record(self._side)  # torch makes it only then
        self._events.append(event)
        return int(event.cuda_event)

    def _wrapper(self, unit: nn.Module) -> Callable[..., Any]:
        call_plain: Callable[..., Any] = type(unit)._call_impl
        ready, free = self._event(), self._event()
        side, compute = self._side.cuda_stream, self._compute.cuda_stream
        target, source = self._target.data_ptr(), self._source.data_ptr()
        wait, copy, record = self._wait, self._copy, self._record

        def call(*args: Any, **kwargs: Any) -> Any:
            wait(side, free, 0)
            copy(target, source, self._COPY_BYTES, side)
            record(ready, side)
            wait(compute, ready, 0)
            output = call_plain(unit, *args, **kwargs)
            record(free, compute)
            return output

        return call


@pytest.mark.skipif(not ON_GPU, reason="the host device has no driver")
def bench_submit_driver(part: Part, stage: Stage, thin: Workload) -> None:
    """The floor: the plain model, with as many calls into the driver as streaming it takes."""
    shape = thin.shapes[0]
    model: Any = stage.plain(thin)
    run = bound(model, thin.tokens(shape))
    units = [half for layer in model.model.layers for half in (layer.self_attn, layer.mlp)]
    plain, called = [], []
    for _ in range(3):
        run()
    for _ in range(part.rounds(200, 0.05)):
        synchronize()
        plain.append(HostCost.of(run))
        with _DriverCalls(units):
            synchronize()
            called.append(HostCost.of(run))
    added = beyond(plain, called)
    part.figures.update(
        what="submit_driver",
        shape=shape_id(shape),
        num_units=len(units),
        plain_submit_ms=spread([cost.wall_ms for cost in plain]),
        submit_ms=spread([cost.wall_ms for cost in called]),
        beyond_plain_ms=added["median"],
        beyond_plain_spread_ms=added,
        beyond_plain_us_per_unit=added["median"] * 1e3 / len(units),
    )
