"""The yardstick with packed units: against the raw floor and the resident model, in one run."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from clocks import alternate, spread
from conftest import Reference
from observe import Counting
from records import Part
from yardstick import YARDSTICK, Stage, Workload, bound, require_equal, shape_id


@pytest.mark.parametrize(
    "shape_index", range(len(YARDSTICK.shapes)), ids=[shape_id(s) for s in YARDSTICK.shapes]
)
def bench_packed_forward(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    shape_index: int,
) -> None:
    """The packed model, the plain one, and the wire with the raw masters take turns."""
    shape = yardstick.shapes[shape_index]
    plain = stage.plain(yardstick)
    streamed = stage.streamed(yardstick, transport="packed")
    tokens = yardstick.tokens(shape)
    require_equal(plain, streamed.model, tokens, attempts=2)
    plain_ms = reference.plain_ms(yardstick, shape)
    floor_ms = reference.floor_ms(streamed.streamed_bytes)
    forwards = 2
    round_s = (forwards + 1) * (2 * plain_ms + floor_ms) * 1e-3 + 2 * floor_ms * 1e-3
    before = streamed.handle.stats
    with Counting(streamed):
        times = alternate(
            benchmark,
            bound(plain, tokens),
            bound(streamed.model, tokens),
            forwards=forwards,
            rounds=part.rounds(4, round_s),
            masters=functools.partial(reference.link.copy_from, streamed.masters),
            link=lambda: reference.link.copy(streamed.streamed_bytes),
        )
    after = streamed.handle.stats
    copied = after.bytes_copied - before.bytes_copied
    onloaded = after.bytes_onloaded - before.bytes_onloaded
    resident, packed = spread(times.plain_ms), spread(times.streamed_ms)
    raw_floor = spread(times.masters_ms)
    part.figures.update(
        what="packed",
        shape=shape_id(shape),
        shape_index=shape_index,
        **streamed.describe(),
        staging_bytes=after.staging_bytes,
        plain_ms=resident,
        raw_floor_ms=raw_floor,
        link_ms=spread(times.link_ms),
        packed_ms=packed,
        of_raw_floor=packed["median"] / raw_floor["median"],
        of_roofline=packed["median"] / max(raw_floor["median"], resident["median"]),
        copied_share=copied / onloaded if onloaded else None,
        bit_equal=True,
    )
