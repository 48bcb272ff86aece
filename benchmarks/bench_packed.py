"""The yardstick with packed units: against the raw floor and the resident model, in one run."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
from clocks import Alternation, alternate, alternation_seconds, spread
from conftest import Reference
from observe import Counting
from recorded import record_timelines
from records import Part
from yardstick import YARDSTICK, Pair, Stage, Streamed, Workload, require_equal, shapes_of

_SHAPES = shapes_of(YARDSTICK)
# What a budget leaves for the weights, of all their bytes.
_BUDGET_SHARE = 0.6
_FORWARDS = 2


def _against_plain(
    benchmark: Any,
    part: Part,
    pair: Pair,
    reference: Reference,
    **wire: Any,
) -> Alternation:
    """Both models take turns; nothing may allocate or wait."""
    plain_ms = reference.plain_ms(pair.workload, pair.shape)
    copied_ms = reference.floor_ms(pair.streamed.streamed_bytes)
    wire_apart = plain_ms > copied_ms
    round_s = alternation_seconds(
        plain_ms,
        plain_ms + copied_ms,
        forwards=_FORWARDS,
        wire_ms=copied_ms,
        wire_turns=0 if wire_apart else len(wire),
    )
    before = pair.streamed.device.counters
    times = alternate(
        benchmark,
        pair.plain_run,
        pair.streamed_run,
        forwards=_FORWARDS,
        rounds=part.rounds(6 if wire_apart else 4, round_s),
        wire_apart=wire_apart,
        **wire,
    )
    after = pair.streamed.device.counters
    assert after.allocations == before.allocations, "a forward allocated"
    assert after.host_synchronizes == before.host_synchronizes, "a forward made the host wait"
    return times


def _packed_on_device(streamed: Streamed) -> dict[str, Any]:
    stats = streamed.handle.stats
    return {
        "staging_bytes": stats.staging_bytes,
        "packed_bytes": stats.packed_bytes,
        "device_bytes": stats.device_bytes,
        "transports": {
            way: sum(unit.transport == way for unit in streamed.handle.units if unit.place)
            for way in ("raw", "packed", "packed_resident")
        },
        "num_resident": sum(unit.place is None for unit in streamed.handle.units),
    }


@_SHAPES
def bench_packed_forward(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    shape_index: int,
) -> None:
    """Everything travels: the packed model, the plain one, and the wire with the raw masters."""
    pair = Pair.of(stage, yardstick, shape_index, attempts=2, transport="packed")
    streamed = pair.streamed
    before = streamed.handle.stats
    with Counting(streamed):
        times = _against_plain(
            benchmark,
            part,
            pair,
            reference,
            masters=functools.partial(reference.link.copy_from, streamed.masters),
            link=lambda: reference.link.copy(streamed.streamed_bytes),
        )
    after = streamed.handle.stats
    copied = after.bytes_copied - before.bytes_copied
    onloaded = after.bytes_onloaded - before.bytes_onloaded
    resident, packed = spread(times.plain_ms), spread(times.streamed_ms)
    raw_floor = spread(times.masters_ms)
    part.figures.update(
        **pair.header("packed"),
        shape_index=shape_index,
        **_packed_on_device(streamed),
        plain_ms=resident,
        raw_floor_ms=raw_floor,
        link_ms=spread(times.link_ms),
        packed_ms=packed,
        of_raw_floor=packed["median"] / raw_floor["median"],
        of_roofline=packed["median"] / max(raw_floor["median"], resident["median"]),
        copied_share=copied / onloaded if onloaded else None,
    )


def bench_packed_auto(
    benchmark: Any, part: Part, stage: Stage, reference: Reference, yardstick: Workload
) -> None:
    """Where kernels are the limit: what `auto` makes of it once it has seen a forward."""
    last = len(yardstick.shapes) - 1
    pair = Pair.of(stage, yardstick, last, attempts=2, transport="auto")
    handle = pair.streamed.handle
    with handle.profile() as profiler:
        pair.streamed_run()
    handle.replan(profile=profiler.result)
    require_equal(pair.plain, pair.streamed.model, pair.tokens, attempts=2)
    masters = functools.partial(reference.link.copy_from, pair.streamed.masters)
    with Counting(pair.streamed):
        times = _against_plain(benchmark, part, pair, reference, masters=masters)
    resident, ours = spread(times.plain_ms), spread(times.streamed_ms)
    raw_floor = spread(times.masters_ms)
    part.figures.update(
        **pair.header("packed_auto"),
        **_packed_on_device(pair.streamed),
        plain_ms=resident,
        raw_floor_ms=raw_floor,
        streamed_ms=ours,
        of_roofline=ours["median"] / max(raw_floor["median"], resident["median"]),
    )


@_SHAPES
def bench_packed_resident(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    shape_index: int,
) -> None:
    """Everything stays packed on the device and nothing travels; the plain model beside."""
    pair = Pair.of(stage, yardstick, shape_index, attempts=2, transport="packed_resident")
    streamed = pair.streamed
    before = streamed.handle.stats
    # Of tiny units some are not worth packing, and fit into a window of their own for good.
    with contextlib.nullcontext() if part.tiny else Counting(streamed):
        times = _against_plain(benchmark, part, pair, reference)
    # Units without a place stay as they are, such as the head.
    travelling = [
        unit.name
        for unit in streamed.handle.units
        if unit.place and unit.transport != "packed_resident"
    ]
    copied_bytes = streamed.handle.stats.bytes_copied - before.bytes_copied
    assert part.tiny or not travelling, f"units that travel: {travelling}"
    assert travelling or copied_bytes == 0, f"{copied_bytes} bytes have travelled"
    resident, packed = spread(times.plain_ms), spread(times.streamed_ms)
    part.figures.update(
        **pair.header("packed_resident"),
        shape_index=shape_index,
        **_packed_on_device(streamed),
        plain_ms=resident,
        packed_ms=packed,
        of_resident=packed["median"] / resident["median"],
    )


def bench_packed_masters(
    benchmark: Any, part: Part, stage: Stage, reference: Reference, yardstick: Workload
) -> None:
    """No plain masters beside the packed ones: what is page-locked, and how fast it still is."""
    pair = Pair.of(stage, yardstick, 0, attempts=2, transport="packed", masters="packed")
    streamed = pair.streamed
    with Counting(streamed):
        times = _against_plain(benchmark, part, pair, reference)
    locked_bytes = streamed.device.counters.registered_bytes
    part.figures.update(
        **pair.header("packed_masters"),
        **_packed_on_device(streamed),
        page_locked_bytes=locked_bytes,
        page_locked_share=locked_bytes / streamed.streamed_bytes,
        plain_ms=spread(times.plain_ms),
        packed_ms=spread(times.streamed_ms),
    )


@pytest.mark.parametrize("transport", ["raw", "packed"])
def bench_packed_budget(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    transport: str,
) -> None:
    """One token within 60 % of the weights: the best raw plan, and the packed one.

    Cut as is best for each: leaves leave more room for what stays.
    """
    weights_bytes = sum(p.nbytes for p in stage.plain(yardstick).parameters())
    budget = int(_BUDGET_SHARE * weights_bytes)
    options = {"transport": transport, "granularity": "auto", "gpu_budget": budget}
    pair = Pair.of(stage, yardstick, 0, attempts=2, **options)
    streamed = pair.streamed
    on_device = _packed_on_device(streamed)
    assert on_device["device_bytes"] <= budget, f"more than {budget} bytes: {on_device}"
    before = streamed.handle.stats
    times = _against_plain(benchmark, part, pair, reference)
    after = streamed.handle.stats
    part.figures.update(
        **pair.header("packed_budget"),
        transport=transport,
        budget_bytes=budget,
        budget_share=_BUDGET_SHARE,
        **on_device,
        plain_ms=spread(times.plain_ms),
        streamed_ms=spread(times.streamed_ms),
        copied_bytes_per_forward=(after.bytes_copied - before.bytes_copied)
        / (after.forwards - before.forwards),
    )


def bench_packed_timelines(
    part: Part, stage: Stage, yardstick: Workload, results_folder: Path
) -> None:
    """Two forwards each of units that travel packed and of units that stay packed, recorded.

    `make figures` draws the picture of docs/packing.md from this file.
    """
    record_timelines(
        part,
        stage,
        yardstick,
        {
            "units travel packed": {"transport": "packed"},
            "they stay": {"transport": "packed_resident"},
        },
        results_folder / "packed.trace.json",
        what="packed_timeline",
    )
