"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
# More than any machine has, and what fits the core's numbers.
_MOST = 2**62
_MOST_DIGITS = 40
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(value: int | str, what: str) -> int:
    """Returns a size in bytes from a number of bytes or a string such as ``"2GiB"``.

    Args:
        value: Bytes, or a number with one of B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB,
            TiB (powers of 1024) behind it.
        what: Name of the argument, for the error.

    Raises:
        ValueError: If the value is negative, not a whole number of bytes, or not understood.
        TypeError: If it is neither an int nor a str.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(
            f"expected {what} as a number of bytes or a string such as '2GiB', "
            f"got {type(value).__name__}"
        )
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"expected {what} >= 0 bytes, got {value}")
        return _at_most(value, what)
    match = _PATTERN.fullmatch(value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(
            f"expected {what} as a number of bytes or a string such as '2GiB' or '500MB', "
            f"got {value!r}"
        )
    if len(match[1]) > _MOST_DIGITS:
        raise ValueError(
            f"expected {what} of at most {_MOST_DIGITS} digits, got {len(match[1])}: write it in "
            "GiB or TiB"
        )
    return _at_most(int(Fraction(match[1]) * _UNITS[match[2].lower()]), what)


def _at_most(size_bytes: int, what: str) -> int:
    if size_bytes > _MOST:
        raise ValueError(
            f"expected {what} of at most {_MOST} bytes, got more: no machine has so much memory"
        )
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Returns a size for people: ``"1.50 GiB"``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{size:.2f} {unit}"
