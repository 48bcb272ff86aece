"""Who waits for whom on real streams, proved by holding one of them; and the host for nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.gpu import models
from tests.gpu.harness import assert_all_equal, offloaded
from tests.gpu.streams import Gate, mark
from tests.python import expect
from torch_offload import Handle
from torch_offload.selfcheck.delays import copy_streams, our_streams
from torch_offload.selfcheck.schedules import MODES

pytestmark = pytest.mark.needs_cuda

_FREE_HOST = [case for case in MODES if case[0] in ("events", "pipeline")]


def _marks_behind_blocks(model: Any) -> tuple[list[torch.cuda.Event], list[Any]]:
    """Events behind the kernels of each block's last leaf, in order; and the hooks to remove."""
    marks: list[torch.cuda.Event] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        marks.append(mark())

    return marks, [block.mlp.down.register_forward_hook(note) for block in model.blocks]


def _warm(handle: Handle, model: Any, kwargs: dict[str, Any]) -> None:
    """Two forwards: kernels are loaded, memory is had, the order is learned."""
    for _ in range(2):
        models.run(model, kwargs)
    torch.cuda.synchronize(handle.device)


def _is_whole(handle: Handle, name: str) -> bool:
    (index,) = (i for i, unit in enumerate(handle.units) if unit.name == name)
    return bool(handle._engine.is_whole(index))


@pytest.mark.parametrize(("mode", "streams"), _FREE_HOST)
@torch.no_grad()
def test_kernels_wait_for_held_copies_and_the_host_does_not(
    device: torch.device, mode: str, streams: str
) -> None:
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    with offloaded(model, device, mode=mode, streams=streams, depth=0) as handle:
        _warm(handle, model, kwargs)
        is_first_there = _is_whole(handle, "blocks.0.attn")
        assert not _is_whole(handle, "blocks.0.mlp"), "nothing is left to wait for"
        marks, hooks = _marks_behind_blocks(model)
        first: list[torch.cuda.Event] = []
        hooks.append(model.blocks[0].attn.register_forward_hook(lambda *_: first.append(mark())))
        gates = [Gate(stream) for stream in copy_streams(handle)]
        output = models.run(model, kwargs)
        for gate in gates:
            gate.assert_holds_back(marks[-1], "the last block's kernels")
        assert is_first_there is (mode == "pipeline")
        if is_first_there:
            # Copied at the end of the pass before: the seam between two forwards is closed.
            gates[0].assert_lets_pass(first[0], "a unit that was copied ahead")
        for hook in hooks:
            hook.remove()
        assert_all_equal([output], must)


@pytest.mark.parametrize(("mode", "streams"), _FREE_HOST)
@torch.no_grad()
def test_copies_wait_for_held_kernels_and_the_host_does_not(
    device: torch.device, mode: str, streams: str
) -> None:
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    with offloaded(model, device, mode=mode, streams=streams, depth=0) as handle:
        _warm(handle, model, kwargs)
        before = handle.stats.onloads
        gate = Gate(torch.cuda.current_stream())
        output = models.run(model, kwargs)
        assert handle.stats.onloads - before >= expect.num_streamed(handle), (
            "nothing was overwritten"
        )
        for stream in copy_streams(handle):
            gate.assert_holds_back(mark(stream), "the copy into a place still to be read")
        assert_all_equal([output], must)


@pytest.mark.parametrize(("mode", "streams"), MODES)
@torch.no_grad()
def test_host_waits_for_held_kernels_in_the_first_two_modes_only(
    device: torch.device, mode: str, streams: str
) -> None:
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    with offloaded(model, device, mode=mode, streams=streams) as handle:
        _warm(handle, model, kwargs)
        gate = Gate(torch.cuda.current_stream())
        output = models.run(model, kwargs)
        is_ahead = gate.is_closed
        behind = mark()
        if is_ahead:
            gate.assert_holds_back(behind, "the forward's own kernels")
        assert is_ahead is (mode in ("events", "pipeline"))
        assert_all_equal([output], must)


@torch.no_grad()
def test_many_forwards_are_queued_behind_a_held_stream(device: torch.device) -> None:
    model = models.fresh("stack", device)
    inputs = [models.inputs("stack", device, seed) for seed in range(6)]
    musts = [models.must_give("stack", device, seed) for seed in range(6)]
    with offloaded(model, device) as handle:
        _warm(handle, model, inputs[0])
        gate = Gate(torch.cuda.current_stream())
        outputs = [models.run(model, kwargs) for kwargs in inputs]
        gate.assert_holds_back(mark(), "the last of six forwards")
        for output, must in zip(outputs, musts, strict=True):
            assert_all_equal([output], must)


@torch.no_grad()
def test_two_copy_streams_are_held_apart(device: torch.device) -> None:
    """In ``split`` attention runs on while the copies of the FFN are held."""
    model, kwargs = models.fresh("stack", device), models.inputs("stack", device)
    must = models.must_give("stack", device)
    with offloaded(model, device, streams="split", depth=0) as handle:
        _warm(handle, model, kwargs)
        assert sorted(handle.streams) == [
            "compute_ffn",
            "compute_mha",
            "weight_h2d_ffn",
            "weight_h2d_mha",
        ]
        attention: list[torch.cuda.Event] = []
        ffn: list[torch.cuda.Event] = []
        block = model.blocks[0]
        hooks = [
            block.attn.register_forward_hook(lambda *_: attention.append(mark())),
            model.blocks[-1].mlp.down.register_forward_hook(lambda *_: ffn.append(mark())),
        ]
        (held,) = our_streams(handle, "weight_h2d_ffn").values()
        gate = Gate(held)
        output = models.run(model, kwargs)
        gate.assert_holds_back(ffn[0], "the last FFN")
        gate.assert_lets_pass(attention[0], "the first attention")
        for hook in hooks:
            hook.remove()
        assert_all_equal([output], must)
