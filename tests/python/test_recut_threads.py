"""A plan that is to change as another thread's forward has begun: it stays, no output is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import plain_on, rows, tiny_llama, tiny_stack, tokens
from tests.python.fake_memory import FakeMemory
from torch_offload import installation, leaves
from torch_offload.config import Config
from torch_offload.idle import IdleUnits
from torch_offload.offload import offload_with
from torch_offload.storage import ResidentMove

HOST = torch.device("cpu")


@contextmanager
def other_forward(model: nn.Module, inner: nn.Module, x: torch.Tensor) -> Iterator[Any]:
    """Yields what begins a forward in another thread, which stays in `inner` until the end."""
    goes_on, is_inside = threading.Event(), threading.Event()
    outputs: list[torch.Tensor] = []
    threads: list[threading.Thread] = []

    def wait(*args: Any) -> None:
        if threading.current_thread() in threads:
            is_inside.set()
            assert goes_on.wait(60)

    @torch.no_grad()
    def run() -> None:
        outputs.append(model(x.clone()))

    def begin() -> None:
        threads.append(threading.Thread(target=run))
        threads[0].start()
        assert is_inside.wait(60)

    hook = inner.register_forward_pre_hook(wait)
    begin.outputs = outputs  # type: ignore[attr-defined]
    try:
        yield begin
    finally:
        goes_on.set()
        for thread in threads:
            thread.join()
        hook.remove()


def once(call: Callable[[], None]) -> Callable[[], None]:
    calls = [call]
    return lambda: calls.pop()() if calls else None


@torch.no_grad()
def test_forward_that_began_before_the_plan_grew_keeps_it_and_the_output() -> None:
    model, x = tiny_stack(6), rows(HOST)
    must = plain_on(model, HOST)(x)
    memory = FakeMemory(2 * sum(parameter.nbytes for parameter in model.parameters()))
    with offload_with(model, HOST, Config(gpu_budget="auto", headroom=0), memory) as handle:
        with other_forward(model, model.blocks[3].mlp.down, x) as begin:
            measured, start = memory.peak_bytes, once(begin)

            def peak_bytes() -> int:
                start()  # the first forward's pass has ended
                return measured()

            memory.peak_bytes = peak_bytes  # type: ignore[method-assign]
            assert torch.equal(model(x), must)
            assert handle._engine.in_pass
            assert None not in placed(handle).places, "it kept its plan"
        assert torch.equal(begin.outputs[0], must)
        expect.assert_at_rest(handle)
        assert torch.equal(model(x), must)
        assert any(unit.place is None for unit in handle.units), "the later one has changed it"


@torch.no_grad()
def test_handle_that_is_removed_before_the_plan_grew_costs_no_output() -> None:
    model, x = tiny_stack(6), rows(HOST)
    must = plain_on(model, HOST)(x)
    memory = FakeMemory(2 * sum(parameter.nbytes for parameter in model.parameters()))
    handle = offload_with(model, HOST, Config(gpu_budget="auto", headroom=0), memory)
    measured = memory.peak_bytes

    def peak_bytes() -> int:
        thread = threading.Thread(target=handle.remove)
        thread.start()
        thread.join()
        return measured()

    memory.peak_bytes = peak_bytes  # type: ignore[method-assign]
    assert torch.equal(model(x), must)
    assert handle.is_removed
    assert torch.equal(model(x), must)


@torch.no_grad()
def test_forward_that_began_before_the_cut_puts_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_stack(4), rows(HOST)
    must = plain_on(model, HOST)(x)
    with torch_offload.offload(model, HOST, granularity="module", gpu_budget=None) as handle:
        sublayers = [unit.name for unit in handle.units]
        with other_forward(model, model.blocks[3].mlp.down, x) as begin:
            start, cut = once(begin), leaves.leaf_units

            def leaf_units(*args: Any) -> Any:
                start()
                return cut(*args)

            monkeypatch.setattr(leaves, "leaf_units", leaf_units)
            assert torch.equal(model(x), must)
            assert [unit.name for unit in placed(handle).units] == sublayers
        assert torch.equal(begin.outputs[0], must)
        assert torch.equal(model(x), must)
        assert "blocks.2.mlp.down" in {unit.name for unit in handle.units}
        assert torch.equal(model(x), must)


def placed(handle: torch_offload.Handle) -> Any:
    """The plan as Python has it: the engine tells only the thread that runs a forward."""
    return handle._installed.placed.plan


def test_idle_units_are_told_after_a_later_forward() -> None:
    class Busy:
        @property
        def plan(self) -> Any:
            raise torch_offload.StateError("another thread")

    idle = IdleUnits()
    idle.tell(Busy())  # type: ignore[arg-type]  # all that is asked of it
    model = tiny_stack(2)
    with torch_offload.offload(model, HOST) as handle, pytest.warns(UserWarning, match="0 of 4"):
        idle.tell(handle._engine)


def test_tables_come_back_whatever_the_engine_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(vocab_size=512)
    undone: list[list[torch.Tensor]] = []

    class Noting(ResidentMove):
        def move(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
            self.asked = list(tensors)
            super().move(self.asked, *args, **kwargs)

        def undo(self) -> None:
            undone.append(getattr(self, "asked", []))
            super().undo()

    class Busy:
        """As an engine whose plan another thread's forward holds."""

        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def recut(self, *args: Any) -> int:
            raise torch_offload.StateError("planted")

        @property
        def plan(self) -> Any:
            raise torch_offload.StateError("asked of the plan")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

    with torch_offload.offload(model, HOST, gpu_budget="1MiB") as handle, torch.no_grad():
        must = model(tokens(HOST)).logits
        least = least_named(handle)
        with monkeypatch.context() as patch:
            patch.setattr(installation, "ResidentMove", Noting)
            patch.setattr(handle._installed, "_engine", Busy(handle._engine))
            with pytest.raises(torch_offload.StateError):
                handle.replan(gpu_budget=least)
        weight = model.model.embed_tokens.weight
        assert any(tensor is weight for tensors in undone for tensor in tensors)
        assert torch.equal(model(tokens(HOST)).logits, must)


def least_named(handle: torch_offload.Handle) -> int:
    with pytest.raises(ValueError, match="gpu_budget of at least") as caught:
        handle.replan(gpu_budget=1)
    return int(str(caught.value).split("at least ")[1].split()[0])
