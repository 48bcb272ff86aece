"""From a profile to what the planner goes by: what each unit takes, resident ones too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch_offload import _C
from torch_offload.choice import Times
from torch_offload.kernel_times import kernel_times
from torch_offload.profile import Profile, scenario_of, units_of


@dataclass(frozen=True)
class MeasuredTimes:
    """Durations by the names of units, so that they outlive a plan.

    Attributes:
        compute_ns: Of one use of each unit.
        copy_ns: Of a raw copy of each.
        sequence: Units as one forward used them; empty where some of them were resident, whose
            calls nobody sees.
        launch_ns: What the host takes to launch the kernels of each; empty where that is in
            `compute_ns`.
    """

    compute_ns: dict[str, int]
    copy_ns: dict[str, int]
    sequence: tuple[str, ...]
    launch_ns: dict[str, int] = field(default_factory=dict)

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
                f"expected a profile with times for every unit, got none for {missing[0]!r} "
                f"({len(missing)} units have none); profile forwards with this granularity"
            )
        position = {unit.name: index for index, unit in enumerate(units)}
        sequence = [position[name] for name in self.sequence if name in position]
        return Times(
            [self.compute_ns[unit.name] for unit in units],
            [self.copy_ns[unit.name] for unit in units],
            sequence if len(set(sequence)) == len(units) else (),
            [self.launch_ns[unit.name] for unit in units] if self.launch_ns else (),
        )


def measured_times(profile: Profile) -> MeasuredTimes:
    """What each unit takes, with its part of the time in which others' kernels ran.

    The kernels of a resident unit are not told apart from others'. It is taken to compute as long
    as measured units of its kind and size, or else of its size, and that much less was others'.
    Likewise for what launching takes, which does not go by size.
    """
    kernels = kernel_times(profile)
    units = profile.units
    names = [unit.name for unit in units]
    used_bytes = sum(unit.size_bytes for unit in units if unit.times.uses)
    per_byte = sum(kernels.compute_ns) / used_bytes if used_bytes else 0.0
    compute = _with_residents(
        profile,
        kernels.compute_ns,
        kernels.others_ns,
        [per_byte * unit.size_bytes for unit in units],
    )
    launch = [0.0] * len(units)
    if kernels.launch_ns:
        used = [ns for ns, unit in zip(kernels.launch_ns, units, strict=True) if unit.times.uses]
        launch = _with_residents(
            profile,
            kernels.launch_ns,
            kernels.launch_others_ns,
            [sum(used) / max(1, len(used))] * len(units),
        )
    copy_ns = scenario_of(profile, units_of(profile)).copy_ns or [0] * len(names)
    return MeasuredTimes(
        {name: round(ns) for name, ns in zip(names, compute, strict=True)},
        dict(zip(names, copy_ns, strict=True)),
        tuple(names[unit] for unit in profile.sequence),
        {name: round(ns) for name, ns in zip(names, launch, strict=True)}
        if kernels.launch_ns
        else {},
    )


def _with_residents(
    profile: Profile,
    measured_ns: Sequence[float],
    others_ns: float,
    otherwise_ns: Sequence[float],
) -> list[float]:
    """What one use of each unit takes, its part of what is nobody's included.

    Args:
        profile: Whose units.
        measured_ns: Of each that was seen.
        others_ns: Of what lies between two uses that were seen, resident units included.
        otherwise_ns: Of a resident unit that is like no unit that was seen.
    """
    units, seen_uses = profile.units, len(profile.sequence)
    alike: dict[tuple[str, int], list[float]] = defaultdict(list)
    for unit, ns in zip(units, measured_ns, strict=True):
        if unit.times.uses:
            alike[unit.kind, unit.size_bytes].append(ns)
    each, hidden_ns = [], 0.0
    for unit, ns, otherwise in zip(units, measured_ns, otherwise_ns, strict=True):
        if unit.times.uses:
            each.append(ns)
            continue
        known = alike.get((unit.kind, unit.size_bytes))
        each.append(sum(known) / len(known) if known else otherwise)
        hidden_ns += each[-1]
    uses = seen_uses + sum(not unit.times.uses for unit in units)
    others_each = max(0.0, seen_uses * others_ns - hidden_ns) / max(1, uses)
    return [ns + others_each for ns in each]
