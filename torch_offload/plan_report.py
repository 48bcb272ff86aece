"""What `torch-offload plan` finds out: whether and how a model fits a GPU, without its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torch_offload import _C
from torch_offload.budget import budget_in_bytes
from torch_offload.config import Config
from torch_offload.hardware import Peak, peak_named
from torch_offload.model_files import build_on_meta, dtype_of, find_model, read_config
from torch_offload.needs import Needs, needs_of
from torch_offload.packing import Packing, Rates
from torch_offload.planning import Planned, cut_model, least_budget, plan_best, plan_cut
from torch_offload.prediction import Prediction, Scenario, predict_plan
from torch_offload.rates import format_byte_rate, parse_byte_rate
from torch_offload.sizes import format_size, parse_size
from torch_offload.transport import transport_of
from torch_offload.workload import Workload, compute_times

# Points of the curve, the least and the whole included.
CURVE_POINTS = 13


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `plan`, as they were typed."""

    model: str
    gpu_budget: str | None = None
    gpu_memory: str | None = None
    batch: int = 1
    tokens: int = 1024
    host_memory: str | None = None
    gpu: str = "h100"
    link: str | None = None
    granularity: str = "sublayer"
    transport: str = "raw"
    masters: str = "plain"
    decode_rate: str | None = None


@dataclass(frozen=True)
class Fit:
    """One budget.

    Attributes:
        budget_bytes: What weights may take.
        planned: How they lie.
        token: A forward of one token for each sequence.
        prompt: A forward of all tokens of each.
    """

    budget_bytes: int
    planned: Planned
    token: Prediction
    prompt: Prediction

    @property
    def host_bytes(self) -> int:
        """Of masters and packed copies, page-locked, and of tables that stay on the host."""
        return self.token.host_bytes + sum(table.size_bytes for table in self.planned.tables)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        plan = self.planned.plan
        return {
            "budget_bytes": self.budget_bytes,
            "device_bytes": self.planned.device_bytes,
            "window_bytes": plan.window_bytes,
            "resident_bytes": plan.resident_bytes,
            "packed_resident_bytes": self.planned.packed_resident_bytes,
            "staging_bytes": self.planned.staging_bytes,
            "transports": dict(Counter(self._homes())),
            "depth_bytes": plan.depth_bytes,
            "outside_bytes": self.planned.outside_bytes,
            "gathered_bytes": sum(table.size_bytes for table in self.planned.tables),
            "granularity": self.planned.granularity,
            "rule": "" if self.planned.choice is None else self.planned.choice.rule,
            "token_ms": self.token.forward_ms,
            "prompt_ms": self.prompt.forward_ms,
            "host_bytes": self.host_bytes,
        }

    def _homes(self) -> Iterator[str]:
        """Of each unit: ``"resident"``, or how it travels."""
        plan = self.planned.plan
        for place, transport in zip(plan.places, plan.transports, strict=True):
            yield "resident" if place is None else transport


@dataclass(frozen=True)
class PlanReport:
    """Whether and how a model fits.

    Attributes:
        title: What was planned.
        basis: Where the figures come from, a sentence each.
        work: Of the prompt.
        needs: Beside the weights; None where the budget was given.
        least_bytes: The least budget that works.
        weights_bytes: Of the whole model.
        fit: With the budget that was asked for.
        host_limit_bytes: What the host has for it, if that was said.
        curve: Other budgets, the smallest first.
        other: With this budget and another transport: ``"auto"`` beside raw, raw beside the others.
    """

    title: str
    basis: tuple[str, ...]
    work: Workload
    needs: Needs | None
    least_bytes: int
    weights_bytes: int
    fit: Fit
    host_limit_bytes: int | None
    curve: tuple[Fit, ...]
    other: tuple[str, Fit] | None = None

    @property
    def fits(self) -> bool:
        """Whether the host has room for what the device has not."""
        return self.host_limit_bytes is None or self.fit.host_bytes <= self.host_limit_bytes

    @property
    def knee_bytes(self) -> int | None:
        """The budget beyond which more memory buys less than before; None for a straight line."""
        return knee_of(
            [(fit.budget_bytes, fit.token.forward_ms + fit.prompt.forward_ms) for fit in self.curve]
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        needs = self.needs
        return {
            "title": self.title,
            "basis": list(self.basis),
            "fits": self.fits,
            "batch": self.work.batch,
            "tokens": self.work.tokens,
            "weights_bytes": self.weights_bytes,
            "least_budget_bytes": self.least_bytes,
            "host_limit_bytes": self.host_limit_bytes,
            "needs": None
            if needs is None
            else {
                "cache_bytes": needs.cache,
                "activation_bytes": needs.activations,
                "context_bytes": needs.context,
            },
            **self.fit.to_json(),
            "knee_bytes": self.knee_bytes,
            "other_transport": None
            if self.other is None
            else {"transport": self.other[0], **self.other[1].to_json()},
            "curve": [fit.to_json() for fit in self.curve],
        }

    def __rich__(self) -> RenderableType:
        """For a terminal."""
        fit, plan, needs = self.fit, self.fit.planned.plan, self.needs
        streamed = sum(place is not None for place in plan.places)
        verdict = "fits" if self.fits else "does not fit the host"
        host = format_size(fit.host_bytes)
        if self.host_limit_bytes is not None:
            host += f" of {format_size(self.host_limit_bytes)}"
        rows = [
            ("weights may take", f"{format_size(fit.budget_bytes)}: {verdict}"),
            ("  they take", format_size(fit.planned.device_bytes)),
            ("  resident units", f"{format_size(plan.resident_bytes)}{_why(fit.planned)}"),
            *self._packed_rows(),
            (
                "  window",
                f"{format_size(plan.window_bytes)} for {streamed} of {len(plan.units)} units "
                f"({fit.planned.granularity})",
            ),
            ("  always there", format_size(fit.planned.outside_bytes)),
            *((f"gathered on the host: {t.name}", format_size(t.size_bytes)) for t in _tables(fit)),
        ]
        if needs is not None:
            rows.append(
                (
                    "beside the weights",
                    f"{format_size(needs.total)}: cache {format_size(needs.cache)}, activations "
                    f"{format_size(needs.activations)}, process {format_size(needs.context)}",
                )
            )
        tokens = self.work.batch / fit.token.forward_ms * 1e3
        rows += [
            ("a token", f"{fit.token.forward_ms:,.1f} ms ({tokens:,.1f} tokens per second)"),
            ("a prompt", f"{fit.prompt.forward_ms:,.1f} ms"),
            ("host memory", host),
            *self._other_row(),
            ("least budget", format_size(self.least_bytes)),
        ]
        facts = Table.grid(padding=(0, 2))
        for name, value in rows:
            facts.add_row(name, value)
        curve = Table(title="with other budgets", title_justify="left")
        for heading in ("weights may take", "a token", "a prompt", "host memory", ""):
            curve.add_column(heading, justify="right")
        for point in self.curve:
            curve.add_row(
                format_size(point.budget_bytes),
                f"{point.token.forward_ms:,.1f} ms",
                f"{point.prompt.forward_ms:,.1f} ms",
                format_size(point.host_bytes),
                "knee" if point.budget_bytes == self.knee_bytes else "",
            )
        basis = [Text(f"- {line}", style="dim") for line in self.basis]
        return Group(Text(self.title, style="bold"), facts, curve, *basis)

    def _packed_rows(self) -> Iterator[tuple[str, str]]:
        planned = self.fit.planned
        ways = Counter(planned.plan.transports)
        if ways["packed_resident"]:
            size = format_size(planned.packed_resident_bytes)
            yield "  resident units, packed", f"{size}, {ways['packed_resident']} units"
        if ways["packed"]:
            size = format_size(planned.staging_bytes)
            yield "  staging ring", f"{size}, {ways['packed']} units travel packed"

    def _other_row(self) -> Iterator[tuple[str, str]]:
        if self.other is not None:
            transport, other = self.other
            now = self.fit
            yield (
                f"with --transport {transport}",
                f"{other.token.forward_ms:,.1f} ms a token "
                f"({_change(other.token.forward_ms, now.token.forward_ms)}), "
                f"{other.prompt.forward_ms:,.1f} ms a prompt "
                f"({_change(other.prompt.forward_ms, now.prompt.forward_ms)}), host memory "
                f"{format_size(other.host_bytes)}",
            )


def _why(planned: Planned) -> str:
    stays = planned.plan.resident_bytes + planned.packed_resident_bytes
    return f": {planned.choice.rule}" if planned.choice and stays else ""


def _change(then: float, now: float) -> str:
    return f"{100 * (then / now - 1):+.1f} %" if now > 0 else "as now"


def _tables(fit: Fit) -> Sequence[Any]:
    return fit.planned.tables


def knee_of(curve: Sequence[tuple[int, float]]) -> int | None:
    """The point of a falling curve that lies furthest below the line from its first to its last."""
    if len(curve) < 3:
        return None
    (left, top), (right, bottom) = curve[0], curve[-1]
    if right <= left or top <= bottom:
        return None

    def depth(point: tuple[int, float]) -> float:
        along = (point[0] - left) / (right - left)
        return (top + along * (bottom - top) - point[1]) / (top - bottom)

    best = max(curve, key=depth)
    return best[0] if depth(best) > 0.02 else None


class Planner:
    """Plans one model for any budget; reads its config, and no weights.

    Raises:
        ValueError: For an invalid combination of options, or an invalid model.
        OSError: If a file cannot be read.
        ModuleNotFoundError: If transformers is missing.
    """

    def __init__(self, options: PlanOptions) -> None:
        self._options = options
        self.config = Config(
            granularity=options.granularity,  # type: ignore[arg-type]  # checked there
            gpu_budget=options.gpu_budget or "auto",
            transport=options.transport,  # type: ignore[arg-type]
            masters=options.masters,  # type: ignore[arg-type]
        )
        self._peak, self._link = _rates(options)
        self._decoder = Rates.stated(self._link, options.decode_rate)
        self._packing = Packing(transport_of(self.config), self._decoder)
        self._work = Workload(batch=options.batch, tokens=options.tokens, context=options.tokens)
        self._model_config = read_config(find_model(options.model))
        self._model = build_on_meta(self._model_config)
        self._cuts = cut_model(self._model, self.config, knows_leaves=True)
        # By which the model runs until its leaves are known, and which must fit as well.
        self._first = cut_model(self._model, self.config)[0]
        self.least_bytes = max(
            least_budget(cut, self._packing) for cut in (self._first, self._cuts[0])
        )
        self.weights_bytes = sum(
            tensor.nbytes for tensor in {*self._model.parameters(), *self._model.buffers()}
        )

    def report(self, curve: Sequence[Fit]) -> PlanReport:
        """For the budget that was asked for.

        Raises:
            ValueError: If it is below the least, which the message names.
        """
        options, work = self._options, self._work
        budget, needs = self._budget()
        host = options.host_memory and parse_size(options.host_memory, "--host-memory")
        basis = [self._peak.formula(), f"copies at {format_byte_rate(self._link)}"]
        other_way = "auto" if options.transport == "raw" else "raw"
        other = self._fit(budget, Packing(other_way, self._decoder), "plain")
        packs = [*self.fit(budget).planned.plan.transports, *other.planned.plan.transports]
        if is_packed := any(way != "raw" for way in packs):
            basis.append(self._decoder.with_share)
        if self.config.masters == "packed":
            basis.append("masters are packed: host memory holds nothing else of what packs")
        if needs is not None:
            basis.append("cache and activations are reckoned from the config, not measured")
        return PlanReport(
            title=f"{type(self._model).__name__}, {format_size(self.weights_bytes)} of weights, "
            f"batch {work.batch}, prompts of {work.tokens} tokens",
            basis=tuple(basis),
            work=work,
            needs=needs,
            least_bytes=self.least_bytes,
            weights_bytes=self.weights_bytes,
            fit=self.fit(budget),
            host_limit_bytes=host or None,
            curve=tuple(curve),
            other=(other_way, other) if is_packed else None,
        )

    def _budget(self) -> tuple[int, Needs | None]:
        options = self._options
        if (options.gpu_budget is None) == (options.gpu_memory is None):
            raise ValueError(
                "expected either --gpu-budget (what weights may take) or --gpu-memory (the whole "
                "device), got " + ("neither" if options.gpu_budget is None else "both")
            )
        if options.gpu_memory is None:
            budget = budget_in_bytes(options.gpu_budget, None)
            assert budget is not None
            return budget, None
        memory = parse_size(options.gpu_memory, "--gpu-memory")
        needs = needs_of(self._model_config, self._work, dtype_of(self._model_config).itemsize)
        least = needs.total + self.least_bytes
        if memory < least:
            raise ValueError(
                f"expected --gpu-memory of at least {format_size(least)}: "
                f"{format_size(needs.total)} beside the weights, and at least "
                f"{format_size(self.least_bytes)} for them, got {format_size(memory)}; fewer "
                "tokens or a smaller batch need less"
            )
        return memory - needs.total, needs

    def budgets(self) -> list[int]:
        """Of the curve: from the least to all weights."""
        least, whole = self.least_bytes, max(self.least_bytes, self.weights_bytes)
        # Padding: what is planned is a little more than the weights themselves.
        whole += sum(_C.aligned_size(1) for _ in self._model.parameters())
        steps = CURVE_POINTS - 1
        return sorted({least + (whole - least) * step // steps for step in range(CURVE_POINTS)})

    def fit(self, budget: int) -> Fit:
        """Plans and predicts for one budget.

        Raises:
            ValueError: If it is below the least, which the message names.
        """
        return self._fit(budget, self._packing, self.config.masters)

    def _fit(self, budget: int, packing: Packing, masters: str) -> Fit:
        if budget < self.least_bytes:
            plan_cut(self._first, self.config, budget, packing)
        planned = plan_best(self._cuts, self.config, budget, packing)
        work = self._work
        token = Workload(batch=work.batch, tokens=1, context=work.context)
        return Fit(
            budget,
            planned,
            self._predicted(planned, token, masters),
            self._predicted(planned, work, masters),
        )

    def _predicted(self, planned: Planned, work: Workload, masters: str) -> Prediction:
        times = compute_times(self._model, self._model_config, planned.specs, work, self._peak)
        scenario = Scenario(
            units=planned.plan.units,
            compute_ns=times,
            link_bytes_per_second=self._link,
            outside_bytes=planned.outside_bytes,
            packable=planned.packable,
            masters=masters,
        )
        return predict_plan(scenario, planned.plan)


def _rates(options: PlanOptions) -> tuple[Peak, float]:
    peak = peak_named(options.gpu)
    if options.link is not None:
        return peak, parse_byte_rate(options.link, "--link")
    if peak.link_bytes_per_second is None:
        raise ValueError("expected the rate of copies to the device, as --link 25GB/s, got none")
    return peak, peak.link_bytes_per_second
