"""From what a person asks of `simulate --model` to a prediction, and back to words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torch_offload import _C
from torch_offload.budget import budget_in_bytes
from torch_offload.choice import Packable
from torch_offload.config import Config
from torch_offload.hardware import Peak, peak_named
from torch_offload.packing import Rates, bf16_bytes, estimated_bytes
from torch_offload.planning import bytes_outside, cut_model, planned_units
from torch_offload.prediction import Prediction, Scenario, predict
from torch_offload.profile import Profile, scenario_of, units_of
from torch_offload.profile_file import read_profile
from torch_offload.rates import format_byte_rate, parse_byte_rate, parse_flop_rate
from torch_offload.sizes import format_size
from torch_offload.workload import Workload, compute_times


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """The options of `simulate --model` and `--profile`, as they were typed."""

    model: Path | None = None
    profile: Path | None = None
    batch: int | None = None
    tokens: int | None = None
    context: int | None = None
    gpu: str | None = None
    peak: str | None = None
    memory_rate: str | None = None
    efficiency: float | None = None
    link: str | None = None
    gpu_budget: str | None = None
    depth: str | None = None
    granularity: str | None = None
    mode: str | None = None
    streams: str = "shared"
    transport: str | None = None
    decode_rate: str | None = None


@dataclass(frozen=True)
class Estimate:
    """A prediction with where its durations come from.

    Attributes:
        title: What was predicted.
        basis: How the durations were found, a sentence each.
        tokens: Of one forward, all sequences together; None where a profile does not say.
        prediction: What comes of it.
    """

    title: str
    basis: tuple[str, ...]
    tokens: int | None
    prediction: Prediction

    @property
    def tokens_per_second(self) -> float | None:
        """In the steady state."""
        if self.tokens is None:
            return None
        return self.tokens / self.prediction.forward_ms * 1e3

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "title": self.title,
            "basis": list(self.basis),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            **self.prediction.to_json(),
        }

    @property
    def _packed_memory(self) -> str:
        found = self.prediction
        parts = {
            "units that stay packed": found.packed_resident_bytes,
            "staging ring": found.staging_bytes,
        }
        return "".join(f"{what} {format_size(size)}, " for what, size in parts.items() if size)

    def __rich__(self) -> RenderableType:
        """For a terminal."""
        found, scenario = self.prediction, self.prediction.scenario
        plan = found.plan
        streamed = sum(place is not None for place in plan.places)
        rate = self.tokens_per_second
        link_ms = found.streamed_bytes / scenario.link_bytes_per_second * 1e3
        rows = [
            ("a forward", f"{found.forward_ms:,.2f} ms (the first {found.cold_ms:,.2f} ms)"),
            ("tokens per second", f"{rate:,.1f}" if rate is not None else "the profile has none"),
            ("link alone", f"{link_ms:,.2f} ms for {format_size(found.streamed_bytes)}"),
            ("compute alone", f"{found.compute_ms:,.2f} ms"),
            ("units", f"{streamed} of {len(plan.units)} streamed, {scenario.mode}{_packed(plan)}"),
            ("copies run ahead", format_size(plan.depth_bytes)),
            (
                "device memory",
                f"{format_size(found.device_bytes)}: window {format_size(plan.window_bytes)}, "
                f"resident units {format_size(plan.resident_bytes)}, {self._packed_memory}"
                f"always there {format_size(scenario.outside_bytes)}",
            ),
            ("page-locked memory", format_size(found.host_bytes)),
        ]
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(name, value)
        basis = [Text(f"- {line}", style="dim") for line in self.basis]
        verdict = Text(found.bound.sentence, style="bold")
        return Group(Text(self.title, style="bold"), table, verdict, *basis)


def estimate(request: ModelRequest) -> Estimate:
    """Builds, plans and simulates.

    Raises:
        ValueError: For an invalid combination of options, an invalid model or profile; says which.
        OSError: If a file cannot be read.
        ModuleNotFoundError: If transformers is missing.
    """
    _refuse_unused(request)
    chosen: dict[str, Any] = {"granularity": request.granularity, "mode": request.mode}
    config = Config(
        streams=request.streams,  # type: ignore[arg-type]  # checked there
        depth=request.depth,
        gpu_budget=request.gpu_budget,
        transport=_transport(request),  # type: ignore[arg-type]
        **{name: value for name, value in chosen.items() if value is not None},
    )
    profile = None if request.profile is None else read_profile(request.profile)
    if request.model is not None:
        return _of_model(request, config, profile)
    if profile is None:
        raise ValueError("expected --model or --profile, got neither")
    return _of_profile(request, config, profile)


def _refuse_unused(request: ModelRequest) -> None:
    """Options that would have no effect, and a granularity that only `plan` can choose."""
    if request.profile is not None:
        for name in ("gpu", "peak", "memory_rate", "efficiency", "context"):
            if getattr(request, name) is not None:
                raise ValueError(
                    f"expected {_flag(name)} without --profile, which has compute times, got both; "
                    "leave one out"
                )
    if request.model is None:
        for name in ("batch", "tokens", "granularity"):
            if getattr(request, name) is not None:
                raise ValueError(
                    f"expected {_flag(name)} beside --model, got it with --profile alone, whose "
                    "forwards and units are as they were; leave it out"
                )
    if request.granularity == "auto":
        raise ValueError(
            "expected --granularity sublayer, layer or module, got 'auto'; simulate one after the "
            "other, or ask `torch-offload plan --granularity auto`"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _of_profile(request: ModelRequest, config: Config, profile: Profile) -> Estimate:
    """The profiled model with other options."""
    measured = scenario_of(profile, units_of(profile))
    link = request.link and parse_byte_rate(request.link, "--link")
    rates = Rates.stated(link or measured.link_bytes_per_second, request.decode_rate)
    # A profile does not say of which type its weights are.
    packable = rates.packable(config.transport, [bf16_bytes(u.size_bytes) for u in measured.units])
    scenario = replace(
        measured,
        mode=config.mode,
        streams=config.streams,
        depth_bytes=config.depth_bytes,
        budget_bytes=_budget(config, measured.outside_bytes, measured.units, packable),
        packable=packable,
        link_bytes_per_second=link or measured.link_bytes_per_second,
        copy_ns=None if link else measured.copy_ns,
    )
    basis = [f"compute times from {request.profile}, measured on {profile.measured.device}"]
    basis.append(_link_line(link) if link else "copy times from the same file")
    basis += (
        [f"{rates.with_share}, which all weights are taken for"] if packable.packed_bytes else []
    )
    return Estimate(
        title=f"{len(profile.units)} units of a profile",
        basis=tuple(basis),
        tokens=None,
        prediction=predict(scenario),
    )


def _of_model(request: ModelRequest, config: Config, profile: Profile | None) -> Estimate:
    from torch_offload.model_files import build_on_meta, read_config

    assert request.model is not None
    tokens = 1 if request.tokens is None else request.tokens
    work = Workload(
        batch=1 if request.batch is None else request.batch,
        tokens=tokens,
        context=tokens if request.context is None else request.context,
    )
    peak = None if profile is not None else _peak(request)
    link = _link(request, peak, profile)
    model_config = read_config(request.model)
    model = build_on_meta(model_config)
    cut = cut_model(model, config, knows_leaves=True)[0]
    specs, units = cut.specs, planned_units(cut.specs)  # the head is among what stays
    outside = bytes_outside(model, specs, set())
    launch_ns: list[int] = []
    if profile is not None:
        compute_ns, launch_ns = times_by_name(profile, [spec.name for spec in specs])
        basis = [f"compute times from {request.profile}, measured on {profile.measured.device}"]
    else:
        assert peak is not None
        compute_ns = compute_times(model, model_config, specs, work, peak)
        basis = [
            peak.formula(),
            "operations = 2 per weight and token, and attention's; the head for one position",
        ]
    rates = Rates.stated(link, request.decode_rate)
    packed_bytes = [estimated_bytes([p for _, p in spec.parameters]) for spec in specs]
    packable = rates.packable(config.transport, packed_bytes)
    scenario = Scenario(
        units=units,
        compute_ns=compute_ns,
        launch_ns=launch_ns,
        link_bytes_per_second=link,
        mode=config.mode,
        streams=config.streams,
        depth_bytes=config.depth_bytes,
        budget_bytes=_budget(config, outside, units, packable),
        outside_bytes=outside,
        packable=packable,
    )
    basis += [rates.with_share] if packable.packed_bytes else []
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Estimate(
        title=f"{type(model).__name__}, {format_size(weights)} of weights, batch {work.batch}, "
        f"{work.tokens} tokens",
        basis=(*basis, _link_line(link)),
        tokens=work.total_tokens,
        prediction=predict(scenario),
    )


def _peak(request: ModelRequest) -> Peak:
    """A known GPU, or stated peaks, or one with some of its rates stated otherwise."""
    flops = request.peak and parse_flop_rate(request.peak, "--peak")
    memory = request.memory_rate and parse_byte_rate(request.memory_rate, "--memory-rate")
    if request.gpu is not None:
        peak = peak_named(request.gpu)
        peak = replace(
            peak,
            flops=flops or peak.flops,
            memory_bytes_per_second=memory or peak.memory_bytes_per_second,
        )
    elif flops and memory:
        peak = Peak("as stated", flops, memory)
    else:
        raise ValueError(
            "expected compute times: --gpu h100, or --peak and --memory-rate, or --profile FILE; "
            "got none of them"
        )
    if request.efficiency is not None:
        peak = replace(peak, efficiency=request.efficiency)
    return peak


def _link(request: ModelRequest, peak: Peak | None, profile: Profile | None) -> float:
    if request.link is not None:
        return parse_byte_rate(request.link, "--link")
    measured = profile.link_bytes_per_second if profile is not None else None
    known = measured or (peak.link_bytes_per_second if peak is not None else None)
    if not known:
        raise ValueError("expected the rate of copies to the device, as --link 25GB/s, got none")
    return known


def _transport(request: ModelRequest) -> str:
    """Checked, but for names that nobody knows."""
    if request.transport == "packed_resident":
        raise ValueError(
            "expected --transport raw, auto or packed, got 'packed_resident'; packed within a "
            "large enough --gpu-budget keeps units packed on the device"
        )
    transport = "raw" if request.transport is None else request.transport
    if transport == "raw" and request.decode_rate is not None:
        raise ValueError(
            "expected --decode-rate beside --transport packed or auto, got it beside raw, which "
            "decodes nothing"
        )
    return transport


def _packed(plan: _C.Plan) -> str:
    """What of a plan's units is packed, for people."""
    counts = Counter[str](plan.transports)
    ways = {"packed": "travel packed", "packed_resident": "stay packed"}
    return "".join(f", {counts[way]} {words}" for way, words in ways.items() if counts[way])


def _budget(
    config: Config, outside_bytes: int, units: Sequence[_C.Unit], packable: Packable
) -> int | None:
    """What the budget leaves for window and resident units."""
    budget = budget_in_bytes(config.gpu_budget, None)
    if budget is None:
        return None
    least = outside_bytes + _C.least_budget_bytes(units, packable.transport, packable.packed_bytes)
    if budget < least:
        raise ValueError(
            f"expected --gpu-budget of at least {format_size(least)} ({format_size(outside_bytes)} "
            f"that always stay, and the least window{_ring(packable)}), got {format_size(budget)}"
        )
    return budget - outside_bytes


def _ring(packable: Packable) -> str:
    return " with a slot for packed copies" if packable.transport == "packed" else ""


def times_by_name(profile: Profile, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """What kernels of these units take, and what launching them takes, if that is known."""
    measured = scenario_of(profile, units_of(profile))
    position = {unit.name: index for index, unit in enumerate(measured.units)}
    if missing := [name for name in names if name not in position]:
        raise ValueError(
            f"expected a profile with times for every unit, got none for {missing[0]!r} "
            f"({len(missing)} units have none); profile this model with the same granularity"
        )
    found = [position[name] for name in names]
    launches = measured.launch_ns
    return [measured.compute_ns[i] for i in found], [launches[i] for i in found if launches]


def _link_line(rate: float) -> str:
    return f"copy time of a unit = bytes / {format_byte_rate(rate)}"
