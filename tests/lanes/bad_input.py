"""Bad input, by the ten thousand: files, options, sizes, plans, command lines.

Each must be taken or refused by an error of the right type that says something, in time. From the
command line: an exit status, and no traceback. Good input is mutated, so that most of it is almost
right; the rest is drawn from what breaks parsers.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import torch_offload
from tests.lanes.fuzzed_commands import fuzz_command_line, fuzz_processes
from tests.lanes.fuzzing import ODD, Fuzz, mutated_bytes, mutated_document, short
from torch_offload import _C
from torch_offload.profile_file import profile_to_json, read_profile
from torch_offload.reference import LayerTimes
from torch_offload.selfcheck.lane import Effort, Lane, Tally, all_caught
from torch_offload.selfcheck.subjects import Stack
from torch_offload.simulate import reference_plan, run_layers
from torch_offload.sizes import parse_size
from torch_offload.timeline import read_traces, write_timeline

HOST = torch.device("cpu")
#: So many different inputs a full run tries, at least.
_LEAST = 100_000


def a_profile() -> Any:
    from tests.python.fake_log import pipeline_log
    from tests.python.test_profile import profile_from

    return profile_to_json(profile_from(pipeline_log(3), 3))


def _a_timeline(folder: Path) -> Any:
    run = run_layers(LayerTimes(), 2, mode="pipeline")
    write_timeline([run.trace()], folder / "good.json")
    return json.loads((folder / "good.json").read_text())


def fuzz_files(tally: Tally, count: int, seed: int, folder: Path) -> None:
    """Profiles and timelines: their data, and their bytes."""
    fuzz = Fuzz(tally, seed)
    sources = [
        ("profile", a_profile(), read_profile),
        ("timeline", _a_timeline(folder), read_traces),
    ]
    texts = [json.dumps(document).encode() for _, document, _ in sources]
    for number in fuzz.draws(count):
        index = number % 2
        what, document, read = sources[index]
        path = folder / f"{what}.json"
        if fuzz.choice.random() < 0.7:
            changed = mutated_document(fuzz.choice, document)
            data = json.dumps(changed).encode()
        else:
            data = mutated_bytes(fuzz.choice, texts[index])
        path.write_bytes(data)
        fuzz.attempt(what, data, lambda read=read, path=path: str(read(path)))  # type: ignore[misc]


def fuzz_sizes(tally: Tally, count: int, seed: int) -> None:
    """Sizes as people write them, and configs of odd values."""
    fuzz = Fuzz(tally, seed)
    letters = "0123456789.eE+- kKmMgGtTiIbB\t\n٣_x/"
    fields = list(torch_offload.Config.__dataclass_fields__)
    for number in fuzz.draws(count):
        if number % 2:
            value: Any = "".join(fuzz.choice.choices(letters, k=fuzz.choice.randint(0, 12)))
            kind = fuzz.choice.random()
            if kind < 0.5:
                unit = fuzz.choice.choice(["", " ", "B", "kb", "MiB", " GiB", "TB", "XB"])
                value = f"{fuzz.choice.uniform(0, 99):.{fuzz.choice.randrange(4)}f}{unit}"
            elif kind < 0.6:
                value = fuzz.choice.choice(ODD)
            fuzz.attempt("size", value, lambda value=value: parse_size(value, "depth"))  # type: ignore[misc]
        else:
            options = _good_options(fuzz.choice)
            for name in fuzz.choice.sample(fields, fuzz.choice.randint(0, 2)):
                options[name] = fuzz.choice.choice(ODD)
            fuzz.attempt("config", options, lambda o=options: torch_offload.Config(**o))  # type: ignore[misc]


def _good_options(choice: random.Random) -> dict[str, Any]:
    """A few options of `offload` that can be, though not all of them together."""
    good: dict[str, tuple[Any, ...]] = {
        "mode": ("pipeline", "sync", "events", "streams"),
        "streams": ("shared", "split"),
        "granularity": ("sublayer", "layer", "module", "auto"),
        "transport": ("raw", "auto", "packed", "packed_resident"),
        "masters": ("plain", "packed"),
        "packed_cache": (None, "packed"),
        "depth": (0, "1KiB", None, 10**9, choice.randrange(2**20)),
        "gpu_budget": (None, 5000, "4KiB", 0.5, 10**6, choice.randrange(2**20), "auto"),
        "headroom": (0, "1KiB", choice.randrange(2**30)),
        "on_oom": ("raise", "shrink"),
        "debug": (False, True),
        "nvtx": (False, True),
    }
    chosen = choice.sample(list(good), choice.randint(1, 5))
    options = {name: choice.choice(good[name]) for name in chosen}
    if choice.random() < 0.9:  # make them fit each other
        if options.get("masters") == "packed" or options.get("packed_cache"):
            options["transport"] = choice.choice(("auto", "packed", "packed_resident"))
        if options.get("mode") == "sync":
            options["streams"] = "shared"
    return options


def _a_model(packs: bool) -> tuple[Any, torch.Tensor]:
    """A model and its input; one that packs is in bf16, and wide enough for packing to pay."""
    torch.manual_seed(4)
    if packs:
        return torch_offload.align(Stack(2, 128).eval().bfloat16()), torch.randn(2, 128).bfloat16()
    return torch_offload.align(Stack(2, 8).eval()), torch.randn(2, 8)


class FuzzedOffload:
    """One model that is offloaded with all kinds of options, and must be what it was, or work."""

    def __init__(self, fuzz: Fuzz, packs: bool) -> None:
        self._fuzz = fuzz
        self._model, self._x = _a_model(packs)
        self._before = copy.deepcopy(self._model.state_dict())
        with torch.no_grad():
            self._must = self._model(self._x)
        names = [name for name, _ in self._model.named_modules()]
        self._names = [*names, "blocks.*", "*.attn", "*", "blocks.9"]

    def _draw(self) -> tuple[dict[str, Any], dict[str, Any], object]:
        choice = self._fuzz.choice
        options = _good_options(choice)
        for name in list(options):
            if choice.random() < 0.06:
                options[name] = choice.choice(ODD)
        for name in ("units", "resident"):
            if choice.random() < 0.15:
                items = choice.choices([*self._names, self._model.blocks[0], *ODD], k=2)
                if choice.random() < 0.5:
                    items = choice.choices(self._names, k=choice.randint(1, 2))
                options[name] = items if choice.random() < 0.8 else choice.choice(ODD)
        replanned = {}
        if choice.random() < 0.3:
            for name in ("gpu_budget", "depth"):
                size = choice.choice([None, "4KiB", choice.randrange(2**20)])
                replanned[name] = choice.choice(ODD) if choice.random() < 0.2 else size
        odd_units = [-1, 10**9, "attn", "nowhere"]
        unit = choice.choice(odd_units) if choice.random() < 0.1 else 0
        return options, replanned, unit

    def attempt(self) -> bool:
        """Draws options and tries them. Returns whether the model is as it was."""
        options, replanned, unit = self._draw()
        given = (options, replanned, unit)

        def call() -> None:
            with torch_offload.offload(self._model, HOST, **options) as handle:
                self._forward(handle)
                if replanned:
                    handle.replan(**replanned)
                    self._forward(handle)
                with handle.profile() as profiler:
                    self._forward(handle)
                if _streams(handle):
                    str(profiler.sentence)
                    handle.timeline("timeline.txt")
                handle.describe(unit)  # type: ignore[arg-type]

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._fuzz.attempt("offload", given, call)
            if fault := self._what_is_left():
                self._fuzz.tally.add_fault(f"offload of {short(given)}: {fault}")
        return not fault

    def _forward(self, handle: torch_offload.Handle) -> None:
        if not torch.equal(self._model(self._x), self._must):
            raise AssertionError("the outputs differ")
        if _streams(handle) and handle.stats.onloads == 0:
            raise AssertionError("nothing was streamed")

    def _what_is_left(self) -> str:
        if torch_offload.handle_of(self._model) is not None:
            return "the model is still offloaded"
        now = self._model.state_dict()
        if now.keys() != self._before.keys() or any(
            not torch.equal(now[name], self._before[name]) for name in now
        ):
            return "the model is not what it was"
        if not torch.equal(self._model(self._x), self._must):
            return "the plain outputs differ"
        return ""


def _streams(handle: torch_offload.Handle) -> bool:
    return any(unit.place is not None for unit in handle.units)


def fuzz_offload(tally: Tally, count: int, seed: int, folder: Path) -> None:
    """Options of `offload` and `replan`, of models that pack and that do not."""
    fuzz = Fuzz(tally, seed)
    models = [FuzzedOffload(fuzz, packs=False), FuzzedOffload(fuzz, packs=True)]
    with _inside(folder):
        for _ in fuzz.draws(count):
            if not models[fuzz.choice.random() < 0.4].attempt():
                return


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fuzz_calls(tally: Tally, count: int, seed: int) -> None:
    """Plans, simulations and the checker, with numbers that cannot be."""
    fuzz = Fuzz(tally, seed)
    choice = fuzz.choice
    tries = (_try_plan, _try_simulation, _try_check)
    for number in fuzz.draws(count):
        tries[number % len(tries)](fuzz, choice)


def _try_plan(fuzz: Fuzz, choice: random.Random) -> None:
    numbers = (0, 1, 2, 255, 256, 2**20, 2**40, 2**62, 2**63, 2**64 - 1)

    def size() -> int:
        return choice.choice(numbers) if choice.random() < 0.1 else 256 * choice.randrange(1, 2**16)

    sizes = [size() for _ in range(choice.randint(0, 4))]
    depth, budget = (None if choice.random() < 0.3 else size() for _ in range(2))

    def plan() -> object:
        units = [_C.Unit(f"u{i}", s, i // 2, "mha") for i, s in enumerate(sizes)]
        return _C.make_plan(units, depth, budget)

    fuzz.attempt("plan", (sizes, depth, budget), plan)


def _try_simulation(fuzz: Fuzz, choice: random.Random) -> None:
    """Mostly one that can be."""

    def odd(value: Any, *others: Any) -> Any:
        return choice.choice(others) if choice.random() < 0.04 else value

    passes = [[odd(choice.randrange(4), 4, 2**32 - 1) for _ in range(3)] for _ in range(2)]
    rate = odd(choice.choice((1e9, 25e9)), 0.0, -1.0, float("nan"), 1e-300, None)
    engines = odd(choice.choice((1, 2)), 0, -1, 9)
    costs_ns = [odd(choice.randrange(10**6), -1, 2**62, 10**15) for _ in range(odd(4, 0, 3, 5))]
    mode = odd(choice.choice(("pipeline", "events", "streams", "sync")), "", "x")
    streams = odd(choice.choice(("shared", "split")), "y")

    def run() -> object:
        costs = _C.SimCosts(
            copy_bytes_per_second=rate, compute_ns=costs_ns, num_copy_engines=engines
        )
        plan = reference_plan(LayerTimes(), 2)
        return _C.simulate(plan, mode, streams, costs, passes)

    fuzz.attempt("simulate", (passes, rate, engines, costs_ns, mode, streams), run)


def _try_check(fuzz: Fuzz, choice: random.Random) -> None:
    """Logs of forwards that went any way, which are right, and what is no log."""
    if choice.random() < 0.02:
        odd = choice.choice(ODD)
        fuzz.attempt("check", odd, lambda: torch_offload.check(odd))
        return
    passes = [[choice.randrange(4) for _ in range(choice.randint(1, 6))] for _ in range(2)]
    mode = choice.choice(("pipeline", "events", "streams"))

    def check() -> None:
        costs = _C.SimCosts(copy_bytes_per_second=1e9, compute_ns=[1000] * 4)
        run = _C.simulate(reference_plan(LayerTimes(), 2), mode, "split", costs, passes)
        if torch_offload.check(run.log):
            raise AssertionError("a hazard in the log of a right run")

    fuzz.attempt("check", (passes, mode), check)


class BadInput(Lane):
    """So many inputs of all kinds."""

    name = "bad input"
    tried = "mutated files, odd options, sizes, plans and command lines: typed errors, in time"
    counts = "different inputs"

    def control(self) -> Tally:
        """For each judge what it must not let through."""
        from tests.lanes.bad_input_controls import planted_in_bad_input

        with tempfile.TemporaryDirectory() as name:
            return all_caught(planted_in_bad_input(Path(name)))

    def run(self, effort: Effort) -> Tally:
        """Quick: some 2,000; full: 100,000 and more."""
        tally = Tally()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parts: list[tuple[str, int, int, Callable[[int], None]]] = [
                ("files", 1000, 62_000, lambda n: fuzz_files(tally, n, 1, folder)),
                ("sizes", 1000, 26_000, lambda n: fuzz_sizes(tally, n, 2)),
                ("calls", 300, 12_000, lambda n: fuzz_calls(tally, n, 3)),
                ("offload", 60, 2_000, lambda n: fuzz_offload(tally, n, 4, folder)),
                ("command lines", 40, 1_500, lambda n: fuzz_command_line(tally, n, 5, folder)),
                ("processes", 2, 20, lambda n: fuzz_processes(tally, n, 6, folder)),
            ]
            for number, (what, quick, full, run) in enumerate(parts, 1):
                before = tally.count
                run(effort.pick(quick, full))
                tally.figures[what] = tally.count - before
                effort.progress(number, len(parts))
        if effort.full and tally.count < _LEAST:
            tally.add_fault(f"only {tally.count:,} different inputs, expected {_LEAST:,}")
        return tally
