"""From a model and a budget to a plan: what streams, what stays, what is gathered on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from torch_offload import _C
from torch_offload.choice import RAW, Packable, Times, choose, choose_transports
from torch_offload.config import Config
from torch_offload.measured_times import MeasuredTimes
from torch_offload.packing import Packing, held_bytes, packed_resident_bytes, staging_bytes
from torch_offload.sizes import format_size
from torch_offload.storage import pieces
from torch_offload.tables import Outsiders, Table, find_outsiders
from torch_offload.units import Granularity, UnitSpec, find_units, leaf_units

# What gathering on the host adds to a forward: the host waits for the indices, and a small copy.
_GATHER_NS = 200_000
# A plan that is no faster than this does not pay for more, or odder, pieces.
_WORTHWHILE = 0.995


@dataclass(frozen=True)
class Planned:
    """How a model is to lie.

    Attributes:
        specs: All units, heads last.
        plan: For them, in this order.
        tables: Embeddings that are gathered on the host.
        outside_bytes: Weights and buffers that stay on the device and belong to no unit.
        granularity: ``"sublayer"``, ``"layer"`` or ``"module"``.
        choice: How the planner came to it; None where nothing was to be chosen.
        packable: What it knew of packing them.
        packing_basis: At which rates it was chosen what is packed, or why nothing is; "" for raw.
    """

    specs: tuple[UnitSpec, ...]
    plan: _C.Plan
    tables: tuple[Table, ...]
    outside_bytes: int
    granularity: Granularity
    choice: _C.Choice | None = None
    packable: Packable = RAW
    packing_basis: str = ""

    @property
    def staging_bytes(self) -> int:
        """The ring that packed copies pass through."""
        return staging_bytes(self.plan, self.packable.packed_bytes)

    @property
    def packed_resident_bytes(self) -> int:
        """Of units that stay packed on the device."""
        return packed_resident_bytes(self.plan, self.packable.packed_bytes)

    @property
    def device_bytes(self) -> int:
        """All weights on the device, window and ring included."""
        return self.outside_bytes + held_bytes(self.plan, self.packable.packed_bytes)


@dataclass(frozen=True)
class Cut:
    """A model, cut into units, and what is large beside them.

    Attributes:
        model: It.
        specs: Units of the layers.
        outsiders: Heads and tables that may leave the device, should a budget ask for it.
        granularity: How it was cut.
    """

    model: nn.Module
    specs: tuple[UnitSpec, ...]
    outsiders: Outsiders
    granularity: Granularity

    @property
    def units(self) -> list[_C.Unit]:
        """All units, heads last, as the core knows them."""
        return planned_units((*self.specs, *self.outsiders.heads))


def cut_model(model: nn.Module, config: Config, *, knows_leaves: bool = False) -> list[Cut]:
    """Cuts a model as the options say; for ``granularity="auto"`` in each way that it may be cut.

    Args:
        model: With weights or on ``meta``.
        config: Of `offload`.
        knows_leaves: Whether leaves are to be taken for proven, as in predictions.
    """
    auto = config.granularity == "auto"
    granularity: Granularity = "sublayer" if config.granularity == "auto" else config.granularity
    specs = find_units(model, granularity, config.units, config.resident)
    outsiders = Outsiders()
    if config.units is None:  # who names the units says what streams: nothing else does then
        outsiders = find_outsiders(model, specs, config.resident)
    leaves = leaf_specs(model, specs) if auto or granularity == "module" else []
    if granularity == "module" and knows_leaves:
        specs = leaves
    cuts = [Cut(model, tuple(specs), outsiders, granularity)]
    if auto and len(leaves) > len(specs):
        cuts.append(Cut(model, tuple(leaves), outsiders, "module"))
    return cuts


def planned_units(specs: Sequence[UnitSpec]) -> list[_C.Unit]:
    """Returns the units as the core knows them, each parameter aligned."""
    return [
        _C.Unit(
            name=spec.name,
            size_bytes=sum(_C.aligned_size(parameter.nbytes) for _, parameter in spec.parameters),
            layer_index=spec.layer_index,
            kind=spec.kind,
        )
        for spec in specs
    ]


def streamed_units(planned: Planned) -> list[tuple[int, UnitSpec]]:
    """The units that have a place, each with its position among all."""
    places = planned.plan.places
    return [(i, spec) for i, spec in enumerate(planned.specs) if places[i] is not None]


def plan_cut(
    cut: Cut,
    config: Config,
    budget: int | None,
    packing: Packing | None = None,
    times: MeasuredTimes | None = None,
) -> Planned:
    """Plans one cut within a budget for everything; without one nothing of the units stays.

    Args:
        cut: Of the model.
        config: Of `offload`.
        budget: For everything on the device; None streams every unit of the layers.
        packing: How units may travel; None for raw.
        times: Of a profile; None for what is expected before any forward has run.

    Raises:
        ValueError: If the budget is below the least, which the message names, or if a unit has no
            times.
    """
    packing = packing or Packing()
    if packing.transport == "packed_resident":
        return _all_packed(cut, config, budget, packing)
    if budget is None:
        return _without_budget(cut, config, packing, times)
    found: list[tuple[list[float], Planned]] = []
    for gathers in (False, True):
        if gathers and not cut.outsiders.tables:
            continue
        planned = _within(cut, config, budget, packing, times, gathers=gathers)
        if planned is not None and planned.choice is not None:
            gathering_ns = _GATHER_NS if planned.tables else 0
            forward_ns = [float(ns + gathering_ns) for ns in planned.choice.forward_ns]
            found.append((forward_ns, planned))
    if not found:
        raise ValueError(_below_least(cut, budget, packing))
    (best, chosen), *others = found
    for forward_ns, planned in others:
        if _pays(best, forward_ns):
            best, chosen = forward_ns, planned
    return chosen


def _pays(now_ns: Sequence[float], then_ns: Sequence[float]) -> bool:
    """Whether the expected forwards take so much less then, each counting alike.

    Their sum would say nothing of a token's: beside a prompt's it is short where little streams.
    """
    ratios = [then / now for now, then in zip(now_ns, then_ns, strict=True) if now > 0]
    return sum(ratios) < len(ratios) * _WORTHWHILE


def plan_in_window(
    cut: Cut, config: Config, window_bytes: int, packing: Packing | None = None
) -> Planned:
    """Lays the units of a cut into a window that is there; heads and tables stay."""
    resident = [False] * len(cut.specs) + [True] * len(cut.outsiders.heads)
    depth = _depth_of(cut, config)
    plan = _C.make_plan(cut.units, depth, window_bytes=window_bytes, resident=resident)
    return _in_places(cut, config, plan, packing or Packing(), None)


def plan_best(
    cuts: Sequence[Cut], config: Config, budget: int | None, packing: Packing | None = None
) -> Planned:
    """Plans the cut that does best; the first one where another does not pay.

    Raises:
        ValueError: As `plan_cut`, for the first cut: a model runs by that one until leaves are
            known.
    """
    first, *others = cuts
    chosen = plan_cut(first, config, budget, packing)
    for cut in others:
        try:
            planned = plan_cut(cut, config, budget, packing)
        except ValueError:  # small weights that stay beside leaves take more than there is
            continue
        now, then = chosen.choice, planned.choice
        if now and then and _pays(now.forward_ns, then.forward_ns):
            chosen = planned
    return chosen


def least_budget(cut: Cut, packing: Packing | None = None) -> int:
    """The least budget for everything that `plan_cut` accepts."""
    packing = packing or Packing()
    if packing.transport == "packed_resident":
        return _all_packed(cut, Config(), None, packing).device_bytes
    packable = packing.packable((*cut.specs, *cut.outsiders.heads))
    leasts = []
    for gathers in (False, True):
        free, outside = _freedom(cut, gathers=gathers)
        leasts.append(outside + _least_of(_only(cut.units, free), packable.of(free)))
    return min(leasts)


def _least_of(units: Sequence[_C.Unit], packable: Packable) -> int:
    return _C.least_budget_bytes(units, packable.transport, packable.packed_bytes)


def _only(units: Sequence[_C.Unit], free: Sequence[bool]) -> list[_C.Unit]:
    return [unit for unit, is_free in zip(units, free, strict=True) if is_free]


def _measured(units: Sequence[_C.Unit], times: MeasuredTimes | None) -> Times | None:
    return None if times is None else times.of(units)


def _freedom(cut: Cut, *, gathers: bool) -> tuple[list[bool], int]:
    """Which units may stream, and what stays on the device beside all of them."""
    heads = cut.outsiders.heads
    # A tied table is where its head is: with the table on the device, the head stays as well.
    tied = {table.head for table in cut.outsiders.tables if table.head} if not gathers else set()
    free = [True] * len(cut.specs) + [head.name not in tied for head in heads]
    specs = [spec for spec, is_free in zip((*cut.specs, *heads), free, strict=True) if is_free]
    gone = {id(table.weight) for table in cut.outsiders.tables} if gathers else set()
    return free, bytes_outside(cut.model, specs, gone)


def _within(
    cut: Cut,
    config: Config,
    budget: int,
    packing: Packing,
    times: MeasuredTimes | None,
    *,
    gathers: bool,
) -> Planned | None:
    free, outside = _freedom(cut, gathers=gathers)
    units, specs = cut.units, (*cut.specs, *cut.outsiders.heads)
    chosen_from = _only(units, free)
    packable = packing.packable(specs)
    if budget < outside + _least_of(chosen_from, packable.of(free)):
        return None
    choice = choose(
        chosen_from,
        budget_bytes=budget - outside,
        depth_bytes=config.depth_bytes,
        mode=config.mode,
        streams=config.streams,
        packable=packable.of(free),
        times=_measured(chosen_from, times),
    )
    chosen = iter(zip(choice.plan.places, choice.plan.transports, strict=True))
    homes = [next(chosen) if is_free else (None, "raw") for is_free in free]
    resident = [place is None for place, _ in homes]
    plan = _C.make_plan(
        units,
        choice.plan.depth_bytes,
        window_bytes=choice.plan.window_bytes,
        resident=resident,
        transports=[transport for _, transport in homes],
        decode_depth_bytes=choice.plan.decode_depth_bytes,
        one_ring=choice.plan.one_ring,
        staging_slots=choice.plan.staging_slots,
    )
    streamed = {spec.name for spec, stays in zip(specs, resident, strict=True) if not stays}
    tables = cut.outsiders.tables if gathers else ()
    # A tied table whose head stays is on the device with it.
    tables = tuple(table for table in tables if not table.head or table.head in streamed)
    held = sum(unit.size_bytes for unit, is_free in zip(units, free, strict=True) if not is_free)
    return Planned(
        specs, plan, tables, outside - held, cut.granularity, choice, packable, packing.basis
    )


def _without_budget(
    cut: Cut, config: Config, packing: Packing, times: MeasuredTimes | None
) -> Planned:
    """Every unit of the layers streams, heads and tables stay.

    For ``granularity="module"`` the units are still the sublayers, because only forwards prove
    leaves; the window is already as small as leaves need it, or as the largest sublayer.
    """
    units = cut.units
    num_heads = len(cut.outsiders.heads)
    resident = [False] * len(cut.specs) + [True] * num_heads
    window = None
    if cut.granularity == "module":
        leaves = planned_units(leaf_specs(cut.model, cut.specs))
        window = max(
            _C.make_plan(leaves, config.depth_bytes).window_bytes,
            *(unit.size_bytes for unit in units[: len(cut.specs)]),
        )
    depth = _depth_of(cut, config)
    plan = _C.make_plan(units, depth, window_bytes=window, resident=resident)
    return _in_places(cut, config, plan, packing, times)


def _depth_of(cut: Cut, config: Config) -> int:
    """How far copies may run ahead; by default of the layers alone: a head stays here."""
    if config.depth_bytes is not None:
        return config.depth_bytes
    return _C.make_plan(cut.units[: len(cut.specs)]).depth_bytes


def _all_packed(cut: Cut, config: Config, budget: int | None, packing: Packing) -> Planned:
    """Every unit of the layers that can be packed stays so; the others stream, heads stay.

    Raises:
        ValueError: If that is more than the budget.
    """
    planned = _without_budget(cut, config, Packing(), None)
    packable = packing.packable(planned.specs)
    num_units = len(cut.specs)
    ways = [
        "packed_resident" if size > 0 and index < num_units else "raw"
        for index, size in enumerate(packable.packed_bytes)
    ]
    plan = _C.make_plan(
        cut.units,
        planned.plan.depth_bytes,
        resident=[place is None for place in planned.plan.places],
        transports=ways,
    )
    planned = replace(planned, plan=plan, packable=packable, packing_basis=packing.basis)
    least = planned.device_bytes
    if budget is not None and least > budget:
        raise ValueError(
            f"expected gpu_budget of at least {least} bytes ({format_size(least)}: what always "
            f"stays, all units packed, and a window to decode into), got {budget} bytes "
            f"({format_size(budget)}); raise it, or use transport='packed'"
        )
    return planned


def _in_places(
    cut: Cut, config: Config, plan: _C.Plan, packing: Packing, times: MeasuredTimes | None
) -> Planned:
    """Units that have their places: only how they travel is left to choose."""
    specs = (*cut.specs, *cut.outsiders.heads)
    held = sum(unit.size_bytes for unit in cut.units[len(cut.specs) :])
    outside = bytes_outside(cut.model, cut.specs, set()) - held
    planned = Planned(specs, plan, (), outside, cut.granularity, packing_basis=packing.basis)
    packable = packing.packable(specs)
    if packable.transport == "raw":
        return planned
    chosen = choose_transports(
        plan, packable, mode=config.mode, streams=config.streams, times=_measured(cut.units, times)
    )
    return replace(planned, plan=chosen.plan, packable=packable)


def _below_least(cut: Cut, budget: int, packing: Packing) -> str:
    least = least_budget(cut, packing)
    largest = _C.least_budget_bytes(cut.units)
    ring = " and a ring for packed copies" if packing.transport == "packed" else ""
    finer = "granularity='sublayer' or " if cut.granularity == "layer" else ""
    return (
        f"expected gpu_budget of at least {least} bytes ({format_size(least)}: what always stays, "
        f"and a window for the largest unit, {format_size(min(least, largest))}{ring}), got "
        f"{budget} bytes ({format_size(budget)}); raise it, or use {finer}units=[...] with "
        "smaller units"
    )


def leaf_specs(model: nn.Module, specs: Sequence[UnitSpec]) -> list[UnitSpec]:
    """The units as they are once every leaf is proven."""
    return leaf_units(model, specs, {name for name, _ in model.named_modules()})


def bytes_outside(model: nn.Module, specs: Sequence[UnitSpec], gone: set[int]) -> int:
    """Bytes of weights and buffers that no unit holds: they stay on the device whatever happens.

    Args:
        model: With weights, or without memory (on ``meta``, packed): then tied weights are one
            object; else whatever shares bytes.
        specs: The units.
        gone: ``id``s of parameters that are elsewhere.
    """
    in_units = {id(parameter) for spec in specs for _, parameter in spec.parameters} | gone
    outside = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in in_units]
    return sum(piece.size_bytes for piece in pieces(outside))
