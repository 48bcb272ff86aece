"""One thing that the doctor looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "off", "note", "not tried"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found.

    Attributes:
        what: The thing.
        status: ``"ok"``; ``"off"`` if it costs something; ``"note"`` if it only should be known;
            ``"not tried"`` if this machine does not let us see it.
        value: What was found.
        cost: What it costs, if it is off.
        mend: How to mend it.
    """

    what: str
    status: Status
    value: str
    cost: str = ""
    mend: str = ""
