"""What packing units takes and gives: their packed sizes, the decoder's rate, device memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_offload import _C
from torch_offload.choice import (
    NOMINAL_DECODE_BYTES_PER_SECOND,
    NOMINAL_LINK_BYTES_PER_SECOND,
    RAW,
    Packable,
)
from torch_offload.packed_parameter import is_packed, unpacked
from torch_offload.rates import format_byte_rate
from torch_offload.units import UnitSpec

# A unit that packing does not shrink below this part of its bytes travels raw.
MAX_SHARE = 0.75
# Of the staging ring: one is filled while another is decoded.
NUM_SLOTS = 2
# What random normal bf16 weights come to, all side data counted: benchmarks/results/codec.json.
# Those of trained models come to as much, or a little less.
BF16_SHARE = 11.11 / 16
# A packed unit is given this part more than it takes, for weights that are edited.
_SLACK = 1 / 64


@dataclass(frozen=True)
class Rates:
    """How fast weights are copied and decoded.

    Attributes:
        link_bytes_per_second: Of copies from page-locked memory.
        decode_bytes_per_second: Of what comes out of the decoder.
        source: Where that is from, for people.
    """

    link_bytes_per_second: float = NOMINAL_LINK_BYTES_PER_SECOND
    decode_bytes_per_second: float = NOMINAL_DECODE_BYTES_PER_SECOND
    source: str = "as measured on one H100, benchmarks/results/codec.json"

    @property
    def sentence(self) -> str:
        """For people, without a full stop."""
        return (
            f"copies at {format_byte_rate(self.link_bytes_per_second)}, decoder at "
            f"{format_byte_rate(self.decode_bytes_per_second)}, {self.source}"
        )


class Packing:
    """How the units of one model may travel, and what they take packed.

    Each unit is measured once: weights that are edited later may come to more, and travel raw then.

    Args:
        transport: As in `offload`.
        rates: Of link and decoder.
        remark: Why it is not what was asked for; "" if it is.
    """

    def __init__(
        self, transport: str = "raw", rates: Rates | None = None, remark: str = ""
    ) -> None:
        self.transport = transport
        self.rates = rates or Rates()
        self.remark = remark
        self._known: dict[tuple[str, ...], int] = {}

    @property
    def basis(self) -> str:
        """Where choices come from, or why there are none; "" where raw was asked for."""
        return self.remark or ("" if self.transport == "raw" else self.rates.sentence)

    def streaming(self) -> Packing:
        """The same, for plans in which units must be free to travel."""
        if self.transport != "packed_resident":
            return self
        streaming = Packing("packed", self.rates)
        streaming._known = self._known
        return streaming

    def packable(self, specs: Sequence[UnitSpec]) -> Packable:
        """What the planner has to know of these units. Blocks while weights are read."""
        if self.transport == "raw":
            return RAW
        return Packable(
            "auto" if self.transport == "auto" else "packed",
            [self._packed_bytes(spec) for spec in specs],
            self.rates.decode_bytes_per_second,
            self.rates.link_bytes_per_second,
        )

    def _packed_bytes(self, spec: UnitSpec) -> int:
        key = tuple(name for name, _ in spec.parameters)
        if key not in self._known:
            self._known[key] = packed_bytes_of([parameter for _, parameter in spec.parameters])
        return self._known[key]


def packed_bytes_of(parameters: Sequence[torch.Tensor]) -> int:
    """What a unit of these takes packed, slack included; 0 where packing does not pay.

    Exact, for which weights are read; of those on ``meta`` an estimate.
    """
    is_packable = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    if not is_packable or any(parameter.is_meta for parameter in parameters):
        return estimated_bytes(parameters)
    # As they lie in memory: that is how they are packed.
    plain = (unpacked(p) if is_packed(p) else p.detach() for p in parameters)
    flat = [tensor.as_strided((tensor.numel(),), (1,)).cpu() for tensor in plain]
    return _where_it_pays(_C.packed_room(flat), parameters)


def estimated_bytes(parameters: Sequence[torch.Tensor]) -> int:
    """The same from types and sizes alone: what bf16 comes to as a rule."""
    shares = ((p.nbytes, BF16_SHARE if p.dtype == torch.bfloat16 else 1) for p in parameters)
    return _where_it_pays(with_slack(round(sum(n * share for n, share in shares))), parameters)


def _where_it_pays(packed: int, parameters: Sequence[torch.Tensor]) -> int:
    whole = sum(_C.aligned_size(parameter.nbytes) for parameter in parameters)
    return packed if packed <= MAX_SHARE * whole else 0


def with_slack(packed_bytes: int) -> int:
    """Room for weights that pack a little worse once they are edited."""
    return _C.aligned_size(packed_bytes + int(packed_bytes * _SLACK))


def staging_bytes(plan: _C.Plan, packed_bytes: Sequence[int]) -> int:
    """The ring that copies of a plan's packed units pass through on the device."""
    return NUM_SLOTS * max(_sizes_of("packed", plan, packed_bytes), default=0)


def packed_resident_bytes(plan: _C.Plan, packed_bytes: Sequence[int]) -> int:
    """What units take on the device that stay there packed."""
    return sum(_sizes_of("packed_resident", plan, packed_bytes))


def packed_host_bytes(plan: _C.Plan, packed_bytes: Sequence[int]) -> int:
    """Page-locked memory of packed units beside plain masters: those that stay share one piece."""
    travel = _sizes_of("packed", plan, packed_bytes)
    return sum(travel) + max(_sizes_of("packed_resident", plan, packed_bytes), default=0)


def packed_masters_bytes(plan: _C.Plan, packed_bytes: Sequence[int]) -> int:
    """Page-locked memory of packed masters, at the most: those of raw units are plain."""
    return sum(
        unit.size_bytes if way == "raw" else _C.aligned_size(packed_bytes[index])
        for index, (unit, place, way) in enumerate(
            zip(plan.units, plan.places, plan.transports, strict=True)
        )
        if place is not None
    )


def copied_bytes(plan: _C.Plan, packed_bytes: Sequence[int]) -> list[int]:
    """What a copy of each unit carries; 0 for one that stays on the device, packed or not."""
    copied = []
    for index, (unit, place, way) in enumerate(
        zip(plan.units, plan.places, plan.transports, strict=True)
    ):
        if place is None or way == "packed_resident":
            copied.append(0)
        else:
            copied.append(packed_bytes[index] if way == "packed" else unit.size_bytes)
    return copied


def _sizes_of(way: str, plan: _C.Plan, packed_bytes: Sequence[int]) -> list[int]:
    return [
        _C.aligned_size(packed_bytes[index])
        for index, transport in enumerate(plan.transports)
        if transport == way
    ]
