"""Which units travel packed, and which stay packed on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch_offload import _C
from torch_offload.config import Config
from torch_offload.planning import Cut, Planned, least_budget, plan_cut
from torch_offload.sizes import format_size
from torch_offload.transport import MAX_SHARE, NUM_SLOTS, staging_bytes
from torch_offload.units import UnitSpec


def plan_packed(cut: Cut, config: Config, budget: int | None) -> Planned:
    """As `plan_cut`, with units that travel packed, and within a budget such that stay packed.

    As few units travel as the budget allows, spread evenly over the order; the others stay packed.
    Where none has to travel, what is left of the budget keeps units as they are; and where less is
    copied with the raw plan's residents, these stay.

    Args:
        cut: Of the model.
        config: With ``transport="packed_resident"``, nothing travels and everything stays packed.
        budget: For everything on the device; None lets every unit travel.

    Raises:
        ValueError: If the budget is below the least, which the message names.
    """
    stays = config.transport == "packed_resident"
    if budget is None:
        planned = plan_cut(cut, config, None)
        return _Packing(cut, planned).planned_with(0) if stays else pack_streamed(planned)
    beside = max(0, budget - staging_bytes(cut.specs, packs=True))
    planned = plan_cut(cut, config, max(beside, least_budget(cut)) if stays else beside)
    packing = _Packing(cut, planned)
    if stays:
        found = packing.planned_with(0)
        if packing.device_bytes(found) > budget:
            least = packing.device_bytes(found)
            raise ValueError(
                f"expected gpu_budget of at least {least} bytes ({format_size(least)}: what always "
                f"stays, all units packed, and a window to decode into), got {budget} bytes "
                f"({format_size(budget)}); raise it, or use transport='packed'"
            )
        return found
    return packing.within(budget)


def pack_streamed(planned: Planned) -> Planned:
    """The same places, for units that travel packed."""
    plan = planned.plan
    resident = [place is None for place in plan.places]
    transports = ["raw" if stays else "packed" for stays in resident]
    return replace(planned, plan=_laid(plan, resident, transports, plan.window_bytes))


@dataclass(frozen=True)
class _Packing:
    """The units of a cut that may be packed, and the plan that knows nothing of that."""

    cut: Cut
    raw: Planned

    @cached_property
    def _rooms(self) -> list[int | None]:
        return [_room(spec) for spec in self.raw.specs]

    @cached_property
    def _candidates(self) -> list[int]:
        """Units of layers, and a head where it streams; one that stays may be tied to a table."""
        return [
            index
            for index, place in enumerate(self.raw.plan.places)
            if (index < len(self.cut.specs) or place is not None) and self._rooms[index] is not None
        ]

    def planned_with(self, num_travelling: int, num_plain: int = 0) -> Planned:
        """So many units travel packed, so many of the others stay as they are; the rest packed."""
        candidates = self._candidates
        travelling = _spread(candidates, num_travelling)
        staying = [index for index in candidates if index not in travelling]
        plain = _spread(staying, num_plain)
        places = self.raw.plan.places
        resident = [place is None for place in places]
        transports = ["raw"] * len(places)
        for index in candidates:
            resident[index] = index in plain
            if index not in plain:
                transports[index] = "packed" if index in travelling else "packed_resident"
        plan = _laid(self.raw.plan, resident, transports)
        return replace(self.raw, plan=plan)

    def device_bytes(self, planned: Planned) -> int:
        """All weights on the device, window, ring and packed units included."""
        rooms = {"raw": [0], "packed": [0], "packed_resident": [0]}
        for room, transport in zip(self._rooms, planned.plan.transports, strict=True):
            rooms[transport].append(room or 0)
        ring = NUM_SLOTS * max(rooms["packed"])
        return planned.device_bytes + ring + sum(rooms["packed_resident"])

    def _copied_bytes(self, planned: Planned) -> int:
        """What one forward copies."""
        plan = planned.plan
        return sum(
            unit.size_bytes if transport == "raw" or room is None else room
            for unit, place, transport, room in zip(
                plan.units, plan.places, plan.transports, self._rooms, strict=True
            )
            if place is not None and transport != "packed_resident"
        )

    def within(self, budget: int) -> Planned:
        """As few as possible travel; if none has to, as many as possible stay as they are."""
        count = len(self._candidates)

        def fits(planned: Planned) -> bool:
            return self.device_bytes(planned) <= budget

        travelling = _first(count + 1, lambda number: fits(self.planned_with(number)))
        plain_or_packed = pack_streamed(self.raw)
        if travelling is None:
            return plain_or_packed
        if travelling > 0:
            return min(self.planned_with(travelling), plain_or_packed, key=self._copied_bytes)
        packed = _first(count + 1, lambda number: fits(self.planned_with(0, count - number)))
        assert packed is not None
        return self.planned_with(0, count - packed)


def _laid(
    plan: _C.Plan,
    resident: Sequence[bool],
    transports: Sequence[str],
    window_bytes: int | None = None,
) -> _C.Plan:
    return _C.make_plan(
        plan.units,
        plan.depth_bytes if window_bytes else 0,  # packed copies run ahead in the staging ring
        window_bytes=window_bytes,
        resident=resident,
        transports=transports,
    )


def _room(spec: UnitSpec) -> int | None:
    """What the unit takes packed: measured, or at most; None where packing does not pay."""
    size_bytes = sum(_C.aligned_size(parameter.nbytes) for _, parameter in spec.parameters)
    most = int(MAX_SHARE * size_bytes)
    tensors = [parameter.detach() for _, parameter in spec.parameters]
    if not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return most
    room = _C.packed_room(tensors)
    return room if room <= most else None


def _spread(indices: Sequence[int], number: int) -> set[int]:
    """So many of them, at even distances."""
    count = len(indices)
    return {
        index
        for position, index in enumerate(indices)
        if (position + 1) * number // count > position * number // count
    }


def _first(stop: int, is_true: Callable[[int], bool]) -> int | None:
    """The first number below `stop` from which on it is true, if it comes true once; or None."""
    low, high = 0, stop
    while low < high:
        middle = (low + high) // 2
        if is_true(middle):
            high = middle
        else:
            low = middle + 1
    return low if low < stop else None
