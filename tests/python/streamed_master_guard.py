"""Fails when an operator reads a streamed master or a released place in a forward, on the host.

There a unit that was never acquired computes right from its master, which is a valid CPU tensor,
and from its place after the release, until another unit's bytes come: equal outputs prove nothing.
Every Python test runs under this mode, see ``conftest.py``.
"""

from __future__ import annotations

import bisect
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_iter

from torch_offload import _C
from torch_offload.handle import Handle
from torch_offload.packed_parameter import PackedParameter
from torch_offload.reads import COMPARES_KINDS
from torch_offload.selfcheck.lane import Lane, Tally

# The engine itself reads and writes masters, to adopt what a user has replaced; its operators are
# called from C++, so that the wrapper is the innermost Python frame.
# A table that stays on the host is read there on purpose.
_OWN_FRAMES = ("torch_offload/calls.py", "torch_offload/gathering.py")
# Between the caller of an operator and us: this file, the product's own mode that watches the reads
# of a pass, and what keeps dynamo out of either.
_MODE_FRAMES = (
    __file__,
    "torch_offload/reads.py",
    "torch/_ops.py",
    "torch/_dynamo/eval_frame.py",
    "torch/_compile.py",
)


class StreamedMasterReadError(AssertionError):
    """A forward has read a weight at rest, or what was a weight until its unit was released."""


class _Masters:
    """Where the masters of one live handle lie.

    They move: another plan, units cut anew and replaced weights each bring other addresses. So
    `learn` asks anew at the beginning of every pass, when all parameters are at rest.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = weakref.ref(handle)
        self.engine = weakref.ref(handle._engine)
        model = handle.model
        assert model is not None
        # By the names that the engine knows, whatever an adapter makes of them later.
        self._slots = {
            f"{path}.{key}" if path else key: (weakref.ref(module), key)
            for path, module in model.named_modules(remove_duplicate=False)
            for key in module._parameters
        }
        self.spans: list[tuple[int, int, str]] = []
        self._moved: set[str] = set()
        self.learn()
        self._moved.clear()

    def learn(self) -> None:
        """Notes where the masters lie now."""
        before = {name: begin for begin, _, name in self.spans}
        # They have no memory: known as objects.
        self.packed: dict[int, str] = {}
        self.spans = []
        self.window = (0, 0)
        self.places: list[tuple[int, int, list[str]]] = []  # begin, end, names of its weights
        engine = self.engine()
        if engine is None or engine.is_closed:
            return
        self.window = window_begin, window_end = engine.window
        for index, place in enumerate(engine.plan.places):
            if place:
                names = engine.parameter_names(index)
                self.places.append((window_begin + place[0], window_begin + place[1], names))
            for name in engine.parameter_names(index) if place else ():
                parameter = self._parameter(name)
                if isinstance(parameter, PackedParameter):
                    self.packed[id(parameter)] = name
                elif parameter is not None and not parameter.is_meta:
                    try:
                        begin = parameter.data_ptr()
                    except RuntimeError:
                        continue  # a transform's wrapper, or a view of a place: no master
                    # Another thread's pass may have begun just now: a place is no master.
                    if not window_begin <= begin < window_end:
                        self.spans.append((begin, begin + parameter.nbytes, name))
        self.spans.sort()
        # What a user has put there lies elsewhere once it is adopted, and its memory is free again:
        # of these weights only the parameter itself tells whether it is still there.
        self._moved |= {name for begin, _, name in self.spans if before.get(name) != begin}

    def _parameter(self, name: str) -> torch.Tensor | None:
        module, key = self._slots[name][0](), self._slots[name][1]
        return None if module is None else module._parameters.get(key)

    def in_pass(self) -> bool:
        engine = self.engine()
        return engine is not None and not engine.is_closed and engine.in_pass

    def name_at(self, address: int) -> str | None:
        position = bisect.bisect_right(self.spans, (address, sys.maxsize, "")) - 1
        if position < 0:
            return None
        begin, end, name = self.spans[position]
        if not begin <= address < end:
            return None
        if name in self._moved:
            parameter = self._parameter(name)
            return name if parameter is not None and parameter.data_ptr() == begin else None
        return name

    def released_at(self, storage: torch.UntypedStorage) -> str | None:
        """Whose place a storage in the window was; None while a unit shows just this storage."""
        address = storage.data_ptr()
        names = [name for begin, end, of in self.places if begin <= address < end for name in of]
        for name in names:
            parameter = self._parameter(name)
            if parameter is None or isinstance(parameter, PackedParameter) or parameter.is_meta:
                continue
            if parameter.untyped_storage()._cdata == storage._cdata:
                return None
        return f"place of {' or '.join(names)}"


class LiveMasters:
    """The masters of all live handles on the host device. `watch` learns them, once a session.

    A dispatch mode belongs to one thread: `watch` also lets threads run under the guard of the
    test that is running, which is the last one that was entered.
    """

    def __init__(self) -> None:
        self._of_handles: list[_Masters] = []
        self.guard: StreamedMasterGuard | None = None

    @contextmanager
    def watch(self) -> Iterator[LiveMasters]:
        """Learns of every handle that is made meanwhile, and of every pass that begins."""
        plain_init = Handle.__init__

        def learning_init(handle: Handle, *args: Any, **kwargs: Any) -> None:
            plain_init(handle, *args, **kwargs)
            self._learn_of(handle)

        def learning_call(plain_call: Any) -> Any:
            def call(engine: _C.Engine, *args: Any) -> Any:
                if not engine.in_pass:
                    self._learn_anew(engine)
                return plain_call(engine, *args)

            return call

        plain_run = threading.Thread.run

        def guarded_run(thread: threading.Thread) -> None:
            with nullcontext() if self.guard is None else self.guard.in_this_thread():
                plain_run(thread)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Handle, "__init__", learning_init)
            for call in ("call_unit", "call_ancestor"):
                patch.setattr(_C.Engine, call, learning_call(getattr(_C.Engine, call)))
            patch.setattr(threading.Thread, "run", guarded_run)
            yield self

    def _learn_of(self, handle: Handle) -> None:
        self._of_handles = [masters for masters in self._of_handles if masters.handle()]
        if handle.device.type == "cpu":
            self._of_handles.append(_Masters(handle))

    def _learn_anew(self, engine: _C.Engine) -> None:
        for masters in self._of_handles:
            if masters.engine() is engine:
                masters.learn()

    def in_pass(self) -> list[_Masters]:
        """The masters that nobody may read now."""
        return [masters for masters in self._of_handles if masters.in_pass()]


class StreamedMasterGuard(TorchDispatchMode):
    """Raises `StreamedMasterReadError` at an operator that reads what no unit shows in a forward.

    That is a master, or a place after its release.

    Attributes:
        reads: Names of the weights that were read so, in order; must be empty when a test ends.
    """

    def __init__(self, live: LiveMasters) -> None:
        super().__init__()
        self._live = live
        self.reads: list[str] = []

    def __enter__(self) -> StreamedMasterGuard:
        super().__enter__()
        self._live.guard = self
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.guard = None
        super().__exit__(*error)

    @contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Guards another thread as well, for as long as it runs: perhaps beyond the test."""
        # Unlike `with self`, this touches no flag that is common to all threads.
        _push_mode(self)
        try:
            yield
        finally:
            _pop_mode()

    @contextmanager
    def expect_reads(self) -> Iterator[list[str]]:
        """For a test that plants the fault: what is read inside is yielded, and forgiven."""
        before, self.reads = self.reads, []
        try:
            yield self.reads
        finally:
            self.reads = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        in_pass = self._live.in_pass()
        if in_pass and not func.is_view and func is not COMPARES_KINDS and not _is_own_call():
            written = args[0] if _only_writes_first(func) and args else None
            for leaf in tree_iter((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and leaf is not written:
                    self._check(leaf, in_pass, func)
        return func(*args, **kwargs)

    def _check(self, tensor: torch.Tensor, in_pass: list[_Masters], func: Any) -> None:
        is_packed = isinstance(tensor, PackedParameter)
        try:
            storage = None if is_packed else tensor.untyped_storage()
            address = 0 if storage is None else storage.data_ptr()
        except (RuntimeError, NotImplementedError):
            return  # a tensor without memory of its own: fake, or a wrapper
        for masters in in_pass:
            if storage is not None and masters.window[0] <= address < masters.window[1]:
                place = masters.released_at(storage)
                if place is not None:
                    self.reads.append(place)
                    raise StreamedMasterReadError(f"{func} reads the {place} after its release")
                continue
            name = masters.packed.get(id(tensor)) if is_packed else masters.name_at(address)
            if name is not None:
                self.reads.append(name)
                raise StreamedMasterReadError(
                    f"{func} reads the master of '{name}' during a forward, outside its unit's call"
                )


@contextmanager
def unguarded_control(lane: Lane) -> Iterator[None]:
    """Lets a lane of the self-check run its control, which the guard would see before the lane."""
    control = lane.control

    def unguarded() -> Tally:
        with _disable_current_modes():
            return control()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane, "control", unguarded)
        yield


def _is_own_call() -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(_MODE_FRAMES):
        frame = frame.f_back
    return frame.f_code.co_filename.endswith(_OWN_FRAMES)


@lru_cache(maxsize=4096)
def _only_writes_first(func: Any) -> bool:
    return func is torch.ops.aten.copy_.default
