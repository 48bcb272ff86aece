"""Units that stay packed and units that travel packed in one ring: the plain model's bits."""

from __future__ import annotations

from typing import Any

import pytest

from tests.python import expect
from tests.python.dropin import assert_equal
from tests.python.test_packed_residency import (
    copied_in,
    deep_llama,
    device_bytes,
    transports_of,
    weights_bytes,
)
from tests.python.test_packed_transport import (
    HOST,
    LAYOUTS,
    _in_place,
    expected_of,
    run,
)
from torch_offload import Config, Handle, offload
from torch_offload.offload import offload_with

# Of the weights: little enough that places are shared.
SHARE = 0.6


def plan_of(handle: Handle) -> Any:
    return handle._engine.plan


def assert_shared(handle: Handle) -> None:
    assert plan_of(handle).one_ring
    assert {"packed", "packed_resident"} <= set(transports_of(handle))


@pytest.mark.parametrize("masters", ["plain", "packed"])
@pytest.mark.parametrize("granularity", ["sublayer", "module"])
@pytest.mark.parametrize(("mode", "streams"), LAYOUTS)
def test_forward_is_equal_within_the_budget_and_without_a_hazard(
    mode: Any, streams: Any, granularity: Any, masters: Any
) -> None:
    model = deep_llama()
    expected = expected_of(model)
    budget = int(SHARE * weights_bytes(model))
    options: Any = {"mode": mode, "streams": streams, "granularity": granularity}
    with offload(
        model, HOST, transport="packed", gpu_budget=budget, masters=masters, **options
    ) as handle:
        for _ in range(2):
            assert_equal(run(model), expected)
        assert_shared(handle)
        assert device_bytes(handle) <= budget
        with handle.record() as log:
            bytes_copied, onloads = copied_in(
                handle, lambda: [assert_equal(run(model), expected) for _ in range(3)]
            )
        assert handle.check() == []
        placed = [unit for unit in handle.units if unit.place is not None]
        once = sum(unit.copied_bytes for unit in placed)
        assert 2 * once < bytes_copied < 4 * once
        assert onloads <= 3 * len(placed) + 1
        kinds = [op.kind for op in log.ops]
        assert kinds.count("decode") == onloads
        expect.assert_at_rest(handle)
    assert_equal(run(model), expected)


@pytest.mark.parametrize("options", [{"debug": True}, {"poison": True}])
def test_poisoned_places_do_not_show(options: dict[str, bool]) -> None:
    model = deep_llama()
    expected = expected_of(model)
    budget = int(SHARE * weights_bytes(model))
    config = Config(transport="packed", gpu_budget=budget, **options)  # type: ignore[arg-type]
    with offload_with(model, HOST, config) as handle:
        assert_shared(handle)
        for _ in range(3):
            assert_equal(run(model), expected)


def test_edits_of_units_that_share_places_are_seen() -> None:
    model = deep_llama()
    budget = int(SHARE * weights_bytes(model))
    with offload(model, HOST, transport="packed", gpu_budget=budget) as handle:
        run(model)
        assert_shared(handle)
        for layer in model.model.layers:
            _in_place(layer.mlp.up_proj.weight)
        _in_place(model.model.layers[0].self_attn.o_proj.weight)
        twin = deep_llama()
        twin.load_state_dict(model.state_dict())
        with handle.record():
            assert_equal(run(model), run(twin))
        assert handle.check() == []


def test_budget_that_changes_goes_from_one_ring_to_two_and_back() -> None:
    model = deep_llama()
    expected = expected_of(model)
    whole = weights_bytes(model)
    with offload(model, HOST, transport="packed", gpu_budget=int(SHARE * whole)) as handle:
        seen = set()
        for share in (SHARE, 0.9, SHARE, 0.45, 2.0, SHARE):
            handle.replan(gpu_budget=int(share * whole))
            seen.add((plan_of(handle).one_ring, plan_of(handle).staging_slots))
            for _ in range(2):
                assert_equal(run(model), expected)
            with handle.record():
                assert_equal(run(model), expected)
            assert handle.check() == []
            assert share > 1 or device_bytes(handle) <= share * whole
        assert {ring for ring, _ in seen} == {False, True}
        assert {slots for _, slots in seen} == {1, 2}
