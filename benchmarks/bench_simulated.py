"""The simulator against the GPU: durations measured unit by unit, forwards predicted from them."""

from __future__ import annotations

from typing import Any

import pytest
from clocks import Link, device_ms, spread
from conftest import Reference
from observe import Counting
from records import Part
from unit_times import forward_times
from yardstick import YARDSTICK, Pair, Stage, Workload, shape_id

from torch_offload import _C
from torch_offload.prediction import run_scenario

_MODES = ("pipeline", "events", "streams", "sync")


@pytest.fixture(scope="module")
def measured_units() -> dict[Any, Any]:
    """Durations of units by shape, and of copies by size: measured once, used by all modes."""
    return {}


@pytest.mark.parametrize(
    ("mode", "shape_index"),
    [
        pytest.param(mode, index, id=f"{mode}-{shape_id(shape)}")
        for mode in _MODES
        for index, shape in enumerate(YARDSTICK.shapes)
    ],
)
def bench_simulated_forward(
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    measured_units: dict[Any, Any],
    mode: str,
    shape_index: int,
) -> None:
    """Predicted against measured, in the steady state of one mode and one shape."""
    pair = Pair.of(stage, yardstick, shape_index, mode=mode)
    shape, streamed = pair.shape, pair.streamed
    handle = streamed.handle
    names = [unit.name for unit in handle.units]
    if shape not in measured_units:
        measured_units[shape] = forward_times(pair.plain, names, pair.tokens)
    times = measured_units[shape]
    for size in {unit.size_bytes for unit in handle.units}:
        if size not in measured_units:
            measured_units[size] = Link(size).rate()["median"]

    units = [_C.Unit(u.name, u.size_bytes, u.layer_index, u.kind) for u in handle.units]
    scenario = times.scenario(
        units,
        [u.size_bytes / measured_units[u.size_bytes] * 1e9 for u in units],
        reference.link_bytes_per_s,
        mode=mode,
    )
    predicted_ms = run_scenario(scenario, _C.make_plan(units)).pass_ms(2)

    round_s = 3 * (reference.floor_ms(streamed.streamed_bytes) + times.all_kernels_ns * 1e-6) * 1e-3
    rounds = part.rounds(3, round_s, least=1)
    with Counting(streamed):
        measured = spread(device_ms(pair.streamed_run, forwards=2, rounds=rounds))
    part.figures.update(
        **pair.header("simulated"),
        shape_index=shape_index,
        unit_ms={name: ns * 1e-6 for name, ns in times.kernels_ns.items()},
        others_ms=times.other_kernels_ns * 1e-6,
        launch_ms=(sum(times.launches_ns.values()) + times.other_launches_ns) * 1e-6,
        host_was_ahead=times.host_was_ahead,
        predicted_ms=predicted_ms,
        streamed_ms=measured,
        error=predicted_ms / measured["median"] - 1,
    )
