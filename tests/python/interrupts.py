"""Ctrl-C at random moments of a call: a KeyboardInterrupt from a signal handler."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import pytest
import torch

import torch_offload

needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")

# Calls something, and returns whether it was interrupted so many seconds after it began.
Interrupting: TypeAlias = Callable[[Callable[[], Any], float], bool]

_PACKAGE = Path(torch_offload.__file__).parent
_LIBRARIES = [Path(torch.__file__).parents[1] / name for name in ("torch", "transformers")]


def _is_ours(frame: FrameType) -> bool:
    """Whether it runs the package, or contextlib for a `with` of the package."""
    file = Path(frame.f_code.co_filename)
    if file == Path(contextlib.__file__):
        return frame.f_back is not None and _is_ours(frame.f_back)
    return file.is_relative_to(_PACKAGE)


def _is_of_library(frame: FrameType) -> bool:
    file = Path(frame.f_code.co_filename)
    return any(file.is_relative_to(library) for library in _LIBRARIES)


def _enters_or_leaves(frame: FrameType) -> bool:
    return frame.f_code.co_name in ("__enter__", "__exit__")


def _swallows(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "__del__" or "weakref" in f"{Path(code.co_filename).name} {code.co_name}"


def _waits(frame: FrameType | None) -> bool:
    """Whether an interrupt that strikes here would come too late, be lost or do harm elsewhere.

    In a frame of the tests the call may be over. Thread pools and progress bars are not made for
    one, nor are torch's context managers and transformers' stack of them while they are entered or
    left: the default device may stay ``meta``, gradients may stay off. In a callback, or in what
    ends an object, Python prints it and goes on.
    """
    frames = [one for one, _ in traceback.walk_stack(frame)] if frame else []
    if not frames or not (_is_ours(frames[0]) or _is_of_library(frames[0])):
        return True
    outside = itertools.takewhile(lambda one: not _is_ours(one), frames)
    return any(map(_enters_or_leaves, outside)) or any(map(_swallows, frames))


@contextlib.contextmanager
def interrupting() -> Iterator[Interrupting]:
    """In the main thread, once a call, a moment after it began."""
    is_armed = False

    def strike(signum: int, frame: FrameType | None) -> None:
        nonlocal is_armed
        if not is_armed:
            return
        if _waits(frame):
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
            return
        is_armed = False
        raise KeyboardInterrupt

    def interrupts(call: Callable[[], Any], seconds: float) -> bool:
        nonlocal is_armed
        try:
            is_armed = True
            signal.setitimer(signal.ITIMER_REAL, seconds)
            call()
            is_armed = False
        except KeyboardInterrupt:
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
