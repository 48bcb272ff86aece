"""A bar appears for what takes longer than two seconds, on terminals only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import torch_offload
from tests.python.dropin import tiny_llama
from torch_offload import installation, progress
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


@pytest.mark.parametrize("share", [None, 0.5, 2.0])
@pytest.mark.parametrize("from_files", [False, True], ids=["memory", "files"])
def test_bar_counts_every_byte_that_is_moved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, from_files: bool, share: float | None
) -> None:
    bars: list[Any] = []

    class Counted(Progress):
        def __init__(self, what: str, total_bytes: int) -> None:
            super().__init__(what, total_bytes)
            bars.append(self)

    monkeypatch.setattr(installation, "Progress", Counted)
    model = tiny_llama()
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    budget = None if share is None else int(share * whole)
    if from_files:
        model.save_pretrained(tmp_path)
        torch_offload.offload_from_checkpoint(model, tmp_path, "cpu", gpu_budget=budget)
    else:
        torch_offload.offload(model, torch.device("cpu"), gpu_budget=budget)
    (bar,) = bars
    assert bar._done_bytes == bar._total_bytes == whole
