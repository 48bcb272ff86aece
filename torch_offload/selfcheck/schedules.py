"""Lanes in C++: schedules of the real pipeline, the checker against brute force, mutants."""

from __future__ import annotations

from torch_offload import _C
from torch_offload.selfcheck.lane import Effort, Lane, Tally

# `sync` knows one stream, so it has no split.
MODES = (
    ("sync", "shared"),
    ("streams", "shared"),
    ("streams", "split"),
    ("events", "shared"),
    ("events", "split"),
    ("pipeline", "shared"),
    ("pipeline", "split"),
)


def _add(tally: Tally, report: _C.LaneReport, where: str = "") -> None:
    for example in report.examples:
        tally.add_fault(where + example)
    tally.num_faults += report.num_bad - len(report.examples)
    tally.figures["schedules"] = tally.figures.get("schedules", 0) + report.num_schedules
    tally.figures["ops"] = tally.figures.get("ops", 0) + report.num_ops


class RandomSchedules(Lane):
    """Each schedule drawn from its seed, run through the real pipeline in virtual time."""

    name = "random"
    tried = "random plans, orders, modes, nested and failing calls; each log checked"
    counts = "distinct schedules"

    _CHUNK = 1000
    # Nearly all are distinct; a few small plans come twice.
    _QUICK, _FULL = 150_000, 1_300_000

    def control(self) -> Tally:
        """The same schedules, with the waits left out of their logs from one of them on."""
        lane = _C.RandomLane(is_control=True)
        lane.advance(500)
        tally = Tally()
        _add(tally, lane.report())
        return tally

    def run(self, effort: Effort) -> Tally:
        """Counts the distinct ones by the hash of their logs."""
        lane = _C.RandomLane(num_threads=effort.num_threads)
        for chunk in effort.chunks(effort.pick(self._QUICK, self._FULL), self._CHUNK):
            lane.advance(chunk)
        report = lane.report()
        tally = Tally(report.num_distinct)
        _add(tally, report)
        tally.note = f"{report.num_schedules:,} schedules of {report.num_ops:,} ops in all"
        return tally


class AllSmallSchedules(Lane):
    """Every plan, every order of calls, cut short at every point."""

    name = "exhaustive"
    tried = "every small plan, two passes of any calls, an exception at each point"
    counts = "small schedules"

    _CHUNK = 2000
    # The whole of 5 units, 3 places and 5 calls is 1.04e9 schedules of each mode; a slice of it.
    _QUICK_STRIDE, _FULL_STRIDE = 40_009, 1009

    def control(self) -> Tally:
        """The same schedules, with the waits left out of their logs from one of them on."""
        tally = Tally()
        lane = _C.ExhaustiveLane(
            mode="pipeline", streams="split", max_units=2, max_calls=2, is_control=True
        )
        lane.advance(lane.count())
        _add(tally, lane.report())
        return tally

    def run(self, effort: Effort) -> Tally:
        """All schedules of few units and calls, then each n-th of the larger ones."""
        most = effort.pick(3, 4)
        stride = effort.pick(self._QUICK_STRIDE, self._FULL_STRIDE)
        wholes = [
            (
                f"{mode}, {streams}, {' and '.join(transports)}: ",
                _C.ExhaustiveLane(
                    mode=mode,
                    streams=streams,
                    max_units=units,
                    max_calls=units,
                    num_threads=effort.num_threads,
                    transports=transports,
                ),
            )
            for mode, streams in MODES
            for transports, units in (
                (["raw"], most),
                (["packed_resident", "packed"], most - 1),
                (["packed_resident", "raw"], most - 1),
            )
        ]
        slices = [
            (
                f"{mode}, {streams}: ",
                _C.ExhaustiveLane(
                    mode=mode, streams=streams, stride=stride, num_threads=effort.num_threads
                ),
            )
            for mode, streams in MODES
        ]
        total = sum(lane.count() for _, lane in (*wholes, *slices))
        tally = Tally()
        for where, lane in (*wholes, *slices):
            goes_on = True
            while goes_on:
                goes_on = lane.advance(self._CHUNK)
                done = tally.count + lane.report().num_schedules
                effort.progress(done, total)
            report = lane.report()
            tally.count += report.num_schedules
            _add(tally, report, where)
        whole = sum(lane.count() for _, lane in wholes)
        tally.note = (
            f"all {whole:,} of up to {most} units and calls in 3 places, packed {most - 1}; "
            f"each {stride:,}-th of up to 5"
        )
        return tally


class Linearisations(Lane):
    """What the checker says of a log, and what all orders of the log show."""

    name = "linearisations"
    tried = "the checker against all orders in which small logs can run"
    counts = "orders"

    _CHUNK = 50_000
    _QUICK, _FULL = 4_000_000, 20_000_000

    def control(self) -> Tally:
        """A checker that misses one wait of each log."""
        lane = _C.LinearisationLane(is_control=True)
        lane.advance(20_000)
        return self._tally(lane.report())

    def run(self, effort: Effort) -> Tally:
        """At least so many orders, of as many logs as it takes."""
        lane = _C.LinearisationLane()
        for chunk in effort.chunks(effort.pick(self._QUICK, self._FULL), self._CHUNK):
            lane.advance(chunk)
        return self._tally(lane.report())

    @staticmethod
    def _tally(report: _C.LinearisationReport) -> Tally:
        tally = Tally(report.num_orders, num_faults=report.num_disagreements)
        tally.examples = list(report.examples)
        tally.note = (
            f"{report.num_disagreements} disagreements over {report.num_logs:,} logs: "
            f"{report.num_clean:,} clean, {report.num_unordered:,} unordered, "
            f"{report.num_stale:,} stale"
        )
        tally.figures = {
            "logs": report.num_logs,
            "clean": report.num_clean,
            "unordered": report.num_unordered,
            "stale": report.num_stale,
            "too_large": report.num_too_large,
            "disagreements": report.num_disagreements,
        }
        return tally


class Mutants(Lane):
    """The pipeline without one of its steps: noticed from the log, and really wrong."""

    name = "mutants"
    tried = "each wait, record, drain and restore of the pipeline left out, one by one"
    counts = "mutants flagged"

    def control(self) -> Tally:
        """A mutant that leaves nothing out."""
        tally = Tally()
        self._judge(tally, _C.run_mutant(0, leaves_out=False))
        return tally

    def run(self, effort: Effort) -> Tally:
        """Each must be flagged by the checker and yield wrong bytes; its twin neither."""
        tally = Tally()
        total = _C.num_mutants()
        for index in range(total):
            self._judge(tally, _C.run_mutant(index, leaves_out=True))
            twin = _C.run_mutant(index, leaves_out=False)
            if twin.findings or twin.num_wrong:
                tally.add_fault(f"{twin.step}: the twin that leaves nothing out is flagged")
            effort.progress(index + 1, total)
        flagged = total - tally.num_faults
        tally.note = f"{flagged} of {total} flagged; each yields wrong bytes on worker threads"
        return tally

    @staticmethod
    def _judge(tally: Tally, outcome: _C.MutantOutcome) -> None:
        tally.must(
            outcome.is_reached and outcome.num_wrong > 0 and bool(outcome.findings),
            f"{outcome.step}: {len(outcome.findings)} findings, {outcome.num_wrong} wrong kernels",
        )
