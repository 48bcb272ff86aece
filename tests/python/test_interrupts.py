"""An interrupt at any moment of a forward: nothing stays on its place, the next one is right."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_stack,
)
from tests.python.interrupts import interrupting, needs_timer

_NUM_FORWARDS = 1000


class _InterruptAt(TorchDispatchMode):
    """Raises at the k-th operator: inside layers, between them, and inside torch's own modules."""

    def __init__(self, k: int, error: type[BaseException]) -> None:
        super().__init__()
        self._left = k
        self._error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("options", [{}, {"streams": "split"}, {"mode": "sync"}], ids=str)
def test_interrupt_at_every_operator_leaves_the_model_at_rest(
    device: torch.device, error: type[BaseException], options: dict[str, Any]
) -> None:
    model = tiny_stack(3)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, **options) as handle, torch.no_grad():
        must = plain(x)
        for k in range(1000):
            try:
                with _InterruptAt(k, error):
                    model(x)
                break
            except error:
                expect.assert_at_rest(handle)
        assert k > 3 * 6, "fewer operators than the model has"
        assert torch.equal(model(x), must)
    assert_equal_weights(model, plain)


def assert_equal_weights(model: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Asserts that no weight was lost on the way."""
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name).to(parameter.device), parameter), name


@needs_timer
@pytest.mark.parametrize("mode", ["pipeline", "sync"])
def test_thousand_forwards_interrupted_at_random_moments(device: torch.device, mode: str) -> None:
    model = tiny_stack(6)
    plain = plain_on(model, device)
    x = rows(device)
    generator = random.Random(20)
    count = _NUM_FORWARDS if mode == "pipeline" else _NUM_FORWARDS // 10
    with (
        streamed(model, device, mode=mode) as handle,
        torch.no_grad(),
        interrupting() as interrupts,
    ):
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        must = plain(x)
        started = time.perf_counter()
        for _ in range(20):
            model(x)
        seconds = (time.perf_counter() - started) / 20
        interrupted = right = 0
        while interrupted < count:
            if interrupts(lambda: model(x), generator.uniform(0.02, 0.98) * seconds + 1e-6):
                interrupted += 1
                expect.assert_at_rest(handle)
            if interrupted % 10 == 0:
                right += 1
                assert torch.equal(model(x), must)
        assert right >= count // 10
        assert handle.stats.forwards > 0
    assert_equal_weights(model, plain)


_SLOW_MANAGER = """
class Slow:
    def __enter__(self):
        changes.append("default device")
        wait(0.01)

    def __exit__(self, *_):
        wait(0.01)
        changes.clear()

def wait(seconds):
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass

def call():
    with Slow():
        pass
    wait(60)
"""


@needs_timer
@pytest.mark.parametrize("seconds", [0.005, 0.015, 0.03], ids=["entered", "left", "after"])
def test_interrupts_wait_while_context_managers_of_torch_are_entered_or_left(
    seconds: float,
) -> None:
    changes: list[str] = []
    scope: dict[str, Any] = {"changes": changes, "time": time}
    exec(compile(_SLOW_MANAGER, torch.__file__, "exec"), scope)  # passes for torch's own
    with interrupting() as interrupts:
        assert interrupts(scope["call"], seconds)
    assert changes == []


def test_interrupt_from_another_thread_leaves_the_model_at_rest(device: torch.device) -> None:
    import ctypes

    model = tiny_stack(4)
    plain = plain_on(model, device)
    x = rows(device)
    interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
    generator = random.Random(21)
    stop = threading.Event()
    interrupted = 0
    ready = threading.Event()

    def forwards() -> None:
        nonlocal interrupted
        with torch.no_grad():
            while not stop.is_set():
                try:
                    ready.set()
                    model(x)
                except KeyboardInterrupt:
                    interrupted += 1

    with streamed(model, device) as handle:
        worker = threading.Thread(target=_guarded(forwards))
        worker.start()
        assert ready.wait(60)
        while interrupted < 50 and worker.is_alive():
            for _ in range(generator.randrange(2000)):
                pass
            interrupt(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(KeyboardInterrupt))
        stop.set()
        worker.join(60)
        assert not worker.is_alive()
        assert interrupted >= 50
        expect.assert_at_rest(handle)
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
    assert_equal_weights(model, plain)


def _guarded(call: Callable[[], None]) -> Callable[[], None]:
    """A thread's body that an interrupt outside a forward does not end with a traceback."""

    def run() -> None:
        while True:
            try:
                call()
                return
            except KeyboardInterrupt:
                continue

    return run


def test_interrupted_pass_teaches_no_order(device: torch.device) -> None:
    model = tiny_stack(4)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)
        with expect.watch(handle) as calls:
            for k in (9, 14):
                with pytest.raises(KeyboardInterrupt), _InterruptAt(k, KeyboardInterrupt):
                    model(x)
            for _ in range(3):
                assert torch.equal(model(x), plain(x))
        expect.assert_streams_exactly(calls, exact_passes=3)
        assert [one.misses for one in calls.passes[-2:]] == [0, 0]


@pytest.mark.parametrize("k", [0, 3, 6])
def test_out_of_memory_in_a_layer_leaves_the_model_at_rest(device: torch.device, k: int) -> None:
    model = tiny_stack(4)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle, torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError), _InterruptAt(k, torch.OutOfMemoryError):
            model(x)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)


def test_interrupt_while_removing_can_be_followed_by_remove(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_offload import wrapping

    model = tiny_stack(3)
    before = expect.snapshot(model)
    handle = torch_offload.offload(model, device)

    def interrupted(module: torch.nn.Module) -> None:
        raise KeyboardInterrupt

    for step in ("unwrap", "unguard"):
        monkeypatch.setattr(wrapping, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            handle.remove()
        monkeypatch.undo()
    handle.remove()
    expect.assert_unchanged(model, before, same_memory=False)
