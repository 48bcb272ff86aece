"""What a process and a device hold, counted by the system and by our own counters."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch_offload import _C


@dataclass(frozen=True)
class Process:
    """Threads and open files of this process, as the system counts them."""

    threads: int
    files: int

    @staticmethod
    def now() -> Process:
        """Counts."""
        own = Path("/proc/self")
        return Process(len(list((own / "task").iterdir())), len(list((own / "fd").iterdir())))

    def gained(self, seconds: float = 5.0) -> str:
        """Returns what has come since and does not go, or nothing.

        A joined thread leaves the system's list a moment later than it is joined.
        """
        now = Process.now()
        if now != self:
            gc.collect()
        deadline = time.monotonic() + seconds
        while now != self and time.monotonic() < deadline:
            time.sleep(0.001)
            now = Process.now()
        return "" if now == self else f"{now}, was {self}"


@dataclass(frozen=True)
class Held:
    """What of a device is held."""

    allocated_bytes: int
    registrations: int
    registered_bytes: int
    streams: int
    events: int

    @staticmethod
    def of(device: _C.Device) -> Held:
        """Asks its counters."""
        counters = device.counters
        return Held(
            counters.allocated_bytes,
            counters.registrations,
            counters.registered_bytes,
            counters.streams,
            counters.events,
        )

    @property
    def memory(self) -> tuple[int, int, int]:
        """What must be nothing in the end; streams and events live as long as the device."""
        return self.allocated_bytes, self.registrations, self.registered_bytes


class Devices:
    """Makes devices for `devices_made_by`, and keeps the last one to be asked."""

    def __init__(self, make: Callable[[object], _C.Device] = _C.Device) -> None:
        self._make = make
        self.last: _C.Device | None = None

    def __call__(self, device: object) -> _C.Device:
        """Makes one."""
        self.last = self._make(device)
        return self.last

    def held(self) -> Held:
        """What the last one holds."""
        assert self.last is not None, "no device was made"
        return Held.of(self.last)
