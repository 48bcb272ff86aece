"""The op logs of one handle: when one is kept, and where the last one is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch_offload import _C
from torch_offload.user_warning import warn_user

#: What to write so that there is a log; part of every error that misses one.
HOW_TO_RECORD = "with handle.record(times=True) as log:"


class Recorder:
    """Attaches logs to an engine, one at a time, and keeps the last."""

    def __init__(self, engine: _C.Engine) -> None:
        self._engine = engine
        self._log: _C.OpLog | None = None
        self._kept: _C.OpLog | None = None
        self._units: Sequence[_C.Unit] = ()
        self._is_open = False

    def keep(self) -> None:
        """Keeps a log from here on, without times and without an end, for debugging.

        Raises:
            StateError: During a forward, or after `remove`.
        """
        self._kept = _C.OpLog()
        self._engine.attach_log(self._kept)
        if self._log is None:
            self._units = self._engine.plan.units

    @contextmanager
    def record(self, *, times: bool, warn_of_cut: bool = True) -> Iterator[_C.OpLog]:
        """Keeps a log while the block runs. Blocks at its end with `times`, until all is done.

        A log ends where the units are cut anew, since it could not tell them from the former ones.

        Raises:
            StateError: During a forward, after `remove`, or inside another block.
        """
        if self._is_open:
            raise _C.StateError(
                "expected one record() or profile() at a time, got one inside another; use the "
                "log of the outer one"
            )
        log = _C.OpLog()
        self._engine.attach_log(log, times)
        units = self._engine.plan.units
        self._is_open = True
        self._log, self._units = log, units
        try:
            yield log
        finally:
            self._is_open = False
            if not self._engine.is_closed:
                self._engine.attach_log(self._kept)
                if warn_of_cut and self.unit_names() != [unit.name for unit in units]:
                    warn_user(
                        "the log ends where the units were cut anew, as the first "
                        "forwards of granularity='module' do; record a later forward"
                    )

    def unit_names(self) -> list[str]:
        """Names of the units as they are cut now."""
        return [unit.name for unit in self._engine.plan.units]

    @property
    def units(self) -> Sequence[_C.Unit]:
        """The units of the last log, however they are cut now, and after `remove` too."""
        return self._units

    @property
    def has_log(self) -> bool:
        """Whether there is a finished log."""
        return self._log is not None and not self._is_open

    def last(self, what: str, *, times: bool) -> _C.OpLog:
        """Returns the last log, for something that reads it.

        Raises:
            StateError: If there is none, it is still being written, or it has no times and they
                are needed; shows the line to write.
        """
        asked = HOW_TO_RECORD if times else HOW_TO_RECORD.replace("times=True", "")
        log = self._kept if self._log is None else self._log
        if log is None or self._is_open:
            state = "one that is still being written" if self._is_open else "none"
            raise _C.StateError(
                f"expected a recorded run for {what}, got {state}; write `{asked}` around the "
                f"forwards, and call {what} after the block"
            )
        if times and not log.has_times:
            got = "one without times" if len(log) else "one without a forward"
            raise _C.StateError(
                f"expected a recorded run with times for {what}, got {got}; write `{asked}` "
                "around a forward"
            )
        return log
