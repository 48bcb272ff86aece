"""The yardstick: the pipeline against the roofline, what it costs the host, what it allocates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from clocks import Stamp, alternate, alternation_seconds, spread
from conftest import Reference
from observe import Counting, activation_bytes, allocator_activity, runtime_calls
from records import Part
from submission import measure_submission
from yardstick import YARDSTICK, Pair, Stage, Workload, shapes_of

_SHAPES = shapes_of(YARDSTICK)


def _measure_forward(
    benchmark: Any,
    part: Part,
    pair: Pair,
    reference: Reference,
    *,
    wanted_rounds: int,
    weight: float = 1.0,
) -> None:
    streamed = pair.streamed
    expected_floor_ms = reference.floor_ms(streamed.streamed_bytes)
    plain_ms = reference.plain_ms(pair.workload, pair.shape)
    forwards = 2
    is_compute_bound = plain_ms > expected_floor_ms
    link = functools.partial(reference.link.copy, streamed.streamed_bytes)
    round_s = alternation_seconds(
        plain_ms,
        max(plain_ms, expected_floor_ms),
        forwards=forwards,
        wire_ms=expected_floor_ms,
        wire_turns=0 if is_compute_bound else 2,
        plain_turns=2 if is_compute_bound else 1,
    )
    rounds = part.rounds(wanted_rounds, round_s, weight=weight)
    with Counting(streamed) as counting:
        times = alternate(
            benchmark,
            pair.plain_run,
            pair.streamed_run,
            forwards=forwards,
            rounds=rounds,
            masters=functools.partial(reference.link.copy_from, streamed.masters),
            link=link,
            wire_apart=is_compute_bound,
            beside_copies=link if is_compute_bound else None,
        )
    resident, ours = spread(times.plain_ms), spread(times.streamed_ms)
    masters, link = spread(times.masters_ms), spread(times.link_ms)
    roofline_ms = max(masters["median"], resident["median"])
    part.figures.update(
        **pair.header("forward"),
        shape_index=pair.shape_index,
        layer_bytes=pair.workload.layer_bytes,
        link_bytes_per_s=reference.link_bytes_per_s,
        floor_ms=masters,
        hot_floor_ms=link,
        plain_ms=resident,
        streamed_ms=ours,
        roofline_ms=roofline_ms,
        ratio=ours["median"] / roofline_ms,
        ratio_min=ours["min"] / roofline_ms,
        ratio_max=ours["max"] / roofline_ms,
        hot_ratio=ours["median"] / max(link["median"], resident["median"]),
        per_forward=counting.per_forward(),
    )
    if times.plain_beside_copies_ms:
        beside = spread(times.plain_beside_copies_ms)
        part.figures.update(
            plain_beside_copies_ms=beside,
            plain_beside_copies_ratio=beside["median"] / roofline_ms,
        )
    benchmark.extra_info.update(ratio=part.figures["ratio"], roofline_ms=roofline_ms)


def bench_copy_link(part: Part, reference: Reference) -> None:
    """The ceiling: copies from page-locked memory, nothing else running."""
    part.figures.update(
        what="link",
        link_bytes_per_s=reference.link_bytes_per_s,
        by_copy_bytes={str(size): rate for size, rate in reference.link_rates.items()},
    )


@_SHAPES
@pytest.mark.benchmark(group="torch_offload.forward.device-time-of-2", timer=Stamp)
def bench_forward_sublayer(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    shape_index: int,
) -> None:
    """Halves, the default: the two models take turns."""
    pair = Pair.of(stage, yardstick, shape_index, attempts=2, granularity="sublayer")
    _measure_forward(benchmark, part, pair, reference, wanted_rounds=8, weight=4.0)


@_SHAPES
@pytest.mark.benchmark(group="torch_offload.forward.submit")
def bench_submit_sublayer(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    shape_index: int,
) -> None:
    """How long `forward()` keeps its caller, on an idle device, and how much of that is ours."""
    pair = Pair.of(stage, yardstick, shape_index, granularity="sublayer")
    measure_submission(benchmark, part, pair, reference, "submit", wanted_rounds=15, weight=1.5)


@_SHAPES
def bench_memory_sublayer(part: Part, stage: Stage, yardstick: Workload, shape_index: int) -> None:
    """Device memory of one forward beyond what lies there at rest, of both models."""
    pair = Pair.of(stage, yardstick, shape_index, granularity="sublayer")
    part.figures.update(
        **pair.header("memory"),
        shape_index=shape_index,
        plain_activation_bytes=activation_bytes(pair.plain_run),
        activation_bytes=activation_bytes(pair.streamed_run),
        plain_allocator=allocator_activity(pair.plain_run),
        allocator=allocator_activity(pair.streamed_run),
    )


def bench_outside_sublayer(part: Part, stage: Stage, yardstick: Workload) -> None:
    """Host waits, allocations and pageable copies as torch's profiler sees them, in two forwards.

    Ours are what the streamed model has beyond the plain one.
    """
    forwards = 2
    pair = Pair.of(stage, yardstick, 0, granularity="sublayer")
    runtime_calls(pair.plain_run, 1)  # the profiler's own first use
    plain_calls = runtime_calls(pair.plain_run, forwards)
    with Counting(pair.streamed) as counting:
        streamed_calls = runtime_calls(pair.streamed_run, forwards)
    ours = None
    if plain_calls is not None and streamed_calls is not None:
        ours = {name: count - plain_calls[name] for name, count in streamed_calls.items()}
        assert ours["copies_to_device"] >= forwards * pair.streamed.num_units, (
            f"the profiler saw too few copies to be believed: {streamed_calls}"
        )
    part.figures.update(
        **pair.header("outside"),
        forwards=forwards,
        plain_calls=plain_calls,
        streamed_calls=streamed_calls,
        ours=ours,
        counted_by_device=counting.per_forward(),
    )


@_SHAPES
@pytest.mark.benchmark(group="torch_offload.forward.device-time-of-2", timer=Stamp)
def bench_forward_module(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    shape_index: int,
) -> None:
    """Leaves: the smallest window."""
    pair = Pair.of(stage, yardstick, shape_index, attempts=2, granularity="module")
    _measure_forward(benchmark, part, pair, reference, wanted_rounds=3)


@_SHAPES
@pytest.mark.benchmark(group="torch_offload.forward.device-time-of-2", timer=Stamp)
def bench_forward_layer(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    shape_index: int,
) -> None:
    """Whole layers: the fewest copies."""
    pair = Pair.of(stage, yardstick, shape_index, attempts=2, granularity="layer")
    _measure_forward(benchmark, part, pair, reference, wanted_rounds=2)
