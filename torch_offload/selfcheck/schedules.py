"""Lanes in C++: schedules of the real pipeline, the checker against brute force, mutants."""

from __future__ import annotations

from collections.abc import Sequence

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
    tried = "random plans, orders, modes, edits, nested and failing calls; each log checked"
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

    #: Up to so many units and calls, in up to three places.
    _QUICK, _FULL = 4, 5
    #: Up to so many, each schedule is run by itself as well; packed ones only so.
    _EACH = 3
    #: Of packed units, quickly.
    _PACKED = 2

    def control(self) -> Tally:
        """The same schedules, with the waits left out of their logs from one of them on."""
        lane = _C.ExhaustiveLane(
            mode="pipeline", streams="split", max_units=2, max_calls=2, is_control=True
        )
        lane.advance(lane.count())
        tally = Tally()
        _add(tally, lane.report())
        return tally

    def run(self, effort: Effort) -> Tally:
        """All of them; where schedules of raw units meet in a state they go on as one."""
        size = effort.pick(self._QUICK, self._FULL)
        packed_size = effort.pick(self._PACKED, self._EACH)
        lanes = [
            (
                f"{mode}, {streams}, {' and '.join(ways)}: ",
                self._lane(
                    mode, streams, units, num_threads=effort.num_threads, merges=merges, ways=ways
                ),
            )
            for mode, streams in MODES
            for ways, units, merges in (
                (["raw"], size, True),
                (["packed_resident", "packed"], packed_size, False),
                (["packed_resident", "raw"], packed_size, False),
            )
        ]
        total = sum(lane.count() for _, lane in lanes)
        tally = Tally()
        for mode, streams in MODES:
            self._compare(tally, f"{mode}, {streams}: ", mode, streams)
        for where, lane in lanes:
            goes_on = True
            while goes_on:
                goes_on = lane.advance(1)
                effort.progress(tally.count + lane.report().num_schedules, total)
            report = lane.report()
            tally.count += report.num_schedules
            _add(tally, report, where)
            for figure, number in (("runs", report.num_runs), ("states", report.num_states)):
                tally.figures[figure] = tally.figures.get(figure, 0) + number
        if tally.count != total:
            tally.add_fault(f"{tally.count:,} schedules of {total:,}")
        tally.note = (
            f"all of up to {size} units and calls in 3 places, packed {packed_size}; "
            f"{tally.figures['runs']:,} runs, as equal states have equal futures"
        )
        return tally

    @staticmethod
    def _lane(
        mode: str,
        streams: str,
        size: int,
        *,
        merges: bool = True,
        num_threads: int = 1,
        ways: Sequence[str] = ("raw",),
    ) -> _C.ExhaustiveLane:
        return _C.ExhaustiveLane(
            mode=mode,
            streams=streams,
            max_units=size,
            max_calls=size,
            merges=merges,
            num_threads=num_threads,
            transports=ways,
        )

    def _compare(self, tally: Tally, where: str, mode: str, streams: str) -> None:
        """Merged, the smallest ones must be what they are when each is run, to the op."""
        reports = []
        for merges in (True, False):
            lane = self._lane(mode, streams, self._EACH, merges=merges)
            lane.advance(lane.count())
            reports.append(lane.report())
        merged, each = ((one.num_schedules, one.num_ops, one.digest) for one in reports)
        if merged != each:
            tally.add_fault(f"{where}(schedules, ops, digest) {merged} merged, {each} one by one")
        compared = tally.figures.get("compared one by one", 0)
        tally.figures["compared one by one"] = compared + reports[1].num_schedules


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
    """The pipeline without one of its steps, or with it at the wrong moment: noticed and wrong."""

    name = "mutants"
    tried = "each wait, record, drain and restore of the pipeline left out or moved, one by one"
    counts = "mutants flagged"

    def control(self) -> Tally:
        """A mutant that changes nothing."""
        tally = Tally()
        self._judge(tally, _C.run_mutant(0, is_mutated=False))
        return tally

    def run(self, effort: Effort) -> Tally:
        """Each must be flagged by the checker and yield wrong bytes; its twin neither."""
        tally = Tally()
        total = _C.num_mutants()
        for index in range(total):
            self._judge(tally, _C.run_mutant(index, is_mutated=True))
            twin = _C.run_mutant(index, is_mutated=False)
            if twin.findings or twin.num_wrong:
                tally.add_fault(f"{twin.step}: the twin that changes nothing is flagged")
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
