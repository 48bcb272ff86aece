"""What was planned, without the modules: what a handle may keep."""

from __future__ import annotations

from dataclasses import dataclass

from torch_offload import _C
from torch_offload.choice import Packable
from torch_offload.packing import estimated_bytes
from torch_offload.planning import Planned


@dataclass(frozen=True)
class Placed:
    """Where the weights of an offloaded model are.

    Attributes:
        plan: Of the units.
        parameters: Names of each unit's parameters.
        tables: Names of the tables that are gathered on the host, and their bytes.
        outside_bytes: On the device, of no unit.
        granularity: How the model is cut.
        rule: Why just these units stay; "" where nothing was to be chosen.
        alternatives: What other rules would have come to.
        gap: By which part one that was not tried could be faster, at the most.
        packable: What was known of packing the units.
        packing_basis: Where that is from; see `Planned`.
        planned_transports: How each unit was to travel, whatever the plan has come to since.
        packed_estimates: What each unit would come to packed, by its types and sizes; 0 where that
            would not pay.
    """

    plan: _C.Plan
    parameters: tuple[tuple[str, ...], ...]
    tables: dict[str, int]
    outside_bytes: int
    granularity: str
    rule: str
    alternatives: tuple[_C.Alternative, ...]
    gap: float
    packable: Packable
    packing_basis: str
    planned_transports: tuple[str, ...]
    packed_estimates: tuple[int, ...]

    @staticmethod
    def of(planned: Planned) -> Placed:
        """Of a plan."""
        choice = planned.choice
        return Placed(
            planned.plan,
            tuple(tuple(name for name, _ in spec.parameters) for spec in planned.specs),
            {table.name: table.size_bytes for table in planned.tables},
            planned.outside_bytes,
            planned.granularity,
            choice.rule if choice else "",
            tuple(choice.alternatives) if choice else (),
            choice.gap if choice else 0.0,
            planned.packable,
            planned.packing_basis,
            tuple(planned.plan.transports),
            tuple(estimated_bytes([p for _, p in spec.parameters]) for spec in planned.specs),
        )

    @property
    def no_longer_packed(self) -> tuple[str, ...]:
        """Units that were to be packed and are raw: edited, they take more than there is room."""
        ways = zip(self.plan.units, self.planned_transports, self.plan.transports, strict=True)
        return tuple(unit.name for unit, was, now in ways if was != "raw" and now == "raw")

    def is_like(self, other: Placed) -> bool:
        """Whether every weight is where it is in the other, and travels as it does there."""
        return self._lies() == other._lies()

    def _lies(self) -> tuple[object, ...]:
        plan = self.plan
        sizes = (plan.window_bytes, plan.depth_bytes, plan.decode_depth_bytes)
        return (self.parameters, plan.places, plan.transports, sizes, set(self.tables))
