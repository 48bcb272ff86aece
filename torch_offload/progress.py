"""A bar for what takes longer than people like to wait without one."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

_PATIENCE_SECONDS = 2.0


class Progress:
    """Shows on standard error how far bytes have come, once that has taken two seconds.

    Nothing is shown where standard error is no terminal. Does not block.
    """

    def __init__(self, what: str, total_bytes: int, console: Console | None = None) -> None:
        self._what = what
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._console = console or Console(stderr=True)
        self._began = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """So many bytes more are there."""
        self._done_bytes += num_bytes
        if self._bar is None:
            if time.monotonic() - self._began < _PATIENCE_SECONDS or not self._console.is_terminal:
                return
            self._bar = Bar(
                TextColumn("torch_offload: {task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(self._what, total=self._total_bytes)
        self._bar.update(self._bar.task_ids[0], completed=self._done_bytes)
