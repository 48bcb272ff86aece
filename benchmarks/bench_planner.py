"""The planner: its time, its predictions, and its choice against fixed patterns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from clocks import ON_GPU, Link, device_ms, spread, synchronize
from conftest import Reference
from records import Part
from unit_times import unit_times_ns
from yardstick import Stage, Streamed, Workload, bound, require_equal, shape_id

from torch_offload import _C
from torch_offload.choice import Packable, choose
from torch_offload.packing import BF16_SHARE
from torch_offload.planning import Planned, bytes_outside
from torch_offload.prediction import Scenario, run_scenario

# Parts of all weights that a budget allows.
_SHARES = (0.18, 0.35, 0.5, 0.7, 0.9)
# Of the yardstick: one token, and the prompt that computes longest.
_SHAPES = (0, 3)
_PATTERNS = ("first N", "last N", "every third", "attention first", "FFN first", "random")
_MIB = 2**20


@dataclass
class Budgeted:
    """The yardstick, offloaded once, with a plan that changes."""

    streamed: Streamed
    whole_bytes: int
    used_at_first: int | None
    allocated_at_first: int

    def budget(self, share: float) -> int:
        """So much of the weights."""
        return int(share * self.whole_bytes)

    def used_bytes(self) -> int | None:
        """Device memory of weights and window, as torch's allocator knows it."""
        if self.used_at_first is None:
            return None
        synchronize()
        return self.used_at_first + torch.cuda.memory_allocated() - self.allocated_at_first

    def streamed_bytes(self) -> int:
        """Copied by each forward."""
        return self.streamed.streamed_bytes


@pytest.fixture(scope="module")
def budgeted(stage: Stage, yardstick: Workload) -> Iterator[Budgeted]:
    plain = stage.plain(yardstick)
    whole = sum(parameter.nbytes for parameter in plain.parameters())
    streamed = stage.streamed(yardstick, gpu_budget=int(_SHARES[0] * whole))
    extra = streamed.extra_bytes
    stats = streamed.handle.stats
    used = None if extra is None else extra + stats.bytes_resident + stats.window_bytes
    allocated = torch.cuda.memory_allocated() if ON_GPU else 0
    yield Budgeted(streamed, whole, used, allocated)
    stage.clear_streamed()


@pytest.fixture(scope="module")
def measured_times(stage: Stage, yardstick: Workload) -> dict[Any, Any]:
    """Durations of units by shape, and rates of copies by size: measured once."""
    return {}


def _llama_70b(*, leaves: bool) -> list[_C.Unit]:
    sizes = (
        (("mha", 128), ("mha", 16), ("mha", 16), ("mha", 128), *[("ffn", 448)] * 3)
        if leaves
        else (("mha", 288), ("ffn", 1344))
    )
    return [
        _C.Unit(f"{layer}.{index}", size * _MIB, layer, kind)
        for layer in range(80)
        for index, (kind, size) in enumerate(sizes)
    ]


@pytest.mark.parametrize("transport", ["raw", "auto"])
@pytest.mark.parametrize("leaves", [False, True], ids=["sublayer", "module"])
def bench_planning_time(part: Part, leaves: bool, transport: str) -> None:
    """How long a plan of 80 layers takes, at the slowest of five budgets."""
    units = _llama_70b(leaves=leaves)
    whole = sum(unit.size_bytes for unit in units)
    packable = Packable(transport, [int(BF16_SHARE * unit.size_bytes) for unit in units])
    seconds, gaps = [], []
    for share in _SHARES:
        begin = time.perf_counter()
        choice = choose(units, budget_bytes=int(share * whole), packable=packable)
        seconds.append(time.perf_counter() - begin)
        gaps.append(choice.gap)
        kept = choice.plan.resident_bytes + choice.packed_resident_bytes
        assert choice.plan.window_bytes + kept + choice.staging_bytes <= int(share * whole)
    part.figures.update(
        what="planning",
        num_units=len(units),
        transport=transport,
        seconds=seconds,
        seconds_at_most=max(seconds),
        gaps=gaps,
    )


def _predicted_ms(
    streamed: Streamed, times: dict[str, int], rates: dict[Any, Any], link: float
) -> float:
    plan = streamed.handle._engine.plan
    units = plan.units
    outside_ns = times[""] // len(units)
    scenario = Scenario(
        units=units,
        compute_ns=[times[unit.name] + outside_ns for unit in units],
        link_bytes_per_second=link,
        copy_ns=[round(u.size_bytes / rates[u.size_bytes] * 1e9) for u in units],
    )
    return run_scenario(scenario, plan).pass_ms(2)


@pytest.mark.parametrize("share", _SHARES, ids=[f"{share:.0%}" for share in _SHARES])
@pytest.mark.parametrize("shape_index", _SHAPES, ids=["token", "prompt"])
def bench_budget_forward(
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    budgeted: Budgeted,
    measured_times: dict[Any, Any],
    shape_index: int,
    share: float,
) -> None:
    """Predicted against measured, bytes planned against used, and decode against the link."""
    shape = yardstick.shapes[shape_index]
    tokens = yardstick.tokens(shape)
    plain, streamed = stage.plain(yardstick), budgeted.streamed
    budget = budgeted.budget(share)
    streamed.handle.replan(gpu_budget=budget)
    require_equal(plain, streamed.model, tokens, attempts=2)
    units = streamed.handle.units
    if shape not in measured_times:
        measured_times[shape] = unit_times_ns(plain, [unit.name for unit in units], tokens)
    for size in {unit.size_bytes for unit in units} - measured_times.keys():
        measured_times[size] = Link(size).rate()["median"]
    predicted = _predicted_ms(
        streamed, measured_times[shape], measured_times, reference.link_bytes_per_s
    )
    floor_ms = reference.floor_ms(budgeted.streamed_bytes())
    round_s = 3e-3 * (floor_ms + reference.plain_ms(yardstick, shape))
    measured = spread(
        device_ms(
            bound(streamed.model, tokens), forwards=2, rounds=part.rounds(3, round_s, least=1)
        )
    )
    found = streamed.handle.explain()
    used = budgeted.used_bytes()
    assert found.device_bytes <= budget
    part.figures.update(
        what="budget",
        share=share,
        shape=shape_id(shape),
        is_decode=shape_index == 0,
        budget_bytes=budget,
        rule=found.rule,
        **streamed.describe(),
        predicted_ms=predicted,
        streamed_ms=measured,
        error=predicted / measured["median"] - 1,
        link_ratio=measured["median"] / floor_ms if floor_ms else None,
        planned_bytes=found.device_bytes,
        used_bytes=used,
        planned_over_used=None if used is None else found.device_bytes / used,
        bit_equal=True,
    )


def _orders(units: list[_C.Unit]) -> dict[str, list[int]]:
    """Which units each fixed pattern keeps first."""
    count = len(units)
    shuffled = list(range(count))
    random.Random(0).shuffle(shuffled)
    layers = [unit.layer_index for unit in units]
    orders = (
        list(range(count)),
        list(reversed(range(count))),
        sorted(range(count), key=lambda i: layers[i] % 3),
        sorted(range(count), key=lambda i: units[i].kind != "mha"),
        sorted(range(count), key=lambda i: units[i].kind != "ffn"),
        shuffled,
    )
    return dict(zip(_PATTERNS, orders, strict=True))


def _fixed_plan(
    units: list[_C.Unit], num_free: int, order: list[int], budget: int
) -> _C.Plan | None:
    """As much of a pattern as fits beside the usual window; what is not free stays in any case."""
    best = None
    for kept in range(num_free + 1):
        stays = set(order[:kept])
        resident = [i in stays or i >= num_free for i in range(len(units))]
        plan = _C.make_plan(units, resident=resident)
        if plan.window_bytes + plan.resident_bytes <= budget:
            best = plan
    return best


@pytest.mark.parametrize("shape_index", _SHAPES, ids=["token", "prompt"])
def bench_patterns(
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    budgeted: Budgeted,
    shape_index: int,
) -> None:
    """The choice against six fixed patterns within the same budget, all measured."""
    shape = yardstick.shapes[shape_index]
    tokens = yardstick.tokens(shape)
    plain, streamed = stage.plain(yardstick), budgeted.streamed
    handle, model = streamed.handle, streamed.model
    budget = budgeted.budget(_SHARES[3])
    installation: Any = handle._replan.__self__  # type: ignore[attr-defined]  # no public way
    cut = installation._cut.find(model)
    specs = (*cut.specs, *cut.outsiders.heads)
    outside = bytes_outside(model, specs, set())
    run = bound(model, tokens)
    round_s = 3e-3 * (reference.floor_ms(budget) + reference.plain_ms(yardstick, shape))

    def measured() -> float:
        require_equal(plain, model, tokens)
        rounds = part.rounds(3, 7 * round_s, least=1)
        return spread(device_ms(run, forwards=2, rounds=rounds))["median"]

    times: dict[str, float] = {}
    for name, order in _orders(cut.units[: len(cut.specs)]).items():
        plan = _fixed_plan(cut.units, len(cut.specs), order, budget - outside)
        if plan is not None:
            installation._apply(model, Planned(specs, plan, (), outside, cut.granularity))
            times[name] = measured()
    handle.replan(gpu_budget=budget)
    ours = measured()
    assert times, "no pattern fits the budget"
    best = min(times, key=lambda name: times[name])
    part.figures.update(
        what="patterns",
        shape=shape_id(shape),
        budget_bytes=budget,
        rule=handle.explain().rule,
        streamed_ms=ours,
        pattern_ms=times,
        best=best,
        slower_than_best=ours / times[best] - 1,
        bit_equal=True,
    )
