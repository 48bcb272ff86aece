"""Predictions: how long a forward takes with a plan, before anybody owns the GPU for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch_offload import _C
from torch_offload.bounds import Bound, bound_of
from torch_offload.choice import RAW, Packable, choose, choose_transports
from torch_offload.packing import (
    copied_bytes,
    held_bytes,
    packed_host_bytes,
    packed_masters_bytes,
    packed_resident_bytes,
    staging_bytes,
)
from torch_offload.simulate import Run, run_plan, streams_for

# A cold pass, one that learns the seam, and the one that is read off.
_PASSES = 3


@dataclass(frozen=True)
class Scenario:
    """What is to be predicted.

    Attributes:
        units: In the order in which a forward calls them.
        compute_ns: Of each unit.
        link_bytes_per_second: Of copies from page-locked memory.
        copy_ns: Measured raw copies of each unit; None to reckon them from the link's rate.
        launch_ns: What the host takes to launch the kernels of each unit; empty for nothing.
        mode: As in `offload`.
        streams: As in `offload`.
        depth_bytes: As in `offload`; None for the default.
        budget_bytes: What window and resident units may take; None streams every unit.
        outside_bytes: Weights that no unit holds; they are on the device in any case.
        sequence: Units of one forward as they are used; None for each once, in order.
        packable: How units may travel, and what they take packed.
        masters: As in `offload`.
    """

    units: Sequence[_C.Unit]
    compute_ns: Sequence[int]
    link_bytes_per_second: float
    copy_ns: Sequence[int] | None = None
    launch_ns: Sequence[int] = ()
    mode: str = "pipeline"
    streams: str = "shared"
    depth_bytes: int | None = None
    budget_bytes: int | None = None
    outside_bytes: int = 0
    sequence: Sequence[int] | None = None
    packable: Packable = RAW
    masters: str = "plain"

    def with_(self, **changes: Any) -> Scenario:
        """The same with something else."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Prediction:
    """What a scenario comes to.

    Attributes:
        scenario: It.
        plan: How the units lie.
        forward_ms: A forward in the steady state.
        cold_ms: The first one.
        streamed_bytes: Copied by each forward.
        compute_ms: Kernels of one forward.
        bound: What bounds it.
    """

    scenario: Scenario
    plan: _C.Plan
    forward_ms: float
    cold_ms: float
    streamed_bytes: int
    compute_ms: float
    bound: Bound

    @property
    def device_bytes(self) -> int:
        """Weights on the device: window, ring, what stays, and what no unit holds."""
        return self.scenario.outside_bytes + held_bytes(
            self.plan, self.scenario.packable.packed_bytes
        )

    @property
    def staging_bytes(self) -> int:
        """The ring that packed copies pass through on the device."""
        return staging_bytes(self.plan, self.scenario.packable.packed_bytes)

    @property
    def packed_resident_bytes(self) -> int:
        """Of units that stay packed on the device."""
        return packed_resident_bytes(self.plan, self.scenario.packable.packed_bytes)

    def to_json(self) -> dict[str, Any]:
        """What one wants to compare, as plain data."""
        scenario, plan = self.scenario, self.plan
        return {
            "mode": scenario.mode,
            "streams": scenario.streams,
            "forward_ms": self.forward_ms,
            "cold_ms": self.cold_ms,
            "compute_ms": self.compute_ms,
            "link_ms": self.streamed_bytes / scenario.link_bytes_per_second * 1e3,
            "link_bytes_per_second": scenario.link_bytes_per_second,
            "streamed_bytes": self.streamed_bytes,
            "device_bytes": self.device_bytes,
            "window_bytes": plan.window_bytes,
            "resident_bytes": plan.resident_bytes,
            "packed_resident_bytes": self.packed_resident_bytes,
            "staging_bytes": self.staging_bytes,
            "transports": list(plan.transports),
            "depth_bytes": plan.depth_bytes,
            "host_bytes": self.host_bytes,
            "bound": {
                "by": self.bound.by,
                "busy_share": self.bound.busy_share,
                "stall_share": self.bound.stall_share,
                "sentence": self.bound.sentence,
            },
        }

    @property
    def host_bytes(self) -> int:
        """Page-locked memory of the masters, and of what is packed beside them."""
        packed_bytes = self.scenario.packable.packed_bytes
        if self.scenario.masters == "packed":
            return packed_masters_bytes(self.plan, packed_bytes)
        masters = sum(
            unit.size_bytes
            for unit, place in zip(self.plan.units, self.plan.places, strict=True)
            if place is not None
        )
        return masters + packed_host_bytes(self.plan, packed_bytes)


def plan_for(scenario: Scenario) -> _C.Plan:
    """The plan that `offload` would make.

    Raises:
        ValueError: If the budget is below the least, which the message names.
    """
    if scenario.budget_bytes is None:
        plan = _C.make_plan(scenario.units, scenario.depth_bytes)
        if scenario.packable.transport == "raw":
            return plan
        return choose_transports(
            plan, scenario.packable, mode=scenario.mode, streams=scenario.streams
        ).plan
    return choose(
        scenario.units,
        budget_bytes=scenario.budget_bytes,
        depth_bytes=scenario.depth_bytes,
        mode=scenario.mode,
        streams=scenario.streams,
        packable=scenario.packable,
    ).plan


def predict(scenario: Scenario) -> Prediction:
    """Plans and simulates.

    Raises:
        ValueError: If the budget is below the least, which the message names.
    """
    return predict_plan(scenario, plan_for(scenario))


def predict_plan(scenario: Scenario, plan: _C.Plan) -> Prediction:
    """Simulates a plan that is made already; of the scenario, depth and budget say nothing then."""
    run = run_scenario(scenario, plan)
    attribution = run.attribution(_PASSES - 1)
    sequence = _sequence(scenario)
    copied = copied_bytes(plan, scenario.packable.packed_bytes)
    return Prediction(
        scenario=scenario,
        plan=plan,
        forward_ms=run.pass_ms(_PASSES - 1),
        cold_ms=run.pass_ms(0),
        streamed_bytes=sum(copied[unit] for unit in sequence),
        compute_ms=sum(scenario.compute_ns[unit] for unit in sequence) / 1e6,
        bound=bound_of(attribution),
    )


def predicted_ms(scenario: Scenario) -> tuple[float, int]:
    """Only how long a forward takes, and what window and resident units take on the device.

    Raises:
        ValueError: As `predict`.
    """
    plan = plan_for(scenario)
    run = run_scenario(scenario, plan, log=False)
    return run.pass_ms(_PASSES - 1), held_bytes(plan, scenario.packable.packed_bytes)


def run_scenario(
    scenario: Scenario, plan: _C.Plan, passes: int = _PASSES, *, log: bool = True
) -> Run:
    """Simulates a plan that is made already."""
    packable = scenario.packable
    copy_ns = None
    if scenario.copy_ns is not None:
        copied = copied_bytes(plan, packable.packed_bytes)
        copy_ns = [
            round(raw_ns * size / unit.size_bytes)
            for raw_ns, size, unit in zip(scenario.copy_ns, copied, plan.units, strict=True)
        ]
    costs = _C.SimCosts(
        copy_bytes_per_second=None if copy_ns else scenario.link_bytes_per_second,
        copy_ns=copy_ns,
        compute_ns=list(scenario.compute_ns),
        launch_ns=list(scenario.launch_ns),
        decode_bytes_per_second=packable.decode_bytes_per_second,
    )
    return run_plan(
        plan,
        costs,
        mode=scenario.mode,
        streams=streams_for(scenario.mode, scenario.streams),
        passes=[_sequence(scenario)] * passes,
        log=log,
        packed_bytes=packable.packed_bytes,
    )


def _sequence(scenario: Scenario) -> list[int]:
    if scenario.sequence is None:
        return list(range(len(scenario.units)))
    return list(scenario.sequence)
