"""Traces: every bar and arrow has its op, and the times add up."""

from __future__ import annotations

import pytest

from tests.python.fake_log import COMPUTE, COPY, MS, FakeLog, halves, pipeline_log, sync_log
from torch_offload.attribution import attribute
from torch_offload.intervals import intersect, most_at_once, subtract, total, union
from torch_offload.names import short_names
from torch_offload.trace import trace_of


def test_trace_has_the_cpu_first_and_copies_before_computes() -> None:
    trace = trace_of(pipeline_log())
    assert [row.name for row in trace.rows] == ["CPU", "weight_h2d", "caller"]
    assert [row.kind for row in trace.rows] == ["cpu", "copy", "compute"]


def test_trace_of_one_stream_has_one_mixed_row() -> None:
    trace = trace_of(sync_log())
    assert [(row.name, row.kind) for row in trace.rows] == [("CPU", "cpu"), ("caller", "mixed")]


def test_every_bar_and_arrow_has_its_op() -> None:
    log = pipeline_log(layers=3, passes=2)
    trace = trace_of(log, units=halves(3))
    kind_of = {"compute": "read", "launch": "read", "blocked": "synchronize"}
    for bar in trace.bars:
        op, last = log.ops[bar.op], log.ops[bar.last_op]
        if bar.kind != "submit":
            assert op.kind == kind_of.get(bar.kind, bar.kind)
        if bar.row:
            assert trace.rows[bar.row].stream == op.stream
            assert bar.end_ns - bar.begin_ns == last.end_ns - op.begin_ns
        if bar.kind in ("copy", "compute"):
            assert (bar.unit, bar.generation) == (op.unit, op.generation)
    for arrow in trace.arrows:
        record, wait = log.ops[arrow.record_op], log.ops[arrow.wait_op]
        assert (record.kind, wait.kind) == ("record", "wait")
        assert record.event == wait.event == arrow.event
        assert arrow.record_op < arrow.wait_op
        assert arrow.from_ns <= arrow.to_ns
    # Each copy and each use once, and each wait.
    copies = [index for index, op in enumerate(log.ops) if op.kind == "copy"]
    waits = [index for index, op in enumerate(log.ops) if op.kind == "wait"]
    assert [bar.op for bar in trace.of_kind("copy")] == copies
    assert len(trace.of_kind("compute")) == 12
    assert [arrow.wait_op for arrow in trace.arrows] == waits


def test_arrow_comes_from_the_last_record_before_the_wait() -> None:
    log = FakeLog(["copies", "compute"], ["a"])
    log.copy(COPY, 0, 5 * MS, generation=1)
    log.record(COPY, 0)
    log.copy(COPY, 0, 7 * MS, generation=2)
    log.record(COPY, 0)
    log.wait(COMPUTE, 0)
    log.record(COPY, 0)  # again, after the wait: not what it waited for
    (arrow,) = trace_of(log).arrows
    assert (arrow.record_op, arrow.wait_op) == (3, 4)
    assert arrow.from_ns == pytest.approx(12 * MS, abs=20_000)


def test_arrow_of_a_device_that_does_not_time_records_starts_behind_the_copy() -> None:
    with_times, without = (
        trace_of(pipeline_log(record_times=record_times)) for record_times in (True, False)
    )
    assert len(without.arrows) == len(with_times.arrows) > 0
    for exact, found in zip(with_times.arrows, without.arrows, strict=True):
        assert found.from_ns == pytest.approx(exact.from_ns, abs=20_000)


def test_waits_know_the_unit_that_they_are_for() -> None:
    trace = trace_of(pipeline_log(layers=2), units=halves(2))
    on_compute = [
        bar.label for bar in trace.of_kind("wait") if trace.rows[bar.row].name == "caller"
    ]
    assert on_compute == ["MHA 0", "FFN 0", "MHA 1", "FFN 1"]
    from_compute = [trace.unit_labels[arrow.unit] for arrow in trace.arrows if arrow.from_row == 2]
    assert from_compute == ["MHA 0", "FFN 0"]  # their places are free


def test_nested_uses_of_a_unit_are_paired_inside_out() -> None:
    log = FakeLog(["copies", "compute"], ["a", "b"])
    for kind, unit in (("read", 0), ("read", 1), ("read_end", 1), ("read_end", 0)):
        at = log._begin(COMPUTE)
        log._append(kind, at, at, stream=COMPUTE, unit=unit, generation=1)
    inner, outer = trace_of(log).of_kind("compute")
    assert (inner.unit, outer.unit) == (1, 0)
    assert outer.begin_ns < inner.begin_ns
    assert inner.end_ns < outer.end_ns


def test_use_that_the_log_saw_half_of_is_left_out() -> None:
    log = FakeLog(["copies", "compute"], ["a"])
    log._append("read_end", 1, 1, stream=COMPUTE, unit=0, generation=1)
    log.copy(COPY, 0, MS)
    log._append("read", 5, 5, stream=COMPUTE, unit=0, generation=2)
    assert trace_of(log).of_kind("compute", "launch") == []


def test_trace_between_cuts_bars_and_keeps_whole_arrows() -> None:
    trace = trace_of(pipeline_log(layers=2))
    part = trace.between(100 * MS, 200 * MS)
    assert part.end_ns == 100 * MS
    computes = [(bar.label, bar.begin_ns, bar.end_ns) for bar in part.of_kind("compute")]
    assert [label for label, _, _ in computes] == ["self_attn", "mlp", "self_attn"]
    assert computes[0][1] == 0
    assert computes[-1][2] == 100 * MS
    assert all(0 <= arrow.from_ns <= arrow.to_ns <= part.end_ns for arrow in part.arrows)


@pytest.mark.parametrize("empty", [True, False])
def test_trace_of_a_log_without_times_fails(empty: bool) -> None:
    log = FakeLog(["s"], ["u"], has_times=False) if empty else pipeline_log()
    log.has_times = False
    with pytest.raises(ValueError, match=r"record\(times=True\)"):
        trace_of(log)


def test_short_names_tell_halves_by_kind_and_leaves_by_module() -> None:
    leaves = [*halves(2)[:2], *[type(halves(1)[0])(f"layers.1.mlp.{n}", 1, 1, "ffn") for n in "ab"]]
    assert short_names(leaves) == ["MHA 0", "FFN 0", "a 1", "b 1"]


# ---- intervals and attribution -----------------------------------------------------------------


def test_intervals_do_set_algebra() -> None:
    left, right = union([(5, 7), (0, 3), (2, 4), (7, 9), (9, 9)]), [(3, 6), (8, 20)]
    assert left == [(0, 4), (5, 9)]
    assert intersect(left, right) == [(3, 4), (5, 6), (8, 9)]
    assert subtract(left, right) == [(0, 3), (6, 8)]
    assert subtract([(0, 10)], [(2, 3), (5, 6)]) == [(0, 2), (3, 5), (6, 10)]
    assert total(left) == 8
    assert most_at_once([left, right]) == 2
    assert most_at_once([[(0, 1)], [(1, 2)]]) == 1


def test_attribution_of_a_pipeline_with_a_cold_first_copy() -> None:
    found = attribute(trace_of(pipeline_log(layers=4)))
    assert found.compute_ns == pytest.approx(4 * 178.36 * MS, abs=1e5)
    assert found.stall_ns == pytest.approx(6.74 * MS, abs=1e5)
    assert found.copy_ns == pytest.approx(4 * 20.28 * MS, abs=1e5)
    assert found.hidden_share == pytest.approx(1 - 6.74 / (4 * 20.28), abs=1e-3)
    assert found.streams_at_once == 2
    assert found.blocked_ns == 0
    assert [unit.stall_ns > 0 for unit in found.units] == [True] + [False] * 7


def test_attribution_of_sync_hides_nothing_and_blocks_the_host() -> None:
    found = attribute(trace_of(sync_log(layers=3)))
    assert found.stall_ns == pytest.approx(3 * 20.28 * MS, abs=1e5)
    assert found.hidden_share == 0
    assert found.blocked_ns == pytest.approx(3 * 198.64 * MS, rel=1e-3)
    assert found.streams_at_once == 1


def test_attribution_where_the_host_waits_for_another_stream_counts_it_as_stall() -> None:
    log = FakeLog(["weight_h2d", "caller"], ["a"])
    log.copy(COPY, 0, 10 * MS)
    log.synchronize(COPY)
    log.compute(COMPUTE, 0, 30 * MS)
    log.synchronize(COMPUTE)
    found = attribute(trace_of(log))
    assert found.stall_ns == pytest.approx(10 * MS, abs=1e4)
    assert found.units[0].stall_ns == found.stall_ns
    assert found.compute_ns == 30 * MS


def test_a_wait_for_other_kernels_is_no_stall() -> None:
    log = FakeLog(["compute_mha", "compute_ffn", "weight_h2d"], ["a", "b"])
    log.copy(2, 0, MS)
    log.copy(2, 1, MS)
    log.record(2, 9)
    log.wait(0, 9)
    log.compute(0, 0, 10 * MS)
    log.record(0, 7)
    log.wait(1, 7)  # the hand-over from attention to FFN, half of it spent computing
    log.compute(1, 1, 10 * MS)
    found = attribute(trace_of(log))
    assert found.units[1].stall_ns == 0
    assert found.stall_ns == pytest.approx(2 * MS, abs=1e4)


def test_states_of_the_lane_add_up_to_the_whole() -> None:
    for log in (pipeline_log(layers=3, passes=2), sync_log(layers=3)):
        trace = trace_of(log)
        begin_ns, end_ns = -3 * MS, trace.end_ns + 5 * MS
        found = attribute(trace, begin_ns, end_ns)
        parts = found.compute_ns + found.stall_ns + found.between_ns + found.outside_ns
        assert parts == found.span_ns == end_ns - begin_ns
        assert found.copy_ns + found.copy_idle_ns == found.span_ns
        assert sum(unit.compute_ns for unit in found.units) == found.compute_ns
        assert sum(unit.stall_ns for unit in found.units) == found.stall_ns
