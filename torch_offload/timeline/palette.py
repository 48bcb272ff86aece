"""Colours and words of the bars, the same in every picture.

Okabe and Ito's palette, which people tell apart whatever their colour vision: copies are blue,
computing is orange, the host is green, and whatever waits is hatched or shaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_offload.trace import Bar, Trace


@dataclass(frozen=True)
class Look:
    """How one sort of bar looks.

    Attributes:
        word: For the legend.
        face: Colour of the bar.
        ink: Colour of the text on it.
        hatch: Matplotlib's hatch, or "".
        letter: The character that fills it in a terminal.
    """

    word: str
    face: str
    ink: str
    hatch: str
    letter: str


_LOOKS = {
    "copy mha": Look("copy of attention weights", "#0072B2", "white", "", "▓"),
    "copy ffn": Look("copy of FFN weights", "#56B4E9", "black", "", "▒"),
    "copy": Look("copy of weights", "#0072B2", "white", "", "▓"),
    "decode": Look("decoding of weights", "#CCBB44", "black", "", "▚"),
    "compute mha": Look("attention computes", "#D55E00", "black", "", "█"),
    "compute ffn": Look("FFN computes", "#E69F00", "black", "", "▆"),
    "compute": Look("unit computes", "#D55E00", "black", "", "█"),
    "fill": Look("poison", "#CC79A7", "black", "", "x"),
    "wait": Look("stream waits", "#F2F2F2", "#333333", "////", "·"),
    "blocked": Look("CPU blocked", "#BBBBBB", "#222222", "xxxx", "░"),
    "launch": Look("CPU launches kernels", "#009E73", "black", "", "▄"),
    "submit": Look("CPU calls", "#222222", "white", "", "|"),
}


def look_key(trace: Trace, bar: Bar) -> str:
    """Which look a bar has: copies and computes by the kind of their unit, where it is known."""
    is_of_a_kind = bar.unit is not None and bar.unit < len(trace.unit_kinds)
    if bar.kind in ("copy", "compute") and is_of_a_kind and bar.unit is not None:
        return f"{bar.kind} {trace.unit_kinds[bar.unit]}"
    return bar.kind


def look_of(key: str) -> Look:
    """The look of a key."""
    return _LOOKS[key]


def order_of(key: str) -> int:
    """Where a key stands in a legend."""
    return list(_LOOKS).index(key)
