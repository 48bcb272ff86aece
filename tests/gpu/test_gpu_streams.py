"""Callers with streams of their own."""

from __future__ import annotations

import pytest
import torch

import torch_offload
from tests.gpu import models
from tests.gpu.harness import assert_all_equal, assert_rests_in_locked_memory, offloaded
from tests.python import expect
from torch_offload import StateError
from torch_offload.selfcheck.delays import RandomDelays, delay
from torch_offload.selfcheck.schedules import MODES

pytestmark = pytest.mark.needs_cuda


@pytest.mark.parametrize(("mode", "streams"), MODES)
@pytest.mark.parametrize("name", ["llama", "encoder"])
@torch.no_grad()
def test_caller_on_its_own_stream_equals_resident(
    device: torch.device, name: str, mode: str, streams: str
) -> None:
    model, kwargs = models.fresh(name, device), models.inputs(name, device)
    must = models.must_give(name, device)
    own = torch.cuda.Stream(device)
    own.wait_stream(torch.cuda.current_stream())
    with offloaded(model, device, mode=mode, streams=streams, depth=0, poison=True) as handle:
        delays = RandomDelays(handle, seed=3)
        with torch.cuda.stream(own), expect.watch(handle) as calls:
            outputs = []
            for _ in range(3):
                delays.before_forward()
                outputs.append(models.run(model, kwargs))
                assert torch.cuda.current_stream() == own
        own.synchronize()
        assert_all_equal(outputs, must)
        assert [one.onloads > 0 for one in calls.passes] == [True] * 3


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "independent"])
@pytest.mark.parametrize(("mode", "streams"), MODES)
@torch.no_grad()
def test_two_streams_in_turn_equal_resident(
    device: torch.device, mode: str, streams: str, joined: bool
) -> None:
    """Two forwards share nothing but the weights, so the caller need not order them."""
    model = models.fresh("stack", device)
    inputs = [models.inputs("stack", device, seed) for seed in range(6)]
    musts = [models.must_give("stack", device, seed) for seed in range(6)]
    callers = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
    for caller in callers:
        caller.wait_stream(torch.cuda.current_stream())
    outputs = []
    with offloaded(model, device, mode=mode, streams=streams, depth=0) as handle:
        delays = RandomDelays(handle, seed=4)
        with delays.inside(model):
            for number, kwargs in enumerate(inputs):
                caller, other = callers[number % 2], callers[1 - number % 2]
                if joined:
                    caller.wait_stream(other)
                with torch.cuda.stream(caller):
                    delays.before_forward()
                    # The later forward could run first, and would if nothing of ours held it.
                    delay(caller, 20.0 if number % 2 == 0 else 0.1)
                    outputs.append(models.run(model, kwargs))
        torch.cuda.synchronize(device)
        for output, must in zip(outputs, musts, strict=True):
            assert_all_equal([output], must)
        assert handle.stats.onloads >= 6 * expect.num_streamed(handle)


@pytest.mark.parametrize("streams", ["shared", "split"])
@pytest.mark.parametrize("own_at_offload", [True, False])
@torch.no_grad()
def test_offload_under_one_stream_and_forward_under_another(
    device: torch.device, streams: str, own_at_offload: bool
) -> None:
    model, kwargs = models.fresh("llama", device), models.inputs("llama", device)
    must = models.must_give("llama", device)
    default, own = torch.cuda.current_stream(), torch.cuda.Stream(device)
    own.wait_stream(default)
    there, here = (own, default) if own_at_offload else (default, own)
    # Whatever is queued where the window is allocated must be over before it is written to.
    delay(there, 50.0)
    with torch.cuda.stream(there):
        handle = torch_offload.offload(model, device, streams=streams)  # type: ignore[arg-type]
    here.wait_stream(there)
    with torch.cuda.stream(here), expect.watch(handle) as calls:
        outputs = [models.run(model, kwargs) for _ in range(3)]
    here.synchronize()
    assert_all_equal(outputs, must)
    expect.assert_streams_exactly(calls)
    assert_rests_in_locked_memory(handle)
    with torch.cuda.stream(here):
        handle.remove()
    assert_all_equal([models.run(model.to(device), kwargs)], must)


@torch.no_grad()
def test_stream_that_the_model_itself_changes_is_followed(device: torch.device) -> None:
    """A module may run a leaf on a stream of its own, if it joins it: so does the copy then."""
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    side = torch.cuda.Stream(device)
    block = model.blocks[2]
    plain_forward = block.forward

    def on_side_stream(x: torch.Tensor) -> torch.Tensor:
        caller = torch.cuda.current_stream()
        side.wait_stream(caller)
        with torch.cuda.stream(side):
            delay(side, 10.0)
            output: torch.Tensor = plain_forward(x)
        caller.wait_stream(side)
        return output

    with offloaded(model, device, depth=0, poison=True) as handle:
        vars(block)["forward"] = on_side_stream
        try:
            outputs = [models.run(model, kwargs) for _ in range(4)]
            torch.cuda.synchronize(device)
        finally:
            del vars(block)["forward"]
        assert_all_equal(outputs, must)
        assert handle.stats.onloads >= 4 * expect.num_streamed(handle)


@torch.no_grad()
def test_remove_and_teardown_with_copies_in_flight(device: torch.device) -> None:
    kwargs, must = models.inputs("llama", device), models.must_give("llama", device)
    for ends in ("remove", "del"):
        model = models.fresh("llama", device)
        handle = torch_offload.offload(model, device)
        models.run(model, kwargs)
        delays = RandomDelays(handle, seed=5)
        with delays.inside(model):
            delays.before_forward()
            output = models.run(model, kwargs)
        if ends == "remove":
            handle.remove()
            assert_all_equal([models.run(model.to(device), kwargs)], must)
        del model, handle, delays
        # Whatever gets the window's memory next may write to it at once.
        junk = torch.full((64, 2**20), float("nan"), device=device)
        assert_all_equal([output], must)
        assert junk.isnan().all()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@torch.no_grad()
def test_captured_forward_is_refused_and_the_next_one_runs(device: torch.device) -> None:
    model, kwargs = models.fresh("encoder", device), models.inputs("encoder", device)
    must = models.must_give("encoder", device)
    with offloaded(model, device):
        assert_all_equal([models.run(model, kwargs)], must)
        with (
            pytest.raises(StateError, match="captured into a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            models.run(model, kwargs)
        assert_all_equal([models.run(model, kwargs)], must)
