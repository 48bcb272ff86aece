"""Delays on either side of every copy, poisoned places, and faults that these must make visible."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.gpu import models
from tests.gpu.harness import assert_all_equal, assert_copied_each, offloaded
from tests.gpu.streams import mark
from tests.python import expect
from torch_offload import StateError
from torch_offload.selfcheck.delays import RandomDelays, copy_streams, delay
from torch_offload.selfcheck.schedules import MODES
from torch_offload.selfcheck.uses import Uses

pytestmark = pytest.mark.needs_cuda


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("mode", "streams"), MODES)
@pytest.mark.parametrize("name", models.SUBJECTS)
@torch.no_grad()
def test_delayed_streams_change_nothing(
    device: torch.device, name: str, mode: str, streams: str, seed: int
) -> None:
    # With poison one depth and without it the other, so that each seed is another run.
    options: dict[str, Any] = {"poison": seed == 1, "depth": 0 if seed == 1 else None}
    model, kwargs = models.fresh(name, device), models.inputs(name, device)
    must = models.must_give(name, device)
    with offloaded(model, device, mode=mode, streams=streams, **options) as handle:
        delays = RandomDelays(handle, seed)
        with delays.inside(model if models.SUBJECTS[name].takes_hooks else nn.Module()):
            outputs = []
            with expect.watch(handle) as calls:
                delays.before_forward()
                outputs.append(models.run(model, kwargs))
                uses = Uses(handle)
                for _ in range(3):
                    delays.before_forward()
                    outputs.append(models.run(model, kwargs))
        assert delays.count > 0, "nothing was delayed"
        assert_all_equal(outputs, must)
        if options["poison"]:
            assert_copied_each(uses, least=3 * expect.num_streamed(handle))
        else:
            expect.assert_streams_exactly(calls)


@pytest.mark.filterwarnings("ignore:torch_offload. the first forward called:UserWarning")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("mode", "streams"), MODES)
@torch.no_grad()
def test_delayed_streams_with_orders_of_chance_change_nothing(
    device: torch.device, mode: str, streams: str, seed: int
) -> None:
    """Units skipped, repeated, reordered: what is copied ahead is guessed wrong."""
    model, plain = models.fresh("stack", device), models.resident("stack", device)
    kwargs = models.inputs("stack", device)
    orders = random.Random(seed)
    usual = list(plain.sequence)
    outputs, musts = [], []
    try:
        with offloaded(model, device, mode=mode, streams=streams, depth=0, poison=True) as handle:
            delays = RandomDelays(handle, seed)
            with delays.inside(model):
                for _ in range(6):
                    model.sequence = orders.choices(usual, k=orders.randrange(1, 8))
                    delays.before_forward()
                    outputs.append(models.run(model, kwargs))
                    plain.sequence = model.sequence
                    musts.append(models.run(plain, kwargs))
            assert handle.stats.onloads >= sum(unit.acquired for unit in handle.units) > 0
        for output, must in zip(outputs, musts, strict=True):
            assert_all_equal([output], must)
    finally:
        plain.sequence = usual


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("mode", "streams"), [("events", "split"), ("pipeline", "shared")])
@torch.no_grad()
def test_generate_with_delays_equals_resident(
    device: torch.device, cache: str, mode: str, streams: str
) -> None:
    model, plain = models.fresh("llama", device), models.resident("llama", device)
    ids = models.inputs("llama", device)["input_ids"]
    settings = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    must = plain.generate(ids, **settings)
    with offloaded(model, device, mode=mode, streams=streams) as handle:
        delays = RandomDelays(handle, seed=7, share=0.2)
        delays.before_forward()
        with delays.inside(model), expect.watch(handle) as calls:
            got = model.generate(ids, **settings)
        assert delays.count > 0
        assert torch.equal(got, must)
        assert len(calls.passes) == 8
        expect.assert_streams_exactly(calls)


@torch.no_grad()
def test_interleaved_models_with_delays_equal_resident(device: torch.device) -> None:
    names = ["llama", "t5"]
    subjects = [(models.fresh(name, device), models.inputs(name, device)) for name in names]
    musts = [models.must_give(name, device) for name in names]
    with (
        offloaded(subjects[0][0], device, streams="split", poison=True) as first,
        offloaded(subjects[1][0], device, mode="events", depth=0) as second,
    ):
        delays = [RandomDelays(first, 1), RandomDelays(second, 2)]
        outputs: list[list[torch.Tensor]] = [[], []]
        with delays[0].inside(subjects[0][0]), delays[1].inside(subjects[1][0]):
            for _ in range(4):
                for index, (model, kwargs) in enumerate(subjects):
                    delays[index].before_forward()
                    outputs[index].append(models.run(model, kwargs))
        for got, must in zip(outputs, musts, strict=True):
            assert_all_equal(got, must)
        for handle in (first, second):
            assert handle.stats.onloads > 3 * expect.num_streamed(handle)


# --- planted faults ------------------------------------------------------------------------------
# A perturbation that shows no planted fault proves nothing about the faults it does not show. Each
# has a twin without the fault that differs in one wait.


@pytest.mark.parametrize("planted", [True, False], ids=["no-wait-for-ready", "waits-for-ready"])
@torch.no_grad()
def test_reader_that_does_not_wait_for_the_copy_is_seen(
    device: torch.device, planted: bool
) -> None:
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    side = torch.cuda.Stream(device)
    entered: list[torch.cuda.Event] = []
    previous, last = model.blocks[-2], model.blocks[-1]
    with offloaded(model, device, depth=0, poison=True) as handle:
        models.run(model, kwargs)
        (copies,) = copy_streams(handle)
        plain_forward = last.attn.forward

        def on_side_stream(x: torch.Tensor) -> torch.Tensor:
            caller = torch.cuda.current_stream()
            # The input is there in both cases; only the weight may be on its way.
            side.wait_event(entered[0] if planted else mark(caller))
            with torch.cuda.stream(side):
                output: torch.Tensor = plain_forward(x)
            caller.wait_stream(side)
            return output

        hooks = [
            # Queued after the copy of `previous.mlp` and before that of `last.attn`, which is the
            # next but one: with a depth of 0, copies go one unit ahead.
            previous.attn.register_forward_pre_hook(lambda *_: delay(copies, 100.0)),
            last.register_forward_pre_hook(lambda *_: entered.append(mark())),
        ]
        vars(last.attn)["forward"] = on_side_stream
        try:
            output = models.run(model, kwargs)
            torch.cuda.synchronize(device)
        finally:
            del vars(last.attn)["forward"]
            for hook in hooks:
                hook.remove()
        assert torch.equal(output, must) is not planted
        assert_all_equal([models.run(model, kwargs)], must)


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize("planted", [True, False], ids=["unseen-by-free", "seen-by-free"])
@torch.no_grad()
def test_reader_that_free_does_not_cover_is_seen(
    device: torch.device, planted: bool, poison: bool
) -> None:
    """Its twin, joined before release, makes later copies and the poison wait for it."""
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    side = torch.cuda.Stream(device)
    late: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    leaf = model.blocks[1].attn
    with offloaded(model, device, depth=0, poison=poison) as handle:
        models.run(model, kwargs)
        # Should the allocator have to ask the driver for memory, it must not be while we read late.
        with torch.cuda.stream(side):
            F.linear(torch.zeros_like(kwargs["x"]), torch.zeros_like(model.embed.weight))

        def also_on_side_stream(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            caller = torch.cuda.current_stream()
            x = args[0].clone()
            right.extend((x, output.clone()))
            side.wait_event(mark(caller))
            delay(side, 100.0)
            with torch.cuda.stream(side):
                late.append(F.linear(x, leaf.weight, leaf.bias))
            if not planted:
                caller.wait_stream(side)

        hook = leaf.register_forward_hook(also_on_side_stream)
        before = handle.stats.onloads
        outputs = [models.run(model, kwargs)]
        hook.remove()
        outputs += [models.run(model, kwargs)]
        torch.cuda.synchronize(device)
        assert handle.stats.onloads - before >= expect.num_streamed(handle), (
            "nothing was overwritten"
        )
        assert torch.equal(late[0], right[1]) is not planted
        assert_all_equal(outputs, must)


@pytest.mark.parametrize("poison", [True, False])
@torch.no_grad()
def test_place_kept_beyond_release_reads_as_nan_with_poison(
    device: torch.device, poison: bool
) -> None:
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    kept: list[torch.Tensor] = []
    leaf = model.blocks[-1].mlp.down  # of the unit used last: nobody copies over it in this mode
    # Through DLPack, whose memory nobody can take back: torch's own views could not be read.
    keep: Callable[..., None] = lambda *_: kept.append(torch.from_dlpack(leaf.weight.detach()))  # noqa: E731
    with offloaded(model, device, mode="streams", depth=0, poison=poison):
        hook = leaf.register_forward_pre_hook(keep)
        with pytest.raises(StateError, match="keeps no view"):
            models.run(model, kwargs)
        hook.remove()
        late = F.linear(torch.ones(1, leaf.in_features, device=device), kept[0])
        assert bool(late.isnan().all()) is poison
        assert torch.equal(kept[0].cpu(), leaf.weight) is not poison
    kept.clear()
