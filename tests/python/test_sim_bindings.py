"""The simulator as Python sees it: types, figures of the reference, errors, determinism."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch  # before _C

from torch_offload import _C

# SPEC.md, section 2, in nanoseconds: MHA and FFN of one layer.
_COPY_NS = (6_740_000, 13_540_000)
_COMPUTE_NS = (152_420_000, 25_940_000)
_LAYERS = 80
_UNITS = range(2 * _LAYERS)


def _plan(num_layers: int = _LAYERS, **options: int) -> _C.Plan:
    units = []
    for layer in range(num_layers):
        units.append(_C.Unit(f"layers.{layer}.mha", 256, layer, "mha"))
        units.append(_C.Unit(f"layers.{layer}.ffn", 512, layer, "ffn"))
    return _C.make_plan(units, **options)


def _costs(num_layers: int = _LAYERS, **options: Any) -> _C.SimCosts:
    return _C.SimCosts(
        **{"copy_ns": _COPY_NS * num_layers, "compute_ns": _COMPUTE_NS * num_layers, **options}
    )


def _simulate(mode: str, streams: str = "shared", **options: Any) -> _C.SimResult:
    return _C.simulate(_plan(), mode, streams, _costs(), [_UNITS], **options)


def _fields(log: _C.OpLog) -> list[tuple[object, ...]]:
    names = [name for name in dir(_C.Op) if not name.startswith("_")]
    return [tuple(getattr(op, name) for name in names) for op in log.ops]


@pytest.mark.parametrize(
    ("mode", "streams", "elapsed_ms"),
    [
        ("sync", "shared", 80 * 198.64),
        ("streams", "shared", 80 * 198.64),
        ("streams", "split", 80 * 198.64),
        ("events", "shared", 80 * 185.10),
        ("events", "split", 80 * 185.10),
        ("pipeline", "shared", 6.74 + 80 * 178.36),
        ("pipeline", "split", 6.74 + 80 * 178.36),
    ],
)
def test_simulate_layer_by_layer_gives_the_reference_figures(
    mode: str, streams: str, elapsed_ms: float
) -> None:
    layers = [(unit, unit + 1) for unit in range(0, 2 * _LAYERS, 2)]
    result = _C.simulate(_plan(), mode, streams, _costs(), layers, synchronize_passes=True)
    assert result.elapsed_ns * 1e-6 == pytest.approx(elapsed_ms, abs=0.005)
    assert len(result.pass_begin_ns) == len(result.pass_end_ns) == len(result.host_end_ns) == 80
    assert result.pass_end_ns[-1] == result.elapsed_ns
    assert result.host_blocked_ns == result.elapsed_ns


def test_simulate_result_has_counts_and_times() -> None:
    result = _simulate("pipeline")
    assert result.stats.forwards == 1
    assert result.stats.misses == 1
    assert result.counters.copies == result.stats.onloads
    assert result.counters.host_synchronizes == 0
    assert result.host_blocked_ns == 0
    assert result.pass_begin_ns == [0]
    assert result.host_end_ns == [0]
    assert result.elapsed_ns == 14_275_540_000


def test_simulate_log_tells_every_call_with_its_times() -> None:
    result = _simulate("pipeline", "split")
    log = result.log
    assert log.has_times
    assert log.unit_names == [unit.name for unit in _plan().units]
    assert log.stream_names[:3] == ["caller", "weight_h2d_mha", "weight_h2d_ffn"]
    assert len(log) == len(log.ops)
    copy = log.ops[0]
    assert (copy.kind, copy.unit, copy.generation, copy.event) == ("copy", 0, 1, None)
    assert copy.stream is not None
    assert log.stream_names[copy.stream] == "weight_h2d_mha"
    assert copy.memory[1] - copy.memory[0] == copy.source[1] - copy.source[0] == 256
    assert (copy.begin_ns, copy.end_ns) == (0, 6_740_000)
    assert copy.host_time_ns == 0
    record = log.ops[1]
    assert (record.kind, record.unit, record.memory) == ("record", None, (0, 0))
    assert record.event is not None
    steps = {"copy", "record", "wait", "read", "read_end"}
    switches = {"enter", "leave", "return"}  # of the stream that the host submits to: no device's
    assert {op.kind for op in log.ops} == steps | switches
    assert all((op.end_ns is not None) == (op.kind in steps) for op in log.ops)


def test_simulate_without_a_log_tells_the_same_times() -> None:
    result = _simulate("pipeline", log=False)
    assert len(result.log) == 0
    assert result.log.ops == []
    assert not result.log.has_times
    assert result.elapsed_ns == 14_275_540_000


def test_simulate_twice_gives_the_same() -> None:
    costs = _costs(call_ns={"copy": 9001, "record": 703, "wait": 655, "launch": 80_000})
    passes = [_UNITS] * 2
    first, second = (_C.simulate(_plan(), "pipeline", "split", costs, passes) for _ in range(2))
    assert _fields(first.log) == _fields(second.log)
    assert first.pass_end_ns == second.pass_end_ns
    assert first.elapsed_ns == second.elapsed_ns


def test_simulate_log_outlives_its_result() -> None:
    log = _simulate("sync").log
    torch.empty(1 << 20).fill_(1)  # whatever was freed is likely to be used again
    assert log.ops[0].kind == "copy"
    assert log.unit_names[1] == "layers.0.ffn"


def test_simulate_in_two_threads_is_two_simulations() -> None:
    expected = _simulate("pipeline").elapsed_ns
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(_simulate("pipeline").elapsed_ns))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 2


def test_costs_by_rate_and_calls_are_used() -> None:
    costs = _C.SimCosts(
        copy_bytes_per_second=256e6,  # 1 us for 256 bytes
        copy_latency_ns=500,
        compute_ns=[10, 20],
        call_ns={"copy": 100, "launch": 1000, "synchronize": 7},
    )
    result = _C.simulate(_plan(1), "sync", "shared", costs, [[0]])
    assert [op.kind for op in result.log.ops] == [
        *("copy", "record", "synchronize", "read", "read_end", "synchronize")
    ]
    # Copy 1500 (its call lies within), 7 for the waiting, 1000 to launch what runs for 10, 7 again.
    assert result.host_end_ns == [1500 + 7 + 1000 + 7]
    assert result.host_blocked_ns == 1400


def test_limits_of_the_hardware_can_be_lifted() -> None:
    plan = _plan(2)
    times = []
    for engines in (1, 2):
        costs = _costs(2, compute_ns=[1] * 4, num_copy_engines=engines, shared_compute=False)
        times.append(_C.simulate(plan, "pipeline", "split", costs, [range(4)]).elapsed_ns)
    one, two = times
    assert two < one


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"copy_ns": None}, "got neither"),
        ({"copy_bytes_per_second": 1e9}, "got both"),
        ({"copy_ns": None, "copy_bytes_per_second": 0.0}, "copy_bytes_per_second"),
        ({"copy_ns": None, "copy_bytes_per_second": float("nan")}, "copy_bytes_per_second"),
        ({"copy_ns": [-1]}, r"copy_ns\[0\]"),
        ({"compute_ns": [1, 10**13]}, r"compute_ns\[1\]"),
        ({"copy_latency_ns": -1}, "copy_latency_ns"),
        ({"call_ns": {"query": 1}}, "'copy', 'record', 'wait', 'synchronize' or 'launch'"),
        ({"call_ns": {"launch": -1}}, "launch"),
        ({"num_copy_engines": 0}, "num_copy_engines"),
    ],
)
def test_costs_that_cannot_be_fails(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _costs(**options)


@pytest.mark.parametrize("options", [{"copy_ns": 1}, {"compute_ns": [1.5]}, {"call_ns": [1]}])
def test_costs_of_another_type_fails(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        _costs(**options)


def test_costs_by_position_fails() -> None:
    with pytest.raises(TypeError):
        _C.SimCosts(1e9, compute_ns=[1])  # type: ignore[call-arg]


def _bad_simulate(
    mode: str = "pipeline",
    streams: str = "shared",
    passes: Sequence[Sequence[int]] = ((0,),),
    **costs: Any,
) -> None:
    _C.simulate(_plan(), mode, streams, _costs(**costs), passes)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"mode": "fast"}, ValueError, "expected mode"),
        ({"streams": "many"}, ValueError, "expected streams"),
        ({"mode": "sync", "streams": "split"}, ValueError, "sync"),
        ({"compute_ns": [1]}, ValueError, "160 units, got 1"),
        ({"copy_ns": [1]}, ValueError, "160 units, got 1"),
        ({"passes": [[0], [160]]}, IndexError, "unit 160 in pass 1"),
        ({"passes": [[-1]]}, TypeError, "incompatible"),
        ({"passes": [0]}, TypeError, "incompatible"),
        ({"copy_ns": None, "copy_bytes_per_second": 1e-9}, ValueError, "at most one hour"),
    ],
)
def test_simulate_of_what_cannot_be_fails(
    arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        _bad_simulate(**arguments)
