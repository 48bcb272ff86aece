"""What the lanes of bad input share: input that is almost right, and the judge of what it does.

Each must be taken, or refused by an error of the right type that says something, in time.
"""

from __future__ import annotations

import copy
import hashlib
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch_offload
from torch_offload.selfcheck.lane import Tally

#: What may be raised, besides being taken.
REFUSALS = (
    ValueError,
    TypeError,
    IndexError,
    OSError,
    MemoryError,
    NotImplementedError,
    torch_offload.StateError,
)
_SECONDS = 20.0
_PACKAGE = Path(torch_offload.__file__).parent
# Of what is wanted: inputs that are drawn twice are not tried again.
_MOST_DRAWS = 20

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    -0.0,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e308,
    5e-324,
    2**31,
    2**62,
    2**63,
    2**64,
    -(2**63),
    10**400,
    "",
    " ",
    "0",
    "-1",
    "1e9",
    "nan",
    "inf",
    "2GiB",
    "9" * 400,
    "9" * 400 + "GiB",
    "1.5.5GiB",
    "auto",
    "pipeline",
    "sync",
    "split",
    "shared",
    "module",
    "*",
    "blocks.*",
    "[",
    "\x00",
    "\udc80",
    "é\u202e",
    "%s{0}",
    "[bold]",
    "x" * 5000,
    b"bytes",
    [],
    [None],
    [[]],
    ["blocks.0"],
    ["*"],
    {},
    {"a": 1},
    (),
    object,
)
PLAIN = tuple(v for v in ODD if v is None or isinstance(v, bool | int | float | str | list | dict))


class _Hang(BaseException):
    """Something has taken too long."""


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    def strike(signum: int, frame: FrameType | None) -> None:
        raise _Hang

    former = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def short(what: object) -> str:
    text = ascii(what)
    return text if len(text) < 200 else text[:200] + "..."


def what_is_unclear(error: BaseException) -> str:
    """Why a refusal is none: it says nothing, or something that came up by accident. Else nothing.

    Ours says what was expected, or is raised by a line of ours.
    """
    text = str(error).strip()
    if not text:
        return f"a silent {type(error).__name__}"
    if text.startswith("expected"):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    innermost = frames[-1]
    is_ours = Path(innermost.filename).is_relative_to(_PACKAGE)
    if is_ours and (innermost.line or "").startswith("raise "):
        return ""
    where = f"{innermost.filename}:{innermost.lineno}"
    return f"an accident, no refusal, at {where}: {type(error).__name__}: {short(text)}"


def mutated_document(choice: random.Random, document: Any) -> Any:
    """Plain data with a few places changed, dropped, doubled or exchanged."""
    document = copy.deepcopy(document)
    for _ in range(choice.randint(1, 3)):
        node, keys = document, []
        while isinstance(node, dict | list) and node:
            key = choice.choice(list(node) if isinstance(node, dict) else range(len(node)))
            keys.append((node, key))
            node = node[key]
            if choice.random() < 0.2:
                break
        if not keys:
            return choice.choice(PLAIN)
        holder, key = keys[-1]
        action = choice.randrange(6)
        is_number = isinstance(holder[key], int | float) and abs(holder[key]) < 2**64
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == 2 and is_number:
            holder[key] = holder[key] * choice.choice([-1, 0, 2, 1e9, 1e300])
        elif action == 3 and is_number:  # which may well be taken
            holder[key] = type(holder[key])(holder[key] * choice.uniform(0.5, 1.5) + 0.5)
        else:
            holder[key] = copy.deepcopy(choice.choice(PLAIN))
    return document


def mutated_bytes(choice: random.Random, text: bytes) -> bytes:
    """A file with a few bytes changed, cut off, or repeated."""
    data = bytearray(text)
    for _ in range(choice.randint(1, 4)):
        if not data:
            break
        at = choice.randrange(len(data))
        action = choice.randrange(5)
        if action == 0:
            data[at] = choice.randrange(256)
        elif action == 1:
            del data[at:]
        elif action == 2:
            data[at:at] = data[at : at + choice.randint(1, 20)]
        elif action == 3:
            del data[at : at + choice.randint(1, 20)]
        else:
            data[at:at] = choice.choice([b"[" * 3000, b"{", b'"', b"\x00", b"\xff", b"9" * 500])
    return bytes(data)


class Fuzz:
    """One kind of input: draws, tries, and tells of what should not be."""

    def __init__(self, tally: Tally, seed: int, seconds: float = _SECONDS) -> None:
        self.tally = tally
        self.choice = random.Random(seed)
        self._seconds = seconds
        self._seen: set[bytes] = set()

    def draws(self, count: int) -> Iterator[int]:
        """Numbers the inputs to draw, until so many different ones were tried or none are left."""
        for number in range(_MOST_DRAWS * count):
            if len(self._seen) >= count:
                return
            yield number

    def is_new(self, what: str, given: object) -> bool:
        """Whether this input was not tried before; counts it."""
        data = given if isinstance(given, bytes) else ascii(given).encode()
        key = hashlib.blake2b(what.encode() + b"\0" + data, digest_size=12).digest()
        if key in self._seen:
            return False
        self._seen.add(key)
        self.tally.count += 1
        return True

    def attempt(self, what: str, given: object, call: Callable[[], object]) -> None:
        """Calls, unless the same was given before.

        Args:
            what: The kind of input.
            given: The input itself: bytes, or what `ascii` tells apart.
            call: Tries it.
        """
        if not self.is_new(what, given):
            return
        try:
            with _in_time(self._seconds):
                call()
        except REFUSALS as error:
            self._note("refused", what)
            fault = what_is_unclear(error)
        except _Hang:
            fault = f"hangs for {self._seconds:g} s"
        except Exception as error:
            fault = f"{type(error).__name__}: {short(str(error))}"
        else:
            self._note("taken", what)
            return
        if fault:
            self.tally.add_fault(f"{what} of {short(given)}: {fault}")

    def _note(self, figure: str, what: str) -> None:
        figures = self.tally.figures.setdefault(figure, {})
        figures[what] = figures.get(what, 0) + 1
