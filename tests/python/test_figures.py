"""The pictures of README and docs: drawn by one script, linked where they are."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.python.fake_log import halves, pipeline_log, sync_log
from torch_offload.timeline import write_timeline
from torch_offload.trace import trace_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("figures_tool", ROOT / "tools/figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "figures_tool", module)
    monkeypatch.syspath_prepend(str(ROOT))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FIGURES", tmp_path)
    return module


def test_every_linked_picture_is_there_and_every_picture_is_linked() -> None:
    linked = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name} links {target}"
            linked.add((page.parent / target).name)
    assert {path.name for path in (ROOT / "docs/figures").iterdir()} == linked


def test_script_draws_every_picture_that_needs_no_gpu(
    figures: types.ModuleType, tmp_path: Path
) -> None:
    figures.reference_figures()
    drawn = {path.name for path in tmp_path.iterdir()}
    kept = {path.name for path in (ROOT / "docs/figures").glob("*.png")}
    assert drawn == kept - {"gpu-sync-pipeline.png", "packed-timeline.png"}


def test_packed_units_are_drawn_from_the_host_device_and_from_what_was_recorded(
    figures: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_HOST_RUNS", 1)
    traces = figures.host_traces()
    names = [{row.name for row in trace.rows if row.kind == "decode"} for trace in traces]
    assert names == [{"weight_decode"}, {"weight_decode_resident"}]
    assert [bool(trace.of_kind("copy")) for trace in traces] == [True, False]
    write_timeline(traces, tmp_path / figures.PACKED)
    figures.packed_figure(figures.read_traces(tmp_path / figures.PACKED))
    assert (tmp_path / "packed-timeline.png").is_file()


def test_recorded_run_becomes_a_picture_and_a_missing_one_changes_nothing(
    figures: types.ModuleType, tmp_path: Path
) -> None:
    assert figures.recorded_figures(tmp_path) is False
    assert list(tmp_path.iterdir()) == []
    traces = [
        trace_of(log, title=title, units=halves(6))
        for title, log in (("sync", sync_log(6)), ("pipeline", pipeline_log(6, passes=2)))
    ]
    write_timeline(traces, tmp_path / figures.RECORDED)
    assert figures.recorded_figures(tmp_path) is True
    assert (tmp_path / "gpu-sync-pipeline.png").is_file()


def test_part_in_the_middle_holds_whole_layers(figures: types.ModuleType) -> None:
    trace = trace_of(pipeline_log(6, passes=2), units=halves(6))
    part = figures._steady(trace, 2)
    assert [bar.label for bar in part.of_kind("compute")] == ["MHA 2", "FFN 2", "MHA 3", "FFN 3"]
    assert part.end_ns == pytest.approx(2 * 178.36e6, rel=1e-3)


def test_every_benchmark_can_be_collected() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:]
    for bench in (ROOT / "benchmarks").glob("bench_*.py"):
        assert bench.name in result.stdout
