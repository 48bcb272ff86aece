"""Timelines by suffix: what stands in them, not how it looks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.python.fake_log import MS, halves, pipeline_log, sync_log
from tests.python.trace_event_format import faults_of
from torch_offload.timeline import read_traces, text_of, write_timeline
from torch_offload.timeline.palette import look_key, look_of
from torch_offload.timeline.perfetto import trace_events
from torch_offload.timeline.picture import picture_of, picture_suffixes
from torch_offload.timeline.scale import duration, scale_of, ticks
from torch_offload.timeline.text import plain_text_of
from torch_offload.trace import BarKind, Trace, trace_of


@pytest.fixture
def traces() -> list[Trace]:
    return [
        trace_of(sync_log(), title="sync", units=halves(2)),
        trace_of(pipeline_log(), title="pipeline", units=halves(2)),
    ]


# ---- JSON --------------------------------------------------------------------------------------


def test_json_obeys_the_trace_event_format(traces: list[Trace]) -> None:
    document = json.loads(json.dumps(trace_events(traces)))
    assert faults_of(document) == []
    phases = [event["ph"] for event in document["traceEvents"]]
    assert phases.count("X") == sum(len(trace.bars) for trace in traces)
    assert phases.count("s") == phases.count("f") == sum(len(trace.arrows) for trace in traces) > 0


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("record_times", [True, False])
def test_json_of_other_logs_obeys_it_too(layers: int, record_times: bool) -> None:
    log = pipeline_log(layers, passes=3, record_times=record_times)
    whole = trace_of(log)
    assert faults_of(trace_events([whole, whole.between(5 * MS, 170 * MS)])) == []


def test_json_names_processes_and_threads_and_keeps_ops(traces: list[Trace]) -> None:
    events = trace_events(traces)["traceEvents"]
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert names[2, 1] == "weight_h2d"
    copies = [event for event in events if event.get("cat") == "copy" and event["pid"] == 2]
    assert [copy["args"]["op"] for copy in copies] == [bar.op for bar in traces[1].of_kind("copy")]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda events: events[-1].update(ts=-1.0), "runs back in time"),
        (lambda events: events.pop(), "phases are"),
        (lambda events: next(e for e in events if e["ph"] == "X").update(dur=-1.0), "negative"),
        (lambda events: next(e for e in events if e["ph"] == "X").update(tid="1"), "tid is"),
        (lambda events: next(e for e in events if e.get("cat") == "copy").update(dur=1e4), "cross"),
    ],
)
def test_checker_of_the_format_sees_faults(traces: list[Trace], change: Any, fault: str) -> None:
    document = json.loads(json.dumps(trace_events(traces)))
    change(document["traceEvents"])
    assert any(fault in found for found in faults_of(document)), faults_of(document)


def test_json_reads_back_as_what_was_written(traces: list[Trace], tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_timeline(traces, path)
    assert read_traces(path) == traces


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: "{}",
        lambda text: text.replace("timeline 1", "timeline 0"),
        lambda text: text.replace('"tid": 1', '"tid": 77'),
        lambda text: text.replace('"cat": "copy"', '"cat": "sing"'),
        lambda text: text.replace('"dur": ', '"dur": -'),
        lambda text: text.replace('"ts": 0.0', '"ts": Infinity'),
        lambda text: text.replace('"end_ns": ', '"end_ns": "soon", "x": '),
    ],
)
def test_file_that_is_no_timeline_fails(traces: list[Trace], tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "t.json"
    write_timeline(traces, path)
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ValueError, match=r"expected a timeline .*t\.json"):
        read_traces(path)


# ---- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 60, 80, 100, 200])
def test_text_fits_its_width(traces: list[Trace], width: int) -> None:
    text = plain_text_of(traces, width)
    assert max(map(len, text.splitlines())) <= width
    rows = [line for line in text.splitlines() if line.lstrip().startswith(("CPU", "wei", "call"))]
    assert len([row for row in rows if " waited " not in row]) >= 3


def test_text_shows_bars_in_proportion(traces: list[Trace]) -> None:
    pipeline = traces[1]
    lines = plain_text_of([pipeline], 111).splitlines()
    caller = next(line for line in lines if line.startswith("    caller "))
    strip = caller[len("weight_h2d ") :]
    attention = sum(strip.count(letter) for letter in "█MHA01 ")
    assert attention / len(strip) == pytest.approx(2 * 152.42 / 363.5, abs=0.03)
    assert " MHA 0 " in strip
    assert " MHA 1 " in strip


def test_text_names_the_longest_waits(traces: list[Trace]) -> None:
    text = plain_text_of(traces[1:], 100)
    assert "weight_h2d waited 138.9 ms from 20.28 ms on for the end of use of MHA 0" in text
    assert "for the copy of MHA 0" in text


def test_text_has_a_time_axis_with_its_unit(traces: list[Trace]) -> None:
    axis = [line for line in plain_text_of(traces, 90).splitlines() if line.startswith("    ")]
    assert axis[-1].split() == ["0", "100", "200", "300", "ms"]


def test_text_of_a_narrow_terminal_keeps_legend_entries_whole(traces: list[Trace]) -> None:
    console = Console(width=40, color_system=None)
    with console.capture() as capture:
        console.print(text_of(traces, 40))
    assert "▒ copy of FFN weights" in capture.get()


# ---- pictures ----------------------------------------------------------------------------------


def test_picture_has_a_panel_for_each_trace_on_one_axis(traces: list[Trace]) -> None:
    figure = picture_of(traces)
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim()
    assert first.get_title(loc="left") == "sync: 397.3 ms"
    assert second.get_title(loc="left").startswith("pipeline: 363")
    assert [label.get_text() for label in second.get_yticklabels()] == [
        "CPU",
        "weight_h2d",
        "caller",
    ]
    assert second.get_xlabel() == "time in ms"


def test_picture_holds_every_bar_and_arrow(traces: list[Trace]) -> None:
    pipeline = traces[1]
    (axes,) = picture_of([pipeline]).axes
    drawn = sorted(round(patch.get_x()) for patch in axes.patches if patch.get_zorder() >= 2)
    expected = [
        bar.begin_ns
        for bar in pipeline.bars
        if bar.duration_ns > 0 and not (bar.kind == "wait" and bar.duration_ns < MS)
    ]
    assert drawn == sorted(expected)
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == len(pipeline.arrows)


def test_picture_has_no_text_that_overlaps_another(traces: list[Trace]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    deep = trace_of(pipeline_log(layers=12), title="deep", units=halves(12))
    for shown in (traces, [deep]):
        figure = picture_of(shown)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)  # which places the labels of the axes
        boxes = [figure.legends[0].get_window_extent(renderer)]
        for axes in figure.axes:
            texts = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
            texts += [axes.xaxis.label, axes._left_title]
            boxes += [text.get_window_extent(renderer) for text in texts if text.get_text()]
        inside = figure.bbox
        for index, box in enumerate(boxes):
            assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, box
            assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, box
            assert not any(box.overlaps(other) for other in boxes[:index])


def test_every_bar_has_a_look_and_inks_can_be_read(traces: list[Trace]) -> None:
    from matplotlib.colors import to_rgb

    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for trace in traces:
        for bar in trace.bars:
            look = look_of(look_key(trace, bar))
            dark, light = sorted((luminance(look.face), luminance(look.ink)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, look  # WCAG AA


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_pictures_are_written_by_suffix(traces: list[Trace], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    write_timeline(traces, path)
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix.lower()]
    assert path.read_bytes().startswith(start)


def test_unknown_suffix_fails_and_lists_the_known(traces: list[Trace], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf, \.json or \.txt, got .*t\.doc"):
        write_timeline(traces, tmp_path / "t.doc")


def test_picture_without_matplotlib_says_how_to_get_it(
    traces: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert picture_suffixes() == set()
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        write_timeline(traces, tmp_path / "t.png")
    write_timeline(traces, tmp_path / "t.txt")


def test_a_picture_of_many_events_leaves_the_arrows_out() -> None:
    trace = trace_of(pipeline_log(layers=20), units=halves(20))
    (axes,) = picture_of([trace]).axes
    assert not [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]


# ---- times for people --------------------------------------------------------------------------


def test_times_are_told_in_the_unit_that_suits_them() -> None:
    assert [duration(ns) for ns in (64_000, 185_100_000, 14_808_000_000)] == [
        "64.00 us",
        "185.1 ms",
        "14.81 s",
    ]
    assert scale_of(0).text(0) == "0.000 us"


@pytest.mark.parametrize("span", [1, 7, 999, 64_000, 185 * MS, 14_808 * MS])
def test_ticks_are_round_few_and_within(span: int) -> None:
    found = ticks(span, 9)
    assert found[0] == 0
    assert found[-1] <= span
    assert 2 <= len(found) <= 9 or span < 2
    assert {int(str(tick)[0]) for tick in found[1:2]} <= {1, 2, 5}


def test_bars_without_known_kind_have_a_look_too(traces: list[Trace]) -> None:
    nameless = replace(traces[0], unit_kinds=())
    kinds: set[BarKind] = {bar.kind for bar in nameless.bars}
    assert {look_key(nameless, bar) for bar in nameless.bars} == set(kinds)
