"""DFloat11 beside ours: both stream packed weights and give the plain model's bits, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from clocks import ON_GPU, device_ms, spread
from conftest import Reference
from dfloat11_peer import DFloat11Offload
from records import Part
from yardstick import YARDSTICK, Stage, Workload, bound, require_equal, shape_id, shapes_of

_ROUNDS = 3


@pytest.fixture(scope="module")
def dfloat11(stage: Stage, yardstick: Workload) -> Iterator[Any]:
    """The peer's model."""
    for package in ("dahuffman", "dfloat11", "cupy"):
        pytest.importorskip(package)
    with DFloat11Offload(stage.copy_of_plain(yardstick)) as peer:
        yield peer.model


@pytest.mark.skipif(not ON_GPU, reason="DFloat11 decodes on a GPU only")
@shapes_of(YARDSTICK)
def bench_packed_peers(
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    dfloat11: Any,
    shape_index: int,
) -> None:
    """Plain model, wire, peer and ours take turns."""
    shape = yardstick.shapes[shape_index]
    tokens = yardstick.tokens(shape)
    plain = stage.plain(yardstick)
    streamed = stage.streamed(yardstick, transport="packed")
    models = {"plain": plain, "peer": dfloat11, "ours": streamed.model}
    for model in (dfloat11, streamed.model):
        require_equal(plain, model, tokens)
    times: dict[str, list[float]] = {name: [] for name in (*models, "floor")}
    for _ in range(_ROUNDS):
        for name, model in models.items():
            # Only ours runs ahead of a forward, and needs one in front of those that count.
            times[name] += device_ms(
                bound(model, tokens), forwards=2, rounds=1, lead_in=name == "ours"
            )
        times["floor"] += device_ms(
            lambda: reference.link.copy_from(streamed.masters), forwards=1, rounds=1, lead_in=False
        )
    spreads = {f"{name}_ms": spread(values) for name, values in times.items()}
    part.figures.update(
        what="packed_peer",
        peer="DFloat11",
        shape=shape_id(shape),
        shape_index=shape_index,
        **spreads,
        peer_of_ours=spreads["peer_ms"]["median"] / spreads["ours_ms"]["median"],
        bit_equal=True,
    )
