"""What packing units takes and gives: their packed sizes, the decoder's rate, device memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from torch_offload import _C
from torch_offload.choice import (
    NOMINAL_DECODE_BYTES_PER_SECOND,
    NOMINAL_LINK_BYTES_PER_SECOND,
    RAW,
    Packable,
)
from torch_offload.exponents import count_exponents
from torch_offload.rates import format_byte_rate, parse_byte_rate
from torch_offload.units import UnitSpec

# A unit that packing does not shrink below this part of its bytes travels raw.
MAX_SHARE = 0.75
# What random normal bf16 weights come to, all side data counted: benchmarks/results/codec.json.
# Those of trained models come to as much, or a little less.
BF16_SHARE = 11.11 / 16


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
    source: str = "as measured on one H100, benchmarks/results/h100/codec.json"

    @classmethod
    def stated(cls, link_bytes_per_second: float, decode_rate: str | None) -> Rates:
        """Of a link, and of a decoder as ``--decode-rate`` says it.

        Raises:
            ValueError: If that is no rate.
        """
        if decode_rate is None:
            return cls(link_bytes_per_second)
        rate = parse_byte_rate(decode_rate, "--decode-rate")
        return cls(link_bytes_per_second, rate, "as stated")

    @property
    def with_share(self) -> str:
        """The same for sizes that were estimated."""
        return f"packed: {self.sentence}; bf16 in {BF16_SHARE:.3f} of its bytes"

    @property
    def sentence(self) -> str:
        """For people, without a full stop."""
        return (
            f"copies at {format_byte_rate(self.link_bytes_per_second)}, decoder at "
            f"{format_byte_rate(self.decode_bytes_per_second)}, {self.source}"
        )

    def packable(self, transport: str, packed_bytes: Sequence[int]) -> Packable:
        """What the planner has to know of units that take so much packed."""
        if transport == "raw":
            return RAW
        return Packable(
            "auto" if transport == "auto" else "packed",
            packed_bytes,
            self.decode_bytes_per_second,
            self.link_bytes_per_second,
        )


class Packing:
    """How the units of one model may travel, and what they take packed.

    Each weight is read once, and its counts are kept for whoever packs it: weights that are edited
    later may come to more, and travel raw until `count_anew`.

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
        self._counts: dict[str, torch.Tensor | None] = {}  # by name of the parameter

    @property
    def basis(self) -> str:
        """Where choices come from, or why there are none; "" where raw was asked for."""
        return self.remark or ("" if self.transport == "raw" else self.rates.sentence)

    def streaming(self) -> Packing:
        """The same, for plans in which units must be free to travel."""
        if self.transport != "packed_resident":
            return self
        streaming = Packing("packed", self.rates)
        streaming._known, streaming._counts = self._known, self._counts
        return streaming

    def packable(self, specs: Sequence[UnitSpec]) -> Packable:
        """What the planner has to know of these units. Blocks while weights are read."""
        if self.transport == "raw":
            return RAW
        packed_bytes = [self._packed_bytes(spec) for spec in specs]
        return self.rates.packable(self.transport, packed_bytes)

    def count_anew(self, specs: Sequence[UnitSpec], blob_bytes: Mapping[str, int]) -> None:
        """Forgets what units took before weights were edited. Blocks while weights are read.

        Args:
            specs: All units.
            blob_bytes: Of those whose weights are nowhere but in their blob, by name: they are not
                read.
        """
        if self.transport == "raw":
            return
        known: dict[tuple[str, ...], int] = {}
        for spec in specs:
            key = _key_of(spec)
            tensors = [parameter for _, parameter in spec.parameters]
            try:
                if spec.name in blob_bytes:
                    room = _C.packed_room_bytes(blob_bytes[spec.name])
                    known[key] = _where_it_pays(room, tensors)
                else:
                    known[key] = packed_bytes_of(spec.parameters, {})
            except RuntimeError:
                # No memory where they lie, or weights that nobody can read as they are now: these
                # the engine takes, or refuses by name.
                if key in self._known:
                    known[key] = self._known[key]
        # In place, as plans in which units must be free to travel share it; see `streaming`.
        self._known.clear()
        self._known.update(known)
        self._counts.clear()

    def take_counts(self, positions: Mapping[str, int]) -> list[torch.Tensor | None]:
        """What was counted, by the position of each parameter, for weights that are unchanged.

        It is a 500th of the weights, and forgotten with this.
        """
        taken: list[torch.Tensor | None] = [None] * len(positions)
        for name, counts in self._counts.items():
            if name in positions:
                taken[positions[name]] = counts
        self._counts.clear()
        return taken

    def _packed_bytes(self, spec: UnitSpec) -> int:
        key = _key_of(spec)
        if key not in self._known:
            self._known[key] = packed_bytes_of(spec.parameters, self._counts)
        return self._known[key]


def _key_of(spec: UnitSpec) -> tuple[str, ...]:
    return tuple(name for name, _ in spec.parameters)


def packed_bytes_of(
    parameters: Sequence[tuple[str, torch.Tensor]], counts: dict[str, torch.Tensor | None]
) -> int:
    """What a unit of these takes packed, slack included; 0 where packing does not pay.

    Exact, for which weights are read; of those on ``meta`` an estimate.

    Args:
        parameters: By name.
        counts: Of those that have been read; others are added.
    """
    tensors = [parameter for _, parameter in parameters]
    is_packable = any(tensor.dtype == torch.bfloat16 for tensor in tensors)
    if not is_packable or any(tensor.is_meta for tensor in tensors):
        return estimated_bytes(tensors)
    for name, tensor in parameters:
        if name not in counts:
            counts[name] = count_exponents(tensor)
    room = _C.packed_room([tensor.nbytes for tensor in tensors], [counts[n] for n, _ in parameters])
    return _where_it_pays(room, tensors)


def estimated_bytes(parameters: Sequence[torch.Tensor]) -> int:
    """The same from types and sizes alone: what bf16 comes to as a rule."""
    shares = ((p.nbytes, BF16_SHARE if p.dtype == torch.bfloat16 else 1) for p in parameters)
    packed = round(sum(n * share for n, share in shares))
    return _where_it_pays(_C.packed_room_bytes(packed), parameters)


def bf16_bytes(size_bytes: int) -> int:
    """Likewise of a unit that holds nothing but bf16."""
    return _C.packed_room_bytes(round(BF16_SHARE * size_bytes))


def _where_it_pays(packed: int, parameters: Sequence[torch.Tensor]) -> int:
    whole = sum(_C.aligned_size(parameter.nbytes) for parameter in parameters)
    return packed if packed <= MAX_SHARE * whole else 0


def staging_bytes(plan: _C.Plan, packed_bytes: Sequence[int]) -> int:
    """The ring that copies of a plan's packed units pass through on the device."""
    return plan.staging_slots * max(_sizes_of("packed", plan, packed_bytes), default=0)


def packed_resident_bytes(plan: _C.Plan, packed_bytes: Sequence[int]) -> int:
    """What units take on the device that stay there packed."""
    return sum(_sizes_of("packed_resident", plan, packed_bytes))


def held_bytes(plan: _C.Plan, packed_bytes: Sequence[int]) -> int:
    """What a plan's units take on the device: window, ring, and those that stay, packed or not."""
    kept = plan.resident_bytes + packed_resident_bytes(plan, packed_bytes)
    return plan.window_bytes + staging_bytes(plan, packed_bytes) + kept


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
