"""From a profile to what the planner goes by: what each unit takes, resident ones too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch_offload import _C
from torch_offload.choice import Times
from torch_offload.profile import Profile, scenario_of, units_of


@dataclass(frozen=True)
class MeasuredTimes:
    """Durations by the names of units, so that they outlive a plan.

    Attributes:
        compute_ns: Of one use of each unit.
        copy_ns: Of a raw copy of each.
        sequence: Units as one forward used them; empty where some of them were resident, whose
            calls nobody sees.
    """

    compute_ns: dict[str, int]
    copy_ns: dict[str, int]
    sequence: tuple[str, ...]

    def knows(self, units: Sequence[_C.Unit]) -> bool:
        """Whether it is of these units, and perhaps of more."""
        return all(unit.name in self.compute_ns for unit in units)

    def of(self, units: Sequence[_C.Unit]) -> Times:
        """For some units, in their order.

        Raises:
            ValueError: If one of them was not measured.
        """
        if missing := [unit.name for unit in units if unit.name not in self.compute_ns]:
            raise ValueError(
                f"expected a profile of the units that there are, got none of {missing[0]!r} "
                f"({len(missing)} are missing); profile forwards with this granularity"
            )
        position = {unit.name: index for index, unit in enumerate(units)}
        sequence = [position[name] for name in self.sequence if name in position]
        return Times(
            [self.compute_ns[unit.name] for unit in units],
            [self.copy_ns[unit.name] for unit in units],
            sequence if len(set(sequence)) == len(units) else (),
        )


def measured_times(profile: Profile) -> MeasuredTimes:
    """What each unit takes, with its part of the time in which others' kernels ran.

    The kernels of a resident unit are not told apart from others'. It is taken to compute as long
    as measured units of its kind and size, or else of its size, and that much less was others'.
    """
    scenario = scenario_of(profile, units_of(profile))
    measured: dict[tuple[str, int], list[float]] = defaultdict(list)
    for unit in profile.units:
        if unit.times.uses:
            measured[unit.kind, unit.size_bytes].append(unit.times.compute_ns / unit.times.uses)
    whole_bytes = sum(unit.size_bytes for unit in profile.units if unit.times.uses)
    all_ns = sum(sum(times) for times in measured.values())
    per_byte = all_ns / whole_bytes if whole_bytes else 0.0

    def estimate(kind: str, size_bytes: int) -> float:
        alike = measured.get((kind, size_bytes))
        return sum(alike) / len(alike) if alike else per_byte * size_bytes

    compute = [
        unit.times.compute_ns / unit.times.uses
        if unit.times.uses
        else estimate(unit.kind, unit.size_bytes)
        for unit in profile.units
    ]
    others_ns = (profile.total.between_ns + profile.total.outside_ns) / max(
        1, profile.measured.forwards
    )
    hidden_ns = sum(
        ns for ns, unit in zip(compute, profile.units, strict=True) if not unit.times.uses
    )
    uses = len(profile.sequence) + sum(not unit.times.uses for unit in profile.units)
    others_each = max(0.0, others_ns - hidden_ns) / max(1, uses)
    names = [unit.name for unit in profile.units]
    copy_ns = scenario.copy_ns or [0] * len(names)
    return MeasuredTimes(
        {name: round(ns + others_each) for name, ns in zip(names, compute, strict=True)},
        dict(zip(names, copy_ns, strict=True)),
        tuple(names[unit] for unit in profile.sequence),
    )
