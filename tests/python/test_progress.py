"""A bar appears for what takes longer than two seconds, on terminals only."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from torch_offload import progress
from torch_offload.progress import Progress


def _shown(monkeypatch: pytest.MonkeyPatch, *, seconds: float, is_terminal: bool) -> str:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=100, color_system=None)
    with Progress("moving weights", 2**30, console) as bar:
        bar.advance(2**29)
        now[0] += seconds
        bar.advance(2**28)
        bar.advance(2**28)
    return out.getvalue()


def test_long_work_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _shown(monkeypatch, seconds=2.5, is_terminal=True)
    assert "torch_offload: moving weights" in shown
    assert "1.0/1.0 GiB" in shown


@pytest.mark.parametrize(("seconds", "is_terminal"), [(1.5, True), (9, False)])
def test_short_work_and_files_show_nothing(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_terminal: bool
) -> None:
    assert not _shown(monkeypatch, seconds=seconds, is_terminal=is_terminal)
