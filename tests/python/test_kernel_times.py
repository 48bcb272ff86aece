"""Kernels and launches, told apart in what was measured, predict plans that were not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from torch_offload import _C
from torch_offload.estimate import times_by_name
from torch_offload.kernel_times import kernel_times
from torch_offload.measured_times import measured_times
from torch_offload.prediction import Scenario, run_scenario
from torch_offload.profile import Measured, Profile, profile_of, scenario_of, units_of
from torch_offload.profile_file import profile_to_json, read_profile

US = 1000
LAYERS = 6
SIZES = {"mha": 32 * 2**20, "ffn": 128 * 2**20}
# As one token has it: kernels shorter than their launches, and copies longer than both.
KERNEL_NS = {"mha": 150 * US, "ffn": 340 * US}
LAUNCH_NS = {"mha": 450 * US, "ffn": 200 * US}
COPY_NS = {"mha": 1375 * US, "ffn": 5500 * US}
UNITS = [
    _C.Unit(f"layers.{layer}.{kind}", SIZES[kind], layer, kind)
    for layer in range(LAYERS)
    for kind in ("mha", "ffn")
]
TRUE = Scenario(
    units=UNITS,
    compute_ns=[KERNEL_NS[unit.kind] for unit in UNITS],
    launch_ns=[LAUNCH_NS[unit.kind] for unit in UNITS],
    link_bytes_per_second=24e9,
    copy_ns=[COPY_NS[unit.kind] for unit in UNITS],
)
STREAMED = _C.make_plan(UNITS)
RESIDENT = _C.make_plan(UNITS, resident=[True] * len(UNITS))
# As near a full budget: FFN stays, and one attention after the other through one place.
ONE_PLACE = _C.make_plan(
    UNITS, resident=[unit.kind == "ffn" for unit in UNITS], window_bytes=SIZES["mha"]
)


def forward_ms(scenario: Scenario, plan: _C.Plan) -> float:
    return run_scenario(scenario, plan, passes=4, log=False).pass_ms(3)


def profile_under(plan: _C.Plan, passes: int = 3) -> Profile:
    """What a profile of this plan says, taken where things take what they take."""
    run = run_scenario(TRUE, plan, passes=passes)
    measured = Measured(
        device="in virtual time",
        mode="pipeline",
        streams="shared",
        forwards=passes,
        begin_ns=0,
        end_ns=run.result.elapsed_ns,
        cpu_ns=0,
        depth_bytes=plan.depth_bytes,
        window_bytes=plan.window_bytes,
        resident_bytes=plan.resident_bytes,
        outside_bytes=0,
        free_bytes=0,
    )
    return profile_of(run.trace(), plan, measured)


def predicted(profile: Profile, plan: _C.Plan) -> float:
    times = measured_times(profile).of(UNITS)
    scenario = Scenario(
        units=UNITS,
        compute_ns=times.compute_ns,
        launch_ns=times.launch_ns,
        link_bytes_per_second=24e9,
        copy_ns=TRUE.copy_ns,  # resident units have none that were measured
    )
    return forward_ms(scenario, plan)


def of_kind(kind: str, values: Sequence[float]) -> list[float]:
    return [value for unit, value in zip(UNITS, values, strict=True) if unit.kind == kind]


def test_streamed_forwards_tell_kernels_and_launches_apart() -> None:
    found = kernel_times(profile_under(STREAMED))
    for kind in ("mha", "ffn"):
        assert of_kind(kind, found.compute_ns) == [KERNEL_NS[kind]] * LAYERS
        assert of_kind(kind, found.launch_ns) == [LAUNCH_NS[kind]] * LAYERS


@pytest.mark.parametrize("plan", [RESIDENT, ONE_PLACE, STREAMED], ids=["all", "one place", "none"])
def test_streamed_forwards_predict_every_other_plan(plan: _C.Plan) -> None:
    """Launches bound the resident model and not the streamed one: both within a hundredth."""
    assert predicted(profile_under(STREAMED), plan) == pytest.approx(
        forward_ms(TRUE, plan), rel=0.01
    )


def test_forwards_that_wait_for_launches_leave_the_two_together() -> None:
    found = profile_under(RESIDENT)
    kernels = kernel_times(found)
    assert kernels.launch_ns == ()
    assert kernels.launch_others_ns == 0
    assert predicted(found, RESIDENT) == pytest.approx(forward_ms(TRUE, RESIDENT), rel=0.02)
    # What copies wait for is then the launches: too long, as nobody has seen the kernels alone.
    assert predicted(found, ONE_PLACE) > 1.05 * forward_ms(TRUE, ONE_PLACE)


def test_scenario_of_a_streamed_profile_runs_as_long_as_it_did() -> None:
    found = profile_under(STREAMED)
    scenario = scenario_of(found, units_of(found)).with_(budget_bytes=None, depth_bytes=None)
    assert list(scenario.launch_ns) == [LAUNCH_NS[unit.kind] for unit in UNITS]
    assert forward_ms(scenario, STREAMED) == pytest.approx(forward_ms(TRUE, STREAMED), rel=0.01)


def test_older_files_say_nothing_of_it(tmp_path: Path) -> None:
    found = profile_under(STREAMED)
    document = profile_to_json(found)
    for unit in document["units"]:
        for name in ("ahead_uses", "ahead_ns", "launch_ns"):
            del unit["times"][name]
    for name in ("ahead_gaps", "ahead_gap_ns", "launch_gap_ns"):
        del document["total"][name]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    kernels = kernel_times(read_profile(path))
    assert kernels.launch_ns == ()
    assert kernels.compute_ns == tuple(
        unit.times.compute_ns / unit.times.uses for unit in found.units
    )


def test_profile_of_a_file_gives_both_lines_to_simulations_of_a_model() -> None:
    names = [unit.name for unit in reversed(UNITS)]
    kernels, launches = times_by_name(profile_under(STREAMED), names)
    assert launches == [LAUNCH_NS[unit.kind] for unit in reversed(UNITS)]
    assert kernels == [KERNEL_NS[unit.kind] for unit in reversed(UNITS)]
    kernels, launches = times_by_name(profile_under(RESIDENT), names)
    assert launches == []
    assert sum(kernels) >= LAYERS * sum(LAUNCH_NS.values())
