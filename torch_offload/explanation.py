"""Why an offloaded model lies as it does, and what more memory would change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from torch_offload import _C
from torch_offload.choice import KERNEL_SHARES, NOMINAL_LINK_BYTES_PER_SECOND, RAW
from torch_offload.measured_times import measured_times
from torch_offload.packing import Rates, held_bytes
from torch_offload.prediction import Prediction, Scenario, predict, predict_plan
from torch_offload.profile import Profile
from torch_offload.rates import format_byte_rate, parse_byte_rate
from torch_offload.sizes import format_size

if TYPE_CHECKING:
    from torch_offload.handle import Handle
    from torch_offload.placed import Placed

_GIB = 2**30
# What a change of the budget is tried with; of small models parts of their weights.
_STEPS_GIB = (-4, -2, -1, 1, 2, 4)
_STEPS_SHARE = (-0.1, -0.05, 0.05, 0.1)
_MOST_RULES = 5
# What a search may miss that is worth no word.
_SLIGHT_GAP = 0.0015


@dataclass(frozen=True)
class Change:
    """Another budget.

    Attributes:
        device_bytes: What weights may take then.
        forward_ms: What a forward takes then; None where the budget is below the least.
    """

    device_bytes: int
    forward_ms: float | None


@dataclass(frozen=True)
class OtherTransport:
    """The same budget, and another way for units to travel.

    Attributes:
        transport: As in `offload`.
        forward_ms: What a forward would take.
        host_bytes: Page-locked memory that it would need.
        basis: Where that is from.
    """

    transport: str
    forward_ms: float
    host_bytes: int
    basis: str


@dataclass(frozen=True)
class Explanation:
    """What `Handle.explain` returns: ``print`` it, or read it.

    Attributes:
        granularity: How the model is cut.
        rule: Why just these units are resident.
        resident: Names of the units that are, as they are.
        packed_resident: Names of those that stay packed on the device.
        streamed: Names of the others.
        packed: Names of those of them that travel packed.
        copies: How many copies an onload of each streamed unit takes.
        gathered: Tables whose rows are gathered on the host, and their bytes.
        outside_bytes: On the device, of no unit.
        basis: Where the durations come from.
        prediction: Of a forward with this plan.
        roofline_share: How near it comes to its copies or its kernels alone, whichever are longer.
        changes: What other budgets would come to, the smallest first.
        alternatives: Rules and how much slower the best plan by them would be, as a share.
        gap: By which share a plan that the search has not tried could be faster, at the most.
        packing_basis: At which rates it was chosen what is packed; "" where nothing was.
        no_longer_packed: Units that were to be packed and are raw, since they were edited.
        host_bytes: Page-locked memory that is in use now.
        other_transport: What another `transport` would come to.
    """

    granularity: str
    rule: str
    resident: tuple[str, ...]
    packed_resident: tuple[str, ...]
    streamed: tuple[str, ...]
    packed: tuple[str, ...]
    copies: dict[str, int]
    gathered: dict[str, int]
    outside_bytes: int
    basis: str
    prediction: Prediction
    roofline_share: float
    changes: tuple[Change, ...]
    alternatives: tuple[tuple[str, float], ...]
    gap: float
    packing_basis: str
    no_longer_packed: tuple[str, ...]
    host_bytes: int
    other_transport: OtherTransport | None

    @property
    def device_bytes(self) -> int:
        """All weights on the device, window and ring included."""
        found = self.prediction
        return self.outside_bytes + held_bytes(found.plan, found.scenario.packable.packed_bytes)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "granularity": self.granularity,
            "rule": self.rule,
            "resident": list(self.resident),
            "packed_resident": list(self.packed_resident),
            "streamed": list(self.streamed),
            "packed": list(self.packed),
            "copies": dict(self.copies),
            "gathered": dict(self.gathered),
            "basis": self.basis,
            "roofline_share": self.roofline_share,
            "changes": [
                {"device_bytes": change.device_bytes, "forward_ms": change.forward_ms}
                for change in self.changes
            ],
            "alternatives": [
                {"rule": rule, "slower_share": share} for rule, share in self.alternatives
            ],
            "gap": self.gap,
            "packing_basis": self.packing_basis,
            "no_longer_packed": list(self.no_longer_packed),
            "other_transport": None
            if self.other_transport is None
            else asdict(self.other_transport),
            **self.prediction.to_json(),
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "outside_bytes": self.outside_bytes,
        }

    def __rich__(self) -> RenderableType:
        """For a terminal."""
        found, plan = self.prediction, self.prediction.plan
        rows = [
            ("on the device", f"{format_size(self.device_bytes)} of weights"),
            ("  resident", f"{format_size(plan.resident_bytes)}, {len(self.resident)} units"),
            *self._packed_rows(),
            ("  why these", self.rule or "nothing was to be chosen: no budget"),
            (
                "  window",
                f"{format_size(plan.window_bytes)}, copies run {format_size(plan.depth_bytes)} "
                "ahead",
            ),
            ("  always there", format_size(self.outside_bytes)),
            (
                "streamed",
                f"{format_size(found.streamed_bytes)} a forward, {len(self.streamed)} units "
                f"({self.granularity})" + (f", {len(self.packed)} packed" if self.packed else ""),
            ),
            *self._copies_row(),
            *(
                ("gathered on the host", f"{name}, {format_size(size)}")
                for name, size in self.gathered.items()
            ),
            (
                "a forward",
                f"{found.forward_ms:,.2f} ms, {100 * self.roofline_share:.1f} % of the roofline",
            ),
        ]
        if (other := self.other_transport) is not None:
            difference = other.forward_ms / found.forward_ms - 1 if found.forward_ms else 0.0
            rows.append(
                (
                    f"with {other.transport!r}",
                    f"{other.forward_ms:,.2f} ms ({100 * difference:+.1f} %), page-locked host "
                    f"memory {format_size(other.host_bytes)}, not {format_size(self.host_bytes)}; "
                    f"{other.basis}",
                )
            )
        facts = Table.grid(padding=(0, 2))
        for name, value in rows:
            facts.add_row(name, value)
        budgets = Table(title="with another budget", title_justify="left")
        budgets.add_column("weights may take", justify="right")
        budgets.add_column("a forward", justify="right")
        budgets.add_column("change", justify="right")
        for change in self.changes:
            if change.forward_ms is None:
                budgets.add_row(format_size(change.device_bytes), "too little", "")
            else:
                difference = change.forward_ms / found.forward_ms - 1 if found.forward_ms else 0.0
                budgets.add_row(
                    format_size(change.device_bytes),
                    f"{change.forward_ms:,.2f} ms",
                    f"{100 * difference:+.1f} %",
                )
        rules = [
            Text(f"- {rule}: {100 * share:.1f} % slower", style="dim")
            for rule, share in self.alternatives
        ]
        if rules:
            rules.insert(0, Text("by other rules, within the same budget:", style="dim"))
        if rules and self.gap > _SLIGHT_GAP:
            gap = f"- no plan is more than {100 * self.gap:.1f} % faster; the search ended before"
            rules.append(Text(f"{gap} it had tried all", style="dim"))
        verdict = Text(found.bound.sentence, style="bold")
        return Group(facts, verdict, budgets, *rules, Text(self.basis, style="dim"))

    def _packed_rows(self) -> Iterator[tuple[str, str]]:
        found = self.prediction
        if self.packed_resident:
            size = format_size(found.packed_resident_bytes)
            yield "  resident, packed", f"{size}, {len(self.packed_resident)} units"
        if self.packed:
            yield "  staging ring", format_size(found.staging_bytes)
        if self.packing_basis:
            yield "  what is packed", f"chosen for {self.packing_basis}"
        if self.no_longer_packed:
            yield (
                "  no longer packed",
                f"{len(self.no_longer_packed)} units: edited, they take more packed than there is "
                "room for; handle.replan() counts them anew",
            )

    def _copies_row(self) -> Iterator[tuple[str, str]]:
        if self.copies:
            name = max(self.copies, key=lambda unit: self.copies[unit])
            most = self.copies[name]
            yield (
                "copies",
                f"{sum(self.copies.values())} a forward"
                + (f", {most} of them for {name}" if most > 1 else ", one a unit"),
            )

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def explain(
    handle: Handle, placed: Placed, profile: Profile | None, link: str | None
) -> Explanation:
    """Predicts what a handle does now and would do with other budgets. Changes nothing."""
    plan = placed.plan
    scenario, basis = _scenario_of(handle, placed, profile, link)
    prediction = predict_plan(scenario, plan)
    link_ms = prediction.streamed_bytes / scenario.link_bytes_per_second * 1e3
    least_ms = max(link_ms, prediction.compute_ms)
    ways = list(zip(plan.units, plan.places, plan.transports, strict=True))
    best = min((found.score_ns for found in placed.alternatives), default=0.0)
    return Explanation(
        granularity=placed.granularity,
        rule=placed.rule,
        resident=tuple(unit.name for unit, place, _ in ways if place is None),
        packed_resident=tuple(unit.name for unit, _, way in ways if way == "packed_resident"),
        streamed=tuple(
            unit.name for unit, place, way in ways if place is not None and way != "packed_resident"
        ),
        packed=tuple(unit.name for unit, _, way in ways if way == "packed"),
        copies={unit.name: unit.copies for unit in handle.units if unit.copies},
        gathered=placed.tables,
        outside_bytes=placed.outside_bytes,
        basis=basis,
        prediction=prediction,
        roofline_share=min(1.0, least_ms / prediction.forward_ms) if prediction.forward_ms else 1.0,
        changes=tuple(_changes(scenario, placed)),
        alternatives=tuple(
            (found.rule, found.score_ns / best - 1)
            for found in placed.alternatives[:_MOST_RULES]
            if found.rule != placed.rule and best > 0
        ),
        gap=placed.gap,
        packing_basis=placed.packing_basis,
        no_longer_packed=placed.no_longer_packed,
        host_bytes=handle.stats.host_bytes,
        other_transport=_other_transport(handle, scenario, placed),
    )


def _other_transport(handle: Handle, scenario: Scenario, placed: Placed) -> OtherTransport | None:
    """What ``"auto"`` would gain where units travel raw, and what they lose where it chose."""
    budget = (
        None
        if handle.config.gpu_budget is None
        else held_bytes(placed.plan, scenario.packable.packed_bytes)
    )
    if scenario.packable.transport != "raw":
        transport, packable, basis = "raw", RAW, "as they are"
    else:
        if not any(placed.packed_estimates):
            return None
        transport, basis = "auto", Rates().sentence
        packable = replace(RAW, transport="auto", packed_bytes=placed.packed_estimates)
    try:
        other = predict(scenario.with_(packable=packable, budget_bytes=budget, masters="plain"))
    except ValueError:  # below the least
        return None
    return OtherTransport(transport, other.forward_ms, other.host_bytes, basis)


def _scenario_of(
    handle: Handle, placed: Placed, profile: Profile | None, link: str | None
) -> tuple[Scenario, str]:
    rate = parse_byte_rate(link, "link") if link else None
    units = placed.plan.units
    common = {
        "mode": handle.config.mode,
        "streams": handle.config.streams,
        "depth_bytes": handle.config.depth_bytes,
        "outside_bytes": placed.outside_bytes,
        "packable": placed.packable,
        "masters": handle.config.masters,
    }
    if profile is not None:
        times = measured_times(profile).of(units)
        scenario = Scenario(
            units=units,
            compute_ns=times.compute_ns,
            link_bytes_per_second=(
                rate or profile.link_bytes_per_second or NOMINAL_LINK_BYTES_PER_SECOND
            ),
            copy_ns=None if rate else times.copy_ns,
            sequence=times.sequence or None,
        )
        return scenario.with_(**common), "durations from the last profile of these units"
    rate = rate or NOMINAL_LINK_BYTES_PER_SECOND
    share = KERNEL_SHARES[0]
    scenario = Scenario(
        units=units,
        compute_ns=[round(share * unit.size_bytes / rate * 1e9) for unit in units],
        link_bytes_per_second=rate,
    ).with_(**common)
    return scenario, (
        f"assumed: copies at {format_byte_rate(rate)}, and a token, whose kernels take {share:g} "
        "of that time; run forwards inside handle.profile() to go by measured durations"
    )


def _changes(scenario: Scenario, placed: Placed) -> Iterator[Change]:
    now = held_bytes(placed.plan, scenario.packable.packed_bytes)
    whole = sum(unit.size_bytes for unit in placed.plan.units)
    steps = [step * _GIB for step in _STEPS_GIB]
    if whole < 8 * _GIB:
        steps = [round(share * whole) for share in _STEPS_SHARE]
    for step in steps:
        budget = now + step
        if budget <= 0 or (step > 0 and now >= whole):
            continue
        device_bytes = budget + placed.outside_bytes
        if budget < _C.least_budget_bytes(
            placed.plan.units, scenario.packable.transport, scenario.packable.packed_bytes
        ):
            yield Change(device_bytes, None)
        else:
            found = predict(scenario.with_(budget_bytes=budget))
            yield Change(device_bytes, found.forward_ms)
