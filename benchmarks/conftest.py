"""Options, the stage, and how parts are bounded in time and kept apart from each other's failures.

- ``pytest benchmarks``: everything, tiny where there is no GPU;
- ``pytest benchmarks/bench_yardstick.py``: one subject;
- ``pytest benchmarks --results-dir=OUT``: JSON to OUT, one file per subject.
"""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clocks import DEVICE, ON_GPU, Link, device_ms
from records import Part, Records
from stored import save_checkpoint, save_tokenizer
from tables import print_results
from yardstick import (
    DEEP,
    HEAVY,
    PEER,
    SMALL,
    THIN,
    TINY_DEEP,
    TINY_HEAVY,
    TINY_PEER,
    TINY_SMALL,
    TINY_THIN,
    TINY_YARDSTICK,
    YARDSTICK,
    Shape,
    Stage,
    Workload,
    bound,
)

# Seconds that the parts of one file share on a GPU; what is late makes fewer rounds or is skipped.
FILE_LIMITS_S = {
    "yardstick": 150,
    "modes": 120,
    "peers": 75,
    "checkpoint": 120,
    "deep": 50,
    "cpu_free": 60,
    "profile": 60,
    "simulated": 120,
    "planner": 240,
    "offload": 60,
    "budget_peers": 75,
    "disk": 60,
    "codec": 60,
    "packed": 200,
    "packed_peers": 130,
    "decoder": 20,
    "submit": 40,
    "packed_cache": 90,
    "layer": 60,
}
_RECORDS = pytest.StashKey[Records]()
_PART = pytest.StashKey[Part]()
_BEGUN: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torch_offload")
    group.addoption(
        "--tiny", action="store_true", help="tiny models; the default where there is no GPU"
    )
    group.addoption("--results-dir", help="where the JSON goes (benchmarks/results[/tiny])")
    group.addoption(
        "--checkpoint", help="size of the checkpoint that is streamed from disk, such as 4GiB"
    )
    group.addoption(
        "--memory-limit", help="stream it in a control group of so much memory, such as 1GiB"
    )
    group.addoption(
        "--time-scale", type=float, default=1.0, help="multiplies the time limit of every file"
    )


def _without_folders(argument: str) -> str:
    """The same without the path of this machine, for the record."""
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if os.path.isabs(value) else value)


def pytest_configure(config: pytest.Config) -> None:
    if config.inipath != Path(__file__).parent / "pytest.ini":
        # A folder behind a blank counts as one more path to look in.
        raise pytest.UsageError(
            f"expected benchmarks/pytest.ini to be read, got {config.inipath}: name nothing but "
            "benchmarks, write --results-dir=OUT in one word, and no --config-file"
        )
    tiny = config.getoption("--tiny") or not ON_GPU
    default = Path(__file__).parent / "results" / ("tiny" if tiny else "")
    folder = Path(config.getoption("--results-dir") or default)
    arguments = [_without_folders(argument) for argument in config.invocation_params.args]
    command = " ".join(["pytest", *arguments])
    is_real = config.getoption("--checkpoint") is not None  # of the disk, whatever the device
    config.stash[_RECORDS] = Records(folder, command, tiny and not is_real)
    if not ON_GPU:
        torch.set_num_threads(1)  # tiny models: a second thread costs more than it computes


@pytest.fixture(scope="session")
def tiny(pytestconfig: pytest.Config) -> bool:
    """Whether sizes are tiny and figures mean nothing."""
    return bool(pytestconfig.getoption("--tiny")) or not ON_GPU


@pytest.fixture(scope="session")
def yardstick(tiny: bool) -> Workload:
    return TINY_YARDSTICK if tiny else YARDSTICK


@pytest.fixture(scope="session")
def deep(tiny: bool) -> Workload:
    return TINY_DEEP if tiny else DEEP


@pytest.fixture(scope="session")
def heavy(tiny: bool) -> Workload:
    return TINY_HEAVY if tiny else HEAVY


@pytest.fixture(scope="session")
def thin(tiny: bool) -> Workload:
    return TINY_THIN if tiny else THIN


@pytest.fixture(scope="session")
def peer(tiny: bool) -> Workload:
    return TINY_PEER if tiny else PEER


@pytest.fixture(scope="session")
def peer_folder(
    stage: Stage, peer: Workload, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """That model's checkpoint, one file per module, in the page cache."""
    folder = tmp_path_factory.mktemp("peer")
    save_checkpoint(stage.plain(peer), folder)
    save_tokenizer(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def workloads(tiny: bool, yardstick: Workload) -> dict[str, Workload]:
    """Those that one bench is run with, by name."""
    return {"yardstick": yardstick, "small": TINY_SMALL if tiny else SMALL}


@pytest.fixture(scope="session")
def results_folder(pytestconfig: pytest.Config) -> Path:
    """Where the JSON of this run goes."""
    return pytestconfig.stash[_RECORDS].folder


class Reference:
    """What every subject divides by: the link's rate and the plain model, measured in this run."""

    def __init__(self, stage: Stage, tiny: bool) -> None:
        self._stage = stage
        self._plain_ms: dict[tuple[str, Shape], float] = {}
        sizes = (2**20,) if tiny else (2**28, 2**30)
        links = {size: Link(size) for size in sizes}
        self.link_rates = {size: link.rate() for size, link in links.items()}
        self.link = links[max(sizes)]
        self.link_bytes_per_s = max(rate["median"] for rate in self.link_rates.values())

    def floor_ms(self, size_bytes: int) -> float:
        """How long the link needs for these bytes at the best rate seen."""
        return size_bytes / self.link_bytes_per_s * 1e3

    def plain_ms(self, workload: Workload, shape: Shape) -> float:
        """Device time of the plain model, for benches in which it takes no turns."""
        key = (workload.name, shape)
        if key not in self._plain_ms:
            run = bound(self._stage.plain(workload), workload.tokens(shape))
            times = device_ms(run, forwards=1, rounds=3)
            self._plain_ms[key] = sorted(times)[1]
        return self._plain_ms[key]


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.clear()


@pytest.fixture(scope="session")
def reference(stage: Stage, tiny: bool) -> Reference:
    return Reference(stage, tiny)


@pytest.fixture
def part(request: pytest.FixtureRequest, tiny: bool) -> Part:
    """This bench's figures and limits; skips when its file's time is spent."""
    part = request.node.stash[_PART]
    if not tiny and time.monotonic() > part.deadline:
        pytest.skip("the time limit of this file is spent (see --time-scale)")
    return part


def _subject(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("bench_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The core figures first; the models of one file stand on the stage until the next one's."""
    order = list(FILE_LIMITS_S)
    items.sort(key=lambda item: order.index(_subject(item)) if _subject(item) in order else 99)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    subject = _subject(item)
    limit_s = FILE_LIMITS_S.get(subject, 60) * item.config.getoption("--time-scale")
    deadline = _BEGUN.setdefault(subject, time.monotonic()) + limit_s
    items = item.session.items
    later = sum(_subject(other) == subject for other in items[items.index(item) :])
    item.stash[_PART] = Part(
        subject=subject,
        name=item.name.removeprefix("bench_"),
        tiny=bool(item.config.getoption("--tiny")) or not ON_GPU,
        deadline=deadline,
        share_s=max(deadline - time.monotonic(), 0.0) / later,
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    part = item.stash.get(_PART, None)
    if part is None or call.when == "teardown":
        return report
    part.seconds += call.duration
    if report.failed:
        part.status = "error"
        part.figures.clear()
        # A frame of the traceback may hold a model: without this the next part finds no memory.
        if call.excinfo is not None:
            part.error = f"{call.when}: {call.excinfo.exconly()}"[:2000]
            traceback.clear_frames(call.excinfo.tb)
        if (stage := getattr(item, "funcargs", {}).get("stage")) is not None:
            stage.clear_streamed()
    elif report.skipped:
        part.status = "skipped"
        part.error = str(call.excinfo.value) if call.excinfo else None
    elif call.when == "call":
        part.status = "ok"
    if call.when == "call" or not report.passed:
        item.config.stash[_RECORDS].keep(part)
    return report


def pytest_report_header(config: pytest.Config) -> str:
    tiny = config.getoption("--tiny") or not ON_GPU
    size = "tiny models: the figures say nothing about speed" if tiny else "the yardstick"
    return f"torch_offload: {DEVICE}, {size}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    records = terminalreporter.config.stash[_RECORDS]
    if not records.subjects:
        return
    documents = {subject: records.document(subject) for subject in records.subjects}
    print_results(documents)
    terminalreporter.write_line(f"JSON: {os.path.relpath(records.folder)}")
