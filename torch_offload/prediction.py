"""Predictions: how long a forward takes with a plan, before anybody owns the GPU for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch_offload import _C
from torch_offload.bounds import Bound, bound_of
from torch_offload.choice import choose
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
        copy_ns: Measured copies of each unit; None to reckon them from the link's rate.
        mode: As in `offload`.
        streams: As in `offload`.
        depth_bytes: As in `offload`; None for the default.
        budget_bytes: What window and resident units may take; None streams every unit.
        outside_bytes: Weights that no unit holds; they are on the device in any case.
        sequence: Units of one forward as they are used; None for each once, in order.
    """

    units: Sequence[_C.Unit]
    compute_ns: Sequence[int]
    link_bytes_per_second: float
    copy_ns: Sequence[int] | None = None
    mode: str = "pipeline"
    streams: str = "shared"
    depth_bytes: int | None = None
    budget_bytes: int | None = None
    outside_bytes: int = 0
    sequence: Sequence[int] | None = None

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
        """Weights on the device: window, resident units, and what no unit holds."""
        return self.plan.window_bytes + self.plan.resident_bytes + self.scenario.outside_bytes

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
        """Page-locked memory of the masters."""
        return sum(
            unit.size_bytes
            for unit, place in zip(self.plan.units, self.plan.places, strict=True)
            if place is not None
        )


def plan_for(scenario: Scenario) -> _C.Plan:
    """The plan that `offload` would make.

    Raises:
        ValueError: If the budget is below the least, which the message names.
    """
    if scenario.budget_bytes is None:
        return _C.make_plan(scenario.units, scenario.depth_bytes)
    return choose(
        scenario.units,
        budget_bytes=scenario.budget_bytes,
        depth_bytes=scenario.depth_bytes,
        mode=scenario.mode,
        streams=scenario.streams,
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
    streamed = sum(plan.units[u].size_bytes for u in sequence if plan.places[u] is not None)
    return Prediction(
        scenario=scenario,
        plan=plan,
        forward_ms=run.pass_ms(_PASSES - 1),
        cold_ms=run.pass_ms(0),
        streamed_bytes=streamed,
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
    return run.pass_ms(_PASSES - 1), plan.window_bytes + plan.resident_bytes


def run_scenario(
    scenario: Scenario, plan: _C.Plan, passes: int = _PASSES, *, log: bool = True
) -> Run:
    """Simulates a plan that is made already."""
    copy_ns = None if scenario.copy_ns is None else list(scenario.copy_ns)
    costs = _C.SimCosts(
        copy_bytes_per_second=None if copy_ns else scenario.link_bytes_per_second,
        copy_ns=copy_ns,
        compute_ns=list(scenario.compute_ns),
    )
    return run_plan(
        plan,
        costs,
        mode=scenario.mode,
        streams=streams_for(scenario.mode, scenario.streams),
        passes=[_sequence(scenario)] * passes,
        log=log,
    )


def _sequence(scenario: Scenario) -> list[int]:
    if scenario.sequence is None:
        return list(range(len(scenario.units)))
    return list(scenario.sequence)
