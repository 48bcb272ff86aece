"""Every mode, layout and granularity: the resident model's bits, and just the copies they need."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from tests.gpu import models
from tests.gpu.harness import (
    PlaceProbe,
    assert_all_equal,
    assert_copied_each,
    assert_rests_in_locked_memory,
    offloaded,
    settle,
)
from tests.python import expect
from torch_offload.selfcheck.schedules import MODES
from torch_offload.selfcheck.uses import Uses

_GRANULARITIES = ("sublayer", "layer", "module")

# The full product for one model; the others meet each mode and layout with one granularity each.
_COMBINATIONS = [
    (name, mode, streams, granularity)
    for shift, name in enumerate(models.SUBJECTS)
    for number, (mode, streams) in enumerate(MODES)
    for position, granularity in enumerate(_GRANULARITIES)
    if name == "llama" or position == (shift + number) % len(_GRANULARITIES)
]


def _options(name: str, mode: str, streams: str, granularity: str) -> dict[str, Any]:
    # The fast path of an encoder layer reads its leaves itself: there are none to cut.
    if name == "encoder" and granularity == "module":
        granularity = "layer"
    # Of four layers a window for a whole layer ahead may hold all: nothing would be streamed.
    depth = 0 if granularity == "layer" else None
    return {"mode": mode, "streams": streams, "granularity": granularity, "depth": depth}


@pytest.mark.parametrize(("name", "mode", "streams", "granularity"), _COMBINATIONS)
@torch.no_grad()
def test_outputs_equal_resident_with_exact_copies(
    device: torch.device, name: str, mode: str, streams: str, granularity: str
) -> None:
    model, kwargs = models.fresh(name, device), models.inputs(name, device)
    must = models.must_give(name, device)
    with offloaded(model, device, **_options(name, mode, streams, granularity)) as handle:
        settle(handle, model, kwargs)
        with expect.watch(handle) as calls:
            outputs = [models.run(model, kwargs) for _ in range(3)]
        assert_all_equal(outputs, must)
        expect.assert_streams_exactly(calls)
        assert calls.passes[-1].onloads > 0, "the last pass copied nothing: the window is too large"
        assert_rests_in_locked_memory(handle)
        if models.SUBJECTS[name].takes_hooks:
            with PlaceProbe(handle).inside(model):
                assert_all_equal([models.run(model, kwargs)], must)
    assert_all_equal([models.run(model.to(device), kwargs)], must)


@pytest.mark.parametrize("name", models.SUBJECTS)
@pytest.mark.parametrize(("mode", "streams"), MODES)
@torch.no_grad()
def test_poisoned_places_change_nothing(
    device: torch.device, name: str, mode: str, streams: str
) -> None:
    model, kwargs = models.fresh(name, device), models.inputs(name, device)
    must = models.must_give(name, device)
    with offloaded(model, device, mode=mode, streams=streams, depth=0, poison=True) as handle:
        outputs = [models.run(model, kwargs)]
        uses = Uses(handle)
        outputs += [models.run(model, kwargs) for _ in range(3)]
        assert_all_equal(outputs, must)
        assert_copied_each(uses, least=3 * expect.num_streamed(handle))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast"])
def test_ways_of_calling_equal_resident(device: torch.device, name: str, context: str) -> None:
    model, kwargs = models.fresh(name, device), models.inputs(name, device)
    plain = models.resident(name, device)
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(offloaded(model, device, streams="split"))
        stack.enter_context(torch.inference_mode() if context != "no_grad" else torch.no_grad())
        if context == "autocast":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        must = models.run(plain, kwargs)
        with expect.watch(handle) as calls:
            outputs = [models.run(model, kwargs) for _ in range(3)]
        assert_all_equal(outputs, must)
        expect.assert_streams_exactly(calls)
