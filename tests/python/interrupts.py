"""Ctrl-C at random moments of a call: a KeyboardInterrupt from a signal handler."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import pytest
import torch

needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")

# Calls something, and returns whether it was interrupted so many seconds after it began.
Interrupting: TypeAlias = Callable[[Callable[[], Any], float], bool]


def _swallows(frame: FrameType) -> bool:
    """Whether Python would print the interrupt and go on: in a callback, or what ends an object."""
    code = frame.f_code
    return (
        "weakref" in Path(code.co_filename).name
        or "weakref" in code.co_name
        or code.co_name == "__del__"
    )


@contextmanager
def interrupting() -> Iterator[Interrupting]:
    """In the main thread, once a call, a moment after it began."""
    is_armed = False

    def strike(signum: int, frame: FrameType | None) -> None:
        nonlocal is_armed
        if not is_armed:
            return
        if frame is not None and _swallows(frame):
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
            return
        is_armed = False
        raise KeyboardInterrupt

    def interrupts(call: Callable[[], Any], seconds: float) -> bool:
        nonlocal is_armed
        grad = torch.is_grad_enabled()
        try:
            is_armed = True
            signal.setitimer(signal.ITIMER_REAL, seconds)
            call()
            is_armed = False
        except KeyboardInterrupt:
            torch.set_grad_enabled(grad)  # it may strike within the exit of torch.no_grad()
            return True
        finally:
            is_armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False

    former = signal.signal(signal.SIGALRM, strike)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGALRM, former)


def interrupt_often(
    seed: int,
    call: Callable[[], Any],
    undo: Callable[[], Any],
    check: Callable[[], None],
    count: int,
) -> None:
    """Until so many calls were interrupted; `undo` follows a call that was not, `check` all."""
    generator = random.Random(seed)
    for _ in range(2):  # the first one imports
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        undo()
        check()
    interrupted = 0
    with interrupting() as interrupts:
        for _ in range(40 * count):
            if interrupts(call, generator.uniform(1e-5, seconds)):
                interrupted += 1
            else:
                undo()
            check()
            if interrupted == count:
                return
    pytest.fail(f"only {interrupted} calls were interrupted")
