"""The planner: its time, its predictions, and its choice against fixed patterns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest
import torch
from clocks import device_ms, spread, synchronize
from conftest import Reference
from predicted import Durations, take_turns
from records import Part, gpu_state
from yardstick import Stage, Streamed, Workload, bound, require_equal, shape_id

from torch_offload import _C
from torch_offload.choice import Packable, choose
from torch_offload.packing import BF16_SHARE, held_bytes
from torch_offload.planning import Planned, bytes_outside
from torch_offload.prediction import run_scenario

# Parts of all weights that a budget allows.
_SHARES = (0.18, 0.35, 0.5, 0.7, 0.9)
# Of the yardstick: one token, and the prompt that computes longest.
_SHAPES = (0, 3)
_PATTERNS = ("first N", "last N", "every third", "attention first", "FFN first", "random")
_MIB = 2**20


class Budgets:
    """The yardstick, offloaded once for each granularity, with a plan that changes."""

    def __init__(self, stage: Stage, workload: Workload) -> None:
        self._stage = stage
        self._workload = workload
        plain = stage.plain(workload)
        self._whole_bytes = sum(parameter.nbytes for parameter in plain.parameters())
        self._granularity = ""
        self._not_allocated: int | None = None  # to be added to what torch has allocated

    def budget(self, share: float) -> int:
        """So much of the weights."""
        return int(share * self._whole_bytes)

    def streamed(self, granularity: str) -> Streamed:
        """What stands on the stage, or is put there, within the least of the budgets."""
        streamed = self._stage.streamed(
            self._workload, gpu_budget=self.budget(_SHARES[0]), granularity=granularity
        )
        if granularity != self._granularity:
            self._granularity = granularity
            if streamed.extra_bytes is not None:
                used = streamed.extra_bytes + streamed.handle.stats.device_bytes
                self._not_allocated = used - torch.cuda.memory_allocated()
        return streamed

    def used_bytes(self) -> int | None:
        """Device memory of weights and window, as torch's allocator knows it."""
        if self._not_allocated is None:
            return None
        synchronize()
        return self._not_allocated + torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def budgets(stage: Stage, yardstick: Workload) -> Iterator[Budgets]:
    yield Budgets(stage, yardstick)
    stage.clear_streamed()


@pytest.fixture(scope="module")
def durations() -> Durations:
    """Shared by all parts."""
    return Durations({}, {})


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
        assert held_bytes(choice.plan, packable.packed_bytes) <= int(share * whole)
    part.figures.update(
        what="planning",
        num_units=len(units),
        transport=transport,
        seconds=seconds,
        seconds_at_most=max(seconds),
        gaps=gaps,
    )


# Leaves for a token only: what their smaller places gain is the link's time.
@pytest.mark.parametrize("share", _SHARES, ids=[f"{share:.0%}" for share in _SHARES])
@pytest.mark.parametrize(
    ("shape_index", "granularity"),
    [(0, "auto"), (0, "sublayer"), (3, "sublayer")],
    ids=["token-auto", "token", "prompt"],
)
def bench_budget_forward(
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    budgets: Budgets,
    durations: Durations,
    shape_index: int,
    granularity: str,
    share: float,
) -> None:
    """Predicted against measured, bytes planned against used, and decode against the link.

    A prediction is made from durations that were measured before. Clocks and wire drift by some
    per cent meanwhile, so beside it stands the same prediction with what the kernels and the copies
    alone took in turn with the forwards that it is held against.
    """
    shape = yardstick.shapes[shape_index]
    tokens = yardstick.tokens(shape)
    plain = stage.plain(yardstick)
    streamed = budgets.streamed(granularity)
    budget = budgets.budget(share)
    streamed.handle.replan(gpu_budget=budget)
    require_equal(plain, streamed.model, tokens, attempts=2)
    plan = streamed.handle._engine.plan
    units = plan.units
    times = durations.forward(plain, shape, [unit.name for unit in units], tokens)
    copy_ns = [durations.copy_ns(unit.size_bytes) for unit in units]

    def predicted_ms(kernels_by: float = 1.0, copies_by: float = 1.0) -> float:
        scenario = times.scenario(
            units,
            copy_ns,
            reference.link_bytes_per_s,
            kernels_by=kernels_by,
            copies_by=copies_by,
        )
        return run_scenario(scenario, plan).pass_ms(2)

    floor_ms = reference.floor_ms(streamed.streamed_bytes)
    round_s = 3e-3 * (2 * floor_ms + 2 * reference.plain_ms(yardstick, shape))
    run, masters = bound(streamed.model, tokens), streamed.masters
    turns = take_turns(
        run,
        bound(plain, tokens),
        lambda: reference.link.copy_from(masters),
        part.rounds(3, round_s, least=2),
    )
    run()
    state = gpu_state()  # while it works
    measured, copies = spread(turns.streamed_ms), spread(turns.copies_ms)
    streamed_copy_ns = sum(
        ns for ns, place in zip(copy_ns, plan.places, strict=True) if place is not None
    )
    kernels_by = median(turns.kernels_ms) * 1e6 / times.all_kernels_ns
    copies_by = copies["median"] * 1e6 / streamed_copy_ns if streamed_copy_ns else 1.0
    predicted, in_turn = predicted_ms(), predicted_ms(kernels_by, copies_by)
    found = streamed.handle.explain()
    used = budgets.used_bytes()
    assert found.device_bytes <= budget
    part.figures.update(
        what="budget",
        share=share,
        shape=shape_id(shape),
        is_decode=shape_index == 0,
        asked_granularity=granularity,
        budget_bytes=budget,
        rule=found.rule,
        **streamed.describe(),
        units=found.granularity,
        predicted_ms=predicted,
        predicted_in_turn_ms=in_turn,
        streamed_ms=measured,
        error=predicted / measured["median"] - 1,
        error_in_turn=in_turn / measured["median"] - 1,
        kernels_ms=spread(turns.kernels_ms),
        kernels_then_ms=times.all_kernels_ns * 1e-6,
        copies_ms=copies,
        copies_then_ms=streamed_copy_ns * 1e-6,
        launch_ms=(sum(times.launches_ns.values()) + times.other_launches_ns) * 1e-6,
        host_was_ahead=times.host_was_ahead,
        gpu_state=state,
        link_ratio=measured["median"] / copies["median"] if masters else None,
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
    budgets: Budgets,
    shape_index: int,
) -> None:
    """The choice against six fixed patterns within the same budget, all measured."""
    shape = yardstick.shapes[shape_index]
    tokens = yardstick.tokens(shape)
    plain, streamed = stage.plain(yardstick), budgets.streamed("sublayer")
    handle, model = streamed.handle, streamed.model
    budget = budgets.budget(_SHARES[3])
    installation: Any = handle._installed  # no public way
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
