"""The self-check: what its runner lets pass, its lanes in slices, and its command."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import _disable_current_modes

from tests.python.dropin import rows, streamed, tiny_stack
from tests.python.streamed_master_guard import unguarded_control
from torch_offload import _C, StateError
from torch_offload.cli import BAD_ANSWER, BAD_INPUT, main
from torch_offload.devices import devices_made_by
from torch_offload.selfcheck import (
    Effort,
    Lane,
    LaneResult,
    Report,
    Tally,
    all_lanes,
    equality,
    run_lanes,
    stream_sanitizer,
)
from torch_offload.selfcheck.equality import Case, Equality, StreamedModel, VisibleRaces
from torch_offload.selfcheck.overlap import Overlap
from torch_offload.selfcheck.plants import PLANTS, Plant
from torch_offload.selfcheck.races import PublishedRaces, TriedRaces
from torch_offload.selfcheck.schedules import (
    AllSmallSchedules,
    Linearisations,
    Mutants,
    RandomSchedules,
)
from torch_offload.selfcheck.stream_sanitizer import StreamSanitizer
from torch_offload.selfcheck.subjects import SUBJECTS

HOST = torch.device("cpu")


class _Toy(Lane):
    """A lane that does as it is told."""

    name = "toy"
    tried = "what a test wants"
    counts = "things"

    def __init__(
        self,
        *,
        missing: str | None = None,
        control: int = 1,
        faults: int = 0,
        count: int = 3,
        error: BaseException | None = None,
    ) -> None:
        self._missing, self._control, self._error = missing, control, error
        self._faults, self._count = faults, count
        self.has_run = False

    def why_not(self) -> str | None:
        return self._missing

    def control(self) -> Tally:
        return Tally(1, num_faults=self._control)

    def run(self, effort: Effort) -> Tally:
        self.has_run = True
        if self._error is not None:
            raise self._error
        tally = Tally(self._count, note="as it was told")
        for number in range(self._faults):
            tally.add_fault(f"thing {number}")
        return tally


def _run(lane: Lane, effort: Effort | None = None) -> LaneResult:
    with unguarded_control(lane):
        (result,) = run_lanes([lane], effort or Effort()).lanes
    return result


# ---- what passes ---------------------------------------------------------------------------------


def test_lane_passes_behind_a_control_that_was_caught() -> None:
    result = _run(_Toy())
    assert (result.verdict, result.control, result.count) == ("passed", True, 3)
    assert result.reason == "as it was told"


def test_lane_whose_control_is_missed_fails_without_a_run() -> None:
    lane = _Toy(control=0)
    result = _run(lane)
    assert (result.verdict, result.control) == ("failed", False)
    assert "sees nothing" in result.reason
    assert not lane.has_run


def test_lane_whose_tool_is_missing_is_not_run_and_not_passed() -> None:
    lane = _Toy(missing="torch sees no GPU")
    report = run_lanes([lane], Effort())
    assert report.lanes[0].verdict == "not run"
    assert report.lanes[0].control is None
    assert report.lanes[0].reason == "torch sees no GPU"
    assert not lane.has_run
    assert not report.is_well, "nothing at all was tried"


@pytest.mark.parametrize(
    ("lane", "reason"),
    [
        (_Toy(faults=7, count=9), "7 of 9 things went wrong"),
        (_Toy(error=RuntimeError("broken")), "RuntimeError: broken"),
        (_Toy(count=0), "nothing was tried"),
    ],
    ids=["faults", "error", "nothing"],
)
def test_lane_that_goes_wrong_fails(lane: _Toy, reason: str) -> None:
    report = run_lanes([_Toy(), lane], Effort())
    assert report.lanes[1].verdict == "failed"
    assert report.lanes[1].reason == reason
    assert len(report.lanes[1].examples) <= 5
    assert not report.is_well
    assert report.last_line.startswith("1 passed, 1 failed in ")


def test_interrupt_ends_all_lanes() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_lanes([_Toy(error=KeyboardInterrupt()), _Toy()], Effort())


@pytest.mark.parametrize(
    "lane", [RandomSchedules(), AllSmallSchedules(), Linearisations()], ids=lambda lane: lane.name
)
def test_interrupt_is_noticed_between_two_chunks_of_a_lane_in_cpp(lane: Lane) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    begin = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_lanes([lane], Effort(full=True, num_threads=2))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert time.monotonic() - begin < 10, "the whole of it takes longer"


def test_torch_keeps_its_threads() -> None:
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_lanes([_Toy(error=KeyboardInterrupt())], Effort())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_report_says_all_in_its_table_last_line_and_json() -> None:
    report = run_lanes([_Toy(faults=2), _Toy(missing="no tool"), _Toy(control=0)], Effort())
    console = Console(width=120)
    with console.capture() as captured:
        console.print(report)
    text = captured.get()
    for word in ("toy", "caught", "MISSED", "not run", "no tool", "2 of 3 things", "toy: thing 1"):
        assert word in text
    assert text.rstrip().splitlines()[-1].strip() == report.last_line
    assert report.last_line == "2 failed, 1 not run in 0 s: 3 things; 0 things"
    document = json.loads(json.dumps(report.to_json()))
    assert [lane["verdict"] for lane in document["lanes"]] == ["failed", "not run", "failed"]
    assert document["machine"]["torch"] == str(torch.__version__)


def test_chunks_make_up_the_whole_and_tell_progress() -> None:
    told: list[tuple[int, int]] = []
    effort = Effort(progress=lambda done, total: told.append((done, total)))
    assert list(effort.chunks(10, 4)) == [4, 4, 2]
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert (effort.pick(1, 2), Effort(full=True).pick(1, 2)) == (1, 2)


# ---- the lanes, in slices ------------------------------------------------------------------------


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes so small that a test takes a second."""
    monkeypatch.setattr(RandomSchedules, "_QUICK", 3000)
    monkeypatch.setattr(AllSmallSchedules, "_QUICK", 3)
    monkeypatch.setattr(Linearisations, "_QUICK", 200_000)
    monkeypatch.setattr(StreamSanitizer, "_QUICK", 60)
    cases = [
        Case(SUBJECTS[0], "pipeline", "split", "module"),
        Case(SUBJECTS[1], "events", "shared"),
        Case(SUBJECTS[2], "streams", "shared", "layer"),
        Case(SUBJECTS[3], "pipeline", "shared"),
        Case(SUBJECTS[0], "pipeline", "split", transport="packed"),
        Case(SUBJECTS[3], "events", "shared", "layer", transport="packed_resident"),
    ]
    monkeypatch.setattr(equality, "all_cases", lambda: iter(cases))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize(
    ("lane", "least"),
    [
        (RandomSchedules(), 2500),
        (AllSmallSchedules(), 79_016),
        (Linearisations(), 200_000),
        (Mutants(), _C.num_mutants()),
        (StreamSanitizer(), 120),
        (VisibleRaces(HOST), 6),
        (Equality(HOST), 18),
        (TriedRaces(), 6),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_lane_passes(lane: Lane, least: int) -> None:
    told: list[tuple[int, int]] = []
    result = _run(lane, Effort(num_threads=2, progress=lambda *done: told.append(done)))
    assert (result.verdict, result.examples) == ("passed", ())
    assert result.control is True
    assert result.count >= least
    assert told[-1][0] == told[-1][1], "progress ends before the lane does"


def test_equality_that_compares_nothing_is_found_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = StreamedModel.forwards

    def right(*args: Any, **kwargs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        try:
            return [(must, must) for _, must in forwards(*args, **kwargs)]
        except StateError:  # a late copy was taken for an edit, which is not what this is about
            return []

    monkeypatch.setattr(StreamedModel, "forwards", right)
    result = _run(Equality(HOST))
    assert (result.verdict, result.control) == ("failed", False)
    assert "(no waits)" in result.reason


def test_equality_that_counts_no_copies_is_found_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality.Uses, "counts", lambda _: (1, 1))
    result = _run(Equality(HOST))
    assert (result.verdict, result.control) == ("failed", False)
    assert "(not streamed)" in result.reason


def test_published_races_are_all_caught() -> None:
    with _disable_current_modes():  # the guard would catch one of them before
        result = _run(PublishedRaces())
    assert result.verdict == "passed", result.reason
    assert result.reason == "18 of 18 caught, 18 twins pass"
    assert result.figures == {"caught": 18, "of": 18}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.id)
def test_plant_is_seen_and_its_twin_is_not(device: torch.device, plant: Plant) -> None:
    with _disable_current_modes():
        assert plant.run(device, True)
    assert not plant.run(device, False)


def test_every_race_without_calls_of_a_device_has_a_plant() -> None:
    above = [race.id for race in _C.published_races() if race.python_test is not None]
    assert [plant.id for plant in PLANTS] == above


def test_lanes_of_a_gpu_are_not_run_without_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    names = [lane.name for lane in all_lanes() if lane.why_not() is not None]
    assert names == ["visible races on cuda", "equality on cuda", "overlap"]


def test_overlap_is_measured_and_right_on_the_host() -> None:
    """How much overlaps there is a matter of its cores; what is asked of them is not."""
    lane = Overlap(HOST, width=64, rows=64)
    assert lane.why_not() is not None
    control = lane.control()
    assert [example[:10] for example in control.examples] == ["no overlap"]
    tally = lane.measure("pipeline")
    assert tally.figures["copies"] >= 8
    assert all("overlap" in example for example in tally.examples), "the outputs differ"


def test_sanitizer_is_loaded_without_watching_the_process() -> None:
    sanitizer = stream_sanitizer.load_sanitizer()
    log = _C.random_schedule(1)
    assert stream_sanitizer.first_race_seen(sanitizer, log.ops) is None
    assert sanitizer.cuda_sanitizer.enabled is False


def test_sanitizer_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_sanitizer, "_HANDLERS", ("_handle_nothing",))
    result = _run(StreamSanitizer())
    assert result.verdict == "not run"
    assert "_handle_nothing" in result.reason


# ---- devices with faults -------------------------------------------------------------------------


def test_unknown_fault_or_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute_waits, copy_waits.*got 'waits'"):
        _C.DeviceFault("waits")
    with pytest.raises(ValueError, match=r"up to 6 units.*got 9 units"):
        _C.ExhaustiveLane(mode="sync", streams="shared", max_units=9)


@torch.no_grad()
def test_fault_goes_wrong_only_while_it_is_armed() -> None:
    fault = _C.DeviceFault("compute_waits")
    model = tiny_stack()
    must = model(rows(HOST))

    def goes_wrong() -> bool:
        try:
            return not torch.equal(model(rows(HOST)), must)
        except StateError:  # a copy came so late that it was taken for an edit by the forward
            return True

    with (
        devices_made_by(lambda device: _C.faulty_device(device, fault, longest_delay_us=20_000)),
        streamed(model, HOST) as handle,
    ):
        assert torch.equal(model(rows(HOST)), must)
        fault.is_armed = True
        assert goes_wrong()
        fault.is_armed = False
        handle.refresh()
        assert torch.equal(model(rows(HOST)), must)


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("slices")
def test_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "selfcheck.json"
    chosen = ["selfcheck", "--lanes", "mutants, random,overlap", "--json", str(report)]
    assert main(chosen) == 0
    text = capsys.readouterr().out
    document = json.loads(report.read_text())
    verdicts = {lane["name"]: lane["verdict"] for lane in document["lanes"]}
    there = "passed" if torch.cuda.is_available() else "not run"
    assert verdicts == {"mutants": "passed", "random": "passed", "overlap": there}
    assert "78 mutants flagged" in " ".join(text.split())


def test_command_fails_with_its_lane(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch_offload.selfcheck.all_lanes", lambda: [_Toy(faults=1)])
    assert main(["selfcheck", "--json", "-"]) == BAD_ANSWER
    assert json.loads(capsys.readouterr().out)["is_well"] is False


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--lanes", "randon"), "expected --lanes to list some of"),
        (("--threads", "0"), "expected --threads between 1 and 1024, got 0"),
        (("--json", "/nowhere/at/all.json"), "a folder that exists"),
    ],
)
def test_command_with_bad_input_fails(
    arguments: tuple[str, ...], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selfcheck", *arguments]) == BAD_INPUT
    assert match in capsys.readouterr().err


def test_report_of_nothing_is_not_well() -> None:
    report = Report((), {}, full=False)
    assert not report.is_well
    assert report.last_line == " in 0 s: nothing was tried"
