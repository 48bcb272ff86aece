"""Timelines: traces as a picture, as JSON for Perfetto, or as text, by the suffix of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch_offload.timeline.perfetto import read_traces, write_trace_events
from torch_offload.timeline.picture import picture_suffixes, write_picture
from torch_offload.timeline.text import plain_text_of, text_of
from torch_offload.trace import Trace

# Columns of a text file, which has no terminal to fit.
TEXT_WIDTH = 100


def write_timeline(traces: Sequence[Trace], path: str | Path) -> None:
    """Draws traces above each other on one time axis, into a file.

    Args:
        traces: At least one.
        path: ``.json`` is a trace that Perfetto opens, ``.txt`` is text; ``.png``, ``.svg``,
            ``.pdf`` and what else matplotlib writes are pictures.

    Raises:
        ValueError: For another suffix.
        ModuleNotFoundError: If a picture is asked for and matplotlib is missing.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check_suffix(path)
    if suffix == ".json":
        write_trace_events(traces, path)
    elif suffix == ".txt":
        path.write_text(plain_text_of(traces, TEXT_WIDTH))
    else:
        write_picture(traces, path)


def check_suffix(path: str | Path) -> None:
    """Makes sure that a file of this name can be written, before anything is run for it.

    Raises:
        ValueError: If its suffix names no format that we know.
    """
    suffix = Path(path).suffix.lower()
    pictures = picture_suffixes() or {".png"}  # without matplotlib, writing says what is missing
    if suffix not in {".json", ".txt"} | pictures:
        raise ValueError(
            f"expected a file name that ends in .png, .svg, .pdf, .json or .txt, got {str(path)!r}"
        )


__all__ = ["TEXT_WIDTH", "check_suffix", "read_traces", "text_of", "write_timeline"]
