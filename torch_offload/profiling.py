"""Profiling a handle: a block around some forwards, and the profile of it afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from torch_offload import _C
from torch_offload.choice import RAW, Packable
from torch_offload.memory import memory_of
from torch_offload.profile import Measured, Profile, profile_of
from torch_offload.recording import Recorder
from torch_offload.trace import Trace, trace_of

if TYPE_CHECKING:
    from torch_offload.config import Config


class Profiler:
    """Made by `Handle.profile`: records while its block runs; afterwards it is the report.

    Example:
        >>> with handle.profile() as p:  # doctest: +SKIP
        ...     model(**inputs)
        >>> print(p.sentence)  # doctest: +SKIP
    """

    def __init__(
        self,
        engine: _C.Engine,
        recorder: Recorder,
        config: Config,
        device: torch.device,
        outside_bytes: int,
        tell: Callable[[Profile], None] = lambda profile: None,
        packable: Packable = RAW,
    ) -> None:
        self._engine = engine
        self._recorder = recorder
        self._config = config
        self._device = device
        self._outside_bytes = outside_bytes
        self._tell = tell
        self._packable = packable
        self._block = ExitStack()
        self._profile: Profile | None = None
        self._trace: Trace | None = None

    def __enter__(self) -> Profiler:
        self._log = self._block.enter_context(self._recorder.record(times=True, warn_of_cut=False))
        self._names = self._recorder.unit_names()
        self._plan = self._engine.plan
        self._forwards = self._engine.stats.forwards
        self._cpu_seconds = self._engine.cpu_seconds
        self._begin_ns = time.monotonic_ns()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._engine.is_closed:
            self._block.close()
            return
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        end_ns = time.monotonic_ns()
        self._block.close()
        if kind is None and len(self._log):
            self._profile = self._made(end_ns)
            self._tell(self._profile)

    def _made(self, end_ns: int) -> Profile:
        plan = self._plan
        if self._recorder.unit_names() != self._names:
            raise _C.StateError(
                "expected the same units during the whole profile, got them cut anew: that is what "
                "the first forwards of granularity='module' do; profile a later one"
            )
        title = f"{self._config.mode}, {self._config.streams}"
        self._trace = trace_of(self._log, title=title, units=plan.units)
        measured = Measured(
            device=_name_of(self._device),
            mode=self._config.mode,
            streams=self._config.streams,
            forwards=self._engine.stats.forwards - self._forwards,
            begin_ns=self._begin_ns,
            end_ns=end_ns,
            cpu_ns=round((self._engine.cpu_seconds - self._cpu_seconds) * 1e9),
            depth_bytes=plan.depth_bytes,
            window_bytes=plan.window_bytes,
            resident_bytes=plan.resident_bytes,
            outside_bytes=max(0, self._outside_bytes - plan.resident_bytes),
            free_bytes=_free_bytes(self._device),
        )
        return profile_of(self._trace, plan, measured, self._packable)

    @property
    def result(self) -> Profile:
        """The profile.

        Raises:
            StateError: Inside the block, or if no forward ran in it.
        """
        if self._profile is None:
            raise _C.StateError(
                "expected a finished profile of at least one forward, got none; write `with "
                "handle.profile() as p:` around forwards, and read p after the block"
            )
        return self._profile

    @property
    def sentence(self) -> str:
        """What bounds the run, and what would help most. Raises StateError as `result`."""
        return self.result.sentence

    @property
    def trace(self) -> Trace:
        """The timeline of the block. Raises StateError as `result`."""
        _ = self.result
        assert self._trace is not None
        return self._trace

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON. Raises StateError as `result`, OSError."""
        self.result.save(path)

    def report(self) -> None:
        """Prints the profile. Raises StateError as `result`."""
        from rich.console import Console

        Console().print(self.result)

    def __rich__(self) -> Any:
        """For a terminal."""
        return self.result


def _free_bytes(device: torch.device) -> int:
    if (memory := memory_of(device)) is not None:
        return memory.available_bytes()
    return _C.host_limits().available_bytes or 0


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return "the host device"
