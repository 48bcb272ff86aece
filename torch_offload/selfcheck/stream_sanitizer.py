"""The checker beside PyTorch's own stream sanitizer, which is fed with the same logs."""

from __future__ import annotations

import importlib
import unittest.mock
from collections import Counter, defaultdict
from types import ModuleType
from typing import Any

import torch

from torch_offload import _C
from torch_offload.selfcheck.lane import Effort, Lane, Tally

_MODULE = "torch.cuda._sanitizer"
# What the sanitizer's model covers: two kernels of different streams on the same memory.
_COVERED = frozenset({"unordered", "recorded too early"})
_HANDLERS = (
    "_handle_kernel_launch",
    "_handle_event_record",
    "_handle_event_wait",
    "_handle_event_synchronization",
    "_handle_stream_synchronization",
    "_handle_memory_allocation",
    "_handle_memory_deallocation",
)
_DEVICE_ACCESSES = frozenset({"copy", "decode", "fill", "read", "read_end", "allocate", "free"})


def load_sanitizer() -> ModuleType:
    """Imports the sanitizer without what it does on import: it would watch the whole process.

    Raises:
        ImportError: If this torch has none that can be driven from outside.
    """
    activate = "_activate_gpu_trace"
    if not hasattr(torch._C, activate):
        raise ImportError("this torch has no trace of GPU calls")
    with unittest.mock.patch.object(torch._C, activate):
        sanitizer = importlib.import_module(_MODULE)
    handler = getattr(sanitizer, "EventHandler", None)
    missing = [name for name in _HANDLERS if not hasattr(handler, name)]
    if missing:
        raise ImportError(f"its handler of events has no {', '.join(missing)}")
    return sanitizer


def first_race_seen(sanitizer: ModuleType, ops: list[_C.Op], *, deaf: bool = False) -> int | None:
    """Feeds a log to the sanitizer's event handler.

    The sanitizer knows memory by address alone, so ranges are cut where any of them begins or
    ends. What runs on no stream (masters, which are host memory; the caller's hand-overs) is not
    in its model.

    Args:
        sanitizer: The module.
        ops: Of the log.
        deaf: Keeps waits from it: a planted control.

    Returns:
        The index of the first op that it takes for a race, if any.
    """
    handler = sanitizer.EventHandler()
    pieces = _Pieces(ops)
    aliases: defaultdict[int, list[str]] = defaultdict(list)
    recorded: set[int | None] = set()
    for index, op in enumerate(ops):
        kind = op.kind
        if kind in ("copy", "decode", "fill", "read", "read_end"):
            memory = pieces.of(op.memory)
            is_read = kind in ("read", "read_end")
            read = memory if is_read else pieces.of(op.source) if kind == "decode" else set()
            written = set() if is_read else memory
            errors = handler._handle_kernel_launch(op.stream, read, written, set(), kind, aliases)
            if errors:
                return index
        elif kind == "record":
            recorded.add(op.event)
            handler._handle_event_record(op.event, op.stream)
        elif kind == "wait" and not deaf:
            handler._handle_event_wait(op.event, op.stream)
        elif kind == "query" and op.is_done and op.event in recorded:
            handler._handle_event_synchronization(op.event)
        elif kind == "synchronize" and not deaf:
            handler._handle_stream_synchronization(op.stream)
        elif kind in ("allocate", "free"):
            tell = handler._handle_memory_allocation
            if kind == "free":
                tell = handler._handle_memory_deallocation
            for piece in pieces.of(op.memory):
                tell(piece)
    return None


class _Pieces:
    """Cuts the memory of a log into pieces that every op touches whole or not at all."""

    def __init__(self, ops: list[_C.Op]) -> None:
        ranges = {op.memory for op in ops if op.kind in _DEVICE_ACCESSES}
        ranges |= {op.source for op in ops if op.kind == "decode"}
        self._bounds = sorted({bound for memory in ranges for bound in memory})
        self._known: dict[tuple[int, int], set[int]] = {}

    def of(self, memory: tuple[int, int]) -> set[int]:
        """The pieces of a range, each by its first address."""
        if memory not in self._known:
            begin, end = memory
            self._known[memory] = {bound for bound in self._bounds if begin <= bound < end}
        return self._known[memory]


class StreamSanitizer(Lane):
    """Two programs that share no line must find the same first race, or none, in each log."""

    name = "stream sanitizer"
    tried = "PyTorch's own sanitizer, fed with our logs, whole and with waits left out"
    counts = "logs compared"

    _CHUNK = 50
    _QUICK, _FULL = 750, 6000  # schedules, each compared twice

    def why_not(self) -> str | None:
        """Not every torch has one."""
        try:
            load_sanitizer()
        except ImportError as error:
            return f"{_MODULE} cannot be used: {error}"
        return None

    def control(self) -> Tally:
        """The sanitizer hears of no wait: it must disagree."""
        tally = Tally()
        self._compare(tally, Counter(), range(50), deaf=True)
        return tally

    def run(self, effort: Effort) -> Tally:
        """Each random schedule twice: as it is, and with its waits left out from one of them on."""
        tally = Tally()
        seen: Counter[str] = Counter()
        first = 0
        for chunk in effort.chunks(effort.pick(self._QUICK, self._FULL), self._CHUNK):
            self._compare(tally, seen, range(first, first + chunk))
            first += chunk
        tally.figures = dict(seen)
        tally.note = (
            f"the same verdict each time: {seen['clean']:,} clean, {seen['race']:,} with the same "
            f"first race; in {seen['more']:,} the checker finds what the sanitizer does not model"
        )
        return tally

    @staticmethod
    def _compare(tally: Tally, seen: Counter[str], seeds: range, *, deaf: bool = False) -> None:
        sanitizer = load_sanitizer()
        for seed in seeds:
            for leaves_out_waits in (False, True):
                log = _C.random_schedule(seed, leaves_out_waits=leaves_out_waits)
                findings = _C.check(log, 10_000)
                races = [found.second for found in findings if found.kind in _COVERED]
                ours = min(races, default=None)
                theirs = first_race_seen(sanitizer, log.ops, deaf=deaf)
                seen["clean" if ours is None else "race"] += 1
                more = {found.kind for found in findings} - _COVERED
                seen["more"] += bool(more)
                seen.update(f"only by the checker: {kind}" for kind in more)
                tally.must(
                    ours == theirs,
                    f"seed {seed}{', waits left out' if leaves_out_waits else ''}: first race at "
                    f"op {_or_none(ours)} by the checker, {_or_none(theirs)} by the sanitizer",
                )


def _or_none(index: int | None) -> Any:
    return "none" if index is None else index
