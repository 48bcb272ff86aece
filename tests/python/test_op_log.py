"""The op log of an offloaded model: what is in it, when it may be attached, and what ends it."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch

import torch_offload
from tests.python.dropin import plain_on, rows, streamed, tiny_stack
from torch_offload import _C, StateError

_TIMED = {"copy", "fill", "read", "read_end", "wait", "synchronize"}


def _forward(model: Any, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(rows(device))
    return output


def test_log_holds_the_calls_of_the_forwards(device: torch.device) -> None:
    model = tiny_stack()
    with streamed(model, device) as handle:
        log = _C.OpLog()
        handle._engine.attach_log(log)
        before = handle.stats
        _forward(model, device)
        handle._engine.attach_log(None)
        logged = len(log)
        _forward(model, device)
        assert len(log) == logged, "it was detached"
        copies = [op for op in log.ops if op.kind == "copy"]
        reads = [op for op in log.ops if op.kind == "read"]
        assert sum(op.memory[1] - op.memory[0] for op in copies) == (
            handle.stats.bytes_onloaded - before.bytes_onloaded
        ) - sum(unit.size_bytes for unit in handle.units)
        assert [op.unit for op in reads] == list(range(len(handle.units)))
        assert log.unit_names == [unit.name for unit in handle.units]
        assert "weight_h2d" in log.stream_names
        assert not log.has_times
        assert all(op.begin_ns is None and op.end_ns is None for op in log.ops)


@pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
def test_log_with_times_fits_the_hosts_clock(device: torch.device, mode: str) -> None:
    model = tiny_stack()
    with streamed(model, device, mode=mode) as handle:
        _forward(model, device)
        log = _C.OpLog()
        handle._engine.attach_log(log, times=True)
        begin_ns = time.monotonic_ns()
        for _ in range(2):
            _forward(model, device)
        handle._engine.attach_log(None)
        end_ns = time.monotonic_ns()
        assert log.has_times
        reached: dict[int | None, int] = {}
        slack_ns = 0 if device.type == "cpu" else 1_000_000
        for op in log.ops:
            assert begin_ns <= op.host_time_ns <= end_ns
            if op.kind not in _TIMED:
                continue
            assert op.begin_ns is not None
            assert op.end_ns is not None
            assert op.host_time_ns <= op.begin_ns <= op.end_ns <= end_ns + slack_ns
            if op.kind != "synchronize":
                assert op.begin_ns >= reached.get(op.stream, 0) - slack_ns
                reached[op.stream] = op.end_ns


def test_log_can_be_kept_for_a_while_and_cleared(device: torch.device) -> None:
    model = tiny_stack()
    with streamed(model, device) as handle:
        log = _C.OpLog()
        handle._engine.attach_log(log, True)
        _forward(model, device)
        log.clear()
        assert len(log) == 0
        _forward(model, device)
        handle._engine.attach_log(None)
        assert [op.unit for op in log.ops if op.kind == "read"] == list(range(len(handle.units)))
        assert all(op.end_ns is not None for op in log.ops if op.kind in _TIMED)


def test_log_dropped_by_its_user_is_kept_by_the_engine(device: torch.device) -> None:
    model = tiny_stack()
    must = _forward(plain_on(model, device), device)
    with streamed(model, device) as handle:
        handle._engine.attach_log(_C.OpLog(), times=True)
        gc.collect()
        assert torch.equal(_forward(model, device), must)
        handle._engine.attach_log(None)
        assert torch.equal(_forward(model, device), must)


def test_remove_ends_the_log(device: torch.device) -> None:
    model = tiny_stack()
    handle = torch_offload.offload(model, device)
    log = _C.OpLog()
    handle._engine.attach_log(log, times=True)
    _forward(model, device)
    handle.remove()
    assert log.has_times
    assert log.stream_names
    handle._engine.attach_log(None)  # nothing is attached any more
    with pytest.raises(StateError, match="after remove"):
        handle._engine.attach_log(log)


def test_end_of_the_model_ends_the_log(device: torch.device) -> None:
    model = tiny_stack()
    log = _C.OpLog()
    torch_offload.offload(model, device)._engine.attach_log(log, times=True)
    _forward(model, device)
    del model
    gc.collect()
    assert log.has_times
    assert all(op.end_ns is not None for op in log.ops if op.kind in _TIMED)


def test_units_cut_anew_end_the_log(device: torch.device) -> None:
    model = tiny_stack()
    with streamed(model, device, granularity="module") as handle:
        log = _C.OpLog()
        handle._engine.attach_log(log, times=True)
        names = list(handle._engine.plan.units)
        _forward(model, device)  # traced: after it, leaves are units
        assert len(handle.units) != len(names)
        assert log.has_times
        assert log.unit_names == [unit.name for unit in names]
        logged = len(log)
        _forward(model, device)
        assert len(log) == logged


def test_attach_during_a_forward_fails(device: torch.device) -> None:
    model = tiny_stack()
    log = _C.OpLog()
    with streamed(model, device) as handle:
        refusals: list[str] = []

        def attach(*_: object) -> None:
            for argument in (log, None):
                with pytest.raises(StateError, match="between forwards") as raised:
                    handle._engine.attach_log(argument)
                refusals.append(str(raised.value))

        hook = model.blocks[1].register_forward_pre_hook(attach)
        _forward(model, device)
        hook.remove()
        assert len(refusals) == 2
        assert len(log) == 0
        handle._engine.attach_log(log)
        _forward(model, device)
        assert len(log) > 0


def test_attach_of_something_else_fails(device: torch.device) -> None:
    with streamed(tiny_stack(), device) as handle, pytest.raises(TypeError):
        handle._engine.attach_log([])  # type: ignore[arg-type]
