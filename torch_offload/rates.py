"""Rates as people write them: bytes per second, and floating-point operations per second."""

from __future__ import annotations

import re

from torch_offload.sizes import parse_size

_FLOPS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([MGTP])FLOP(?:/s|s|S)?\s*", re.IGNORECASE)
_POWERS = {"m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


def parse_byte_rate(value: str, what: str) -> float:
    """Returns bytes per second of ``"55GB/s"``.

    Raises:
        ValueError: If it is not understood, or zero.
    """
    text = value.strip()
    if text.lower().endswith("/s"):
        try:
            rate = parse_size(text[:-2], what)
        except ValueError:
            rate = 0
        if rate > 0:
            return float(rate)
    raise ValueError(f"expected {what} as a rate such as '55GB/s' or '50GiB/s', got {value!r}")


def parse_flop_rate(value: str, what: str) -> float:
    """Returns floating-point operations per second of ``"989TFLOP/s"``.

    Raises:
        ValueError: If it is not understood, or zero.
    """
    match = _FLOPS.fullmatch(value)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"expected {what} as a rate such as '989TFLOP/s', got {value!r}")
    return float(match[1]) * _POWERS[match[2].lower()]


def format_byte_rate(bytes_per_second: float) -> str:
    """Returns a rate for people: ``"55.2 GB/s"``."""
    return f"{bytes_per_second / 1e9:.1f} GB/s"
