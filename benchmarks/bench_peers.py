"""The same yardstick under accelerate's `cpu_offload` and a bare event pipeline in Python."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from clocks import HostCost, Stamp, alternate, spread, synchronize
from conftest import Reference
from peers import AccelerateOffload, BarePipeline
from records import Part
from yardstick import YARDSTICK, Stage, Workload, bound, require_equal, shape_id

_PEERS = {"accelerate": AccelerateOffload, "bare": BarePipeline}
# accelerate's forward takes seconds whatever the shape: one timed call is enough to place it, and
# none runs ahead of a forward, so none is needed in front.
_ROUNDS = {"accelerate": 1, "bare": 3}


@pytest.fixture(scope="module")
def peers(stage: Stage, yardstick: Workload) -> Iterator[dict[str, Any]]:
    """Holds at most one peer, by name."""
    held: dict[str, Any] = {}
    yield held
    _let_go(held)


def _let_go(held: dict[str, Any]) -> None:
    while held:
        held.popitem()[1].__exit__(None, None, None)
    gc.collect()


@pytest.mark.parametrize(
    ("name", "shape_index"),
    [
        pytest.param(name, index, id=f"{name}-{shape_id(shape)}")
        for name in ("bare", "accelerate")
        for index, shape in enumerate(YARDSTICK.shapes)
    ],
)
@pytest.mark.benchmark(group="torch_offload.peers.device-time", timer=Stamp)
def bench_forward_peers(
    benchmark: Any,
    part: Part,
    stage: Stage,
    reference: Reference,
    yardstick: Workload,
    peers: dict[str, Any],
    name: str,
    shape_index: int,
) -> None:
    """One forward of a peer, bit-equal to the plain model."""
    shape = yardstick.shapes[shape_index]
    tokens = yardstick.tokens(shape)
    plain = stage.plain(yardstick)
    plain_ms = reference.plain_ms(yardstick, shape)
    if name not in peers:
        _let_go(peers)
        peers[name] = _PEERS[name](stage.copy_of_plain(yardstick))
    model = peers[name].model
    require_equal(plain, model, tokens)
    times = alternate(
        benchmark,
        None,
        bound(model, tokens),
        forwards=1,
        rounds=_ROUNDS[name],
        lead_in=False,
    )
    cost = None
    if name != "accelerate":  # which returns when the last copy is done
        synchronize()
        cost = HostCost.of(bound(model, tokens)).wall_ms
        synchronize()
    streamed_bytes = yardstick.layer_bytes * yardstick.num_layers
    floor_ms = reference.floor_ms(streamed_bytes)
    ours = spread(times.streamed_ms)
    part.figures.update(
        what="peer",
        peer=name,
        shape=shape_id(shape),
        shape_index=shape_index,
        link_bytes_per_s=reference.link_bytes_per_s,
        floor_ms=floor_ms,
        plain_ms=plain_ms,
        streamed_ms=ours,
        ratio=ours["median"] / max(floor_ms, plain_ms),
        submit_ms=cost,
        bit_equal=True,
    )
