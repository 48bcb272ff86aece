"""Bad input, by the ten thousand: files, options, sizes, command lines.

Each must be taken or refused by an error of the right type that says something, in time. From the
command line: an exit status, and no traceback. Good input is mutated, so that most of it is almost
right; the rest is drawn from what breaks parsers.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import torch_offload
from torch_offload import _C, cli
from torch_offload.profile_file import profile_to_json, read_profile
from torch_offload.reference import LayerTimes
from torch_offload.selfcheck.lane import Effort, Lane, Tally
from torch_offload.selfcheck.subjects import Stack
from torch_offload.simulate import reference_plan, run_layers
from torch_offload.sizes import parse_size
from torch_offload.timeline import read_traces, write_timeline

HOST = torch.device("cpu")
#: What may be raised, besides being taken.
REFUSALS = (
    ValueError,
    TypeError,
    IndexError,
    OSError,
    MemoryError,
    NotImplementedError,
    torch_offload.StateError,
)
_SECONDS = 20
_STATUSES = (0, cli.BAD_ANSWER, cli.BAD_INPUT, cli.NOT_HERE)

_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3.5,
    -0.0,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e308,
    5e-324,
    2**31,
    2**62,
    2**63,
    2**64,
    -(2**63),
    10**400,
    "",
    " ",
    "0",
    "-1",
    "1e9",
    "nan",
    "inf",
    "2GiB",
    "9" * 400,
    "9" * 400 + "GiB",
    "1.5.5GiB",
    "auto",
    "pipeline",
    "sync",
    "split",
    "shared",
    "module",
    "*",
    "blocks.*",
    "[",
    "\x00",
    "\udc80",
    "é\u202e",
    "%s{0}",
    "[bold]",
    "x" * 5000,
    b"bytes",
    [],
    [None],
    [[]],
    ["blocks.0"],
    ["*"],
    {},
    {"a": 1},
    (),
    object,
)
_PLAIN = tuple(
    v for v in _ODD if v is None or isinstance(v, bool | int | float | str | list | dict)
)


class _Hang(BaseException):
    """Something has taken too long."""


@contextmanager
def _in_time() -> Iterator[None]:
    def strike(signum: int, frame: FrameType | None) -> None:
        raise _Hang

    former = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _short(what: object) -> str:
    text = ascii(what)
    return text if len(text) < 200 else text[:200] + "..."


def mutated_document(choice: random.Random, document: Any) -> Any:
    """Plain data with a few places changed, dropped, doubled or exchanged."""
    document = copy.deepcopy(document)
    for _ in range(choice.randint(1, 3)):
        node, keys = document, []
        while isinstance(node, dict | list) and node:
            key = choice.choice(list(node) if isinstance(node, dict) else range(len(node)))
            keys.append((node, key))
            node = node[key]
            if choice.random() < 0.2:
                break
        if not keys:
            return choice.choice(_PLAIN)
        holder, key = keys[-1]
        action = choice.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == 2 and isinstance(holder[key], int | float) and abs(holder[key]) < 2**64:
            holder[key] = holder[key] * choice.choice([-1, 0, 2, 1e9, 1e300])
        else:
            holder[key] = copy.deepcopy(choice.choice(_PLAIN))
    return document


def mutated_bytes(choice: random.Random, text: bytes) -> bytes:
    """A file with a few bytes changed, cut off, or repeated."""
    data = bytearray(text)
    for _ in range(choice.randint(1, 4)):
        if not data:
            break
        at = choice.randrange(len(data))
        action = choice.randrange(5)
        if action == 0:
            data[at] = choice.randrange(256)
        elif action == 1:
            del data[at:]
        elif action == 2:
            data[at:at] = data[at : at + choice.randint(1, 20)]
        elif action == 3:
            del data[at : at + choice.randint(1, 20)]
        else:
            data[at:at] = choice.choice([b"[" * 3000, b"{", b'"', b"\x00", b"\xff", b"9" * 500])
    return bytes(data)


class Fuzz:
    """One kind of input: draws, tries, and tells of what should not be."""

    def __init__(self, tally: Tally, seed: int) -> None:
        self.tally = tally
        self.choice = random.Random(seed)

    def attempt(self, what: str, given: object, call: Callable[[], object]) -> bool:
        """Calls. Returns whether the input was taken."""
        self.tally.count += 1
        taken = self.tally.figures.setdefault("taken", {})
        refused = self.tally.figures.setdefault("refused", {})
        try:
            with _in_time():
                call()
        except REFUSALS as error:
            refused[what] = refused.get(what, 0) + 1
            if not str(error).strip():
                self.tally.add_fault(f"{what} of {_short(given)}: a silent {type(error).__name__}")
            return False
        except _Hang:
            self.tally.add_fault(f"{what} of {_short(given)}: hangs for {_SECONDS} s")
            return False
        except Exception as error:
            self.tally.add_fault(
                f"{what} of {_short(given)}: {type(error).__name__}: {_short(str(error))}"
            )
            return False
        taken[what] = taken.get(what, 0) + 1
        return True


def _a_profile() -> Any:
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
        ("profile", _a_profile(), read_profile),
        ("timeline", _a_timeline(folder), read_traces),
    ]
    texts = [json.dumps(document).encode() for _, document, _ in sources]
    for number in range(count):
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
    for number in range(count):
        if number % 2:
            value: Any = "".join(fuzz.choice.choices(letters, k=fuzz.choice.randint(0, 12)))
            if fuzz.choice.random() < 0.3:
                value = fuzz.choice.choice(_ODD)
            fuzz.attempt("size", value, lambda value=value: parse_size(value, "depth"))  # type: ignore[misc]
        else:
            chosen = fuzz.choice.sample(fields, fuzz.choice.randint(1, 3))
            options = {name: fuzz.choice.choice(_ODD) for name in chosen}
            fuzz.attempt("config", options, lambda o=options: torch_offload.Config(**o))  # type: ignore[misc]


def fuzz_offload(tally: Tally, count: int, seed: int) -> None:
    """Options of `offload`, on a model that must be what it was, or work."""
    fuzz = Fuzz(tally, seed)
    torch.manual_seed(seed)
    model: Any = torch_offload.align(Stack(2, 8).eval())
    plain = copy.deepcopy(model)
    x = torch.randn(2, 8)
    names = [name for name, _ in model.named_modules()] + ["blocks.*", "*.attn", "*", "blocks.9"]
    good: dict[str, tuple[Any, ...]] = {
        "mode": ("pipeline", "sync", "events", "streams"),
        "streams": ("shared", "split"),
        "granularity": ("sublayer", "layer", "module", "auto"),
        "depth": (0, "1KiB", None, 10**9),
        "gpu_budget": (None, 5000, "4KiB", 0.5, "50%", 10**6),
        "headroom": (0, "1KiB"),
        "on_oom": ("raise", "shrink"),
        "debug": (False, True),
    }
    must = plain(x)
    for _ in range(count):
        options: dict[str, Any] = {}
        for name in fuzz.choice.sample(list(good), fuzz.choice.randint(1, 4)):
            odd = fuzz.choice.random() < 0.25
            options[name] = fuzz.choice.choice(_ODD if odd else good[name])
        for name in ("units", "resident"):
            if fuzz.choice.random() < 0.3:
                items = fuzz.choice.choices([*names, model.blocks[0], *_ODD], k=2)
                options[name] = items if fuzz.choice.random() < 0.7 else fuzz.choice.choice(_ODD)

        def call(options: dict[str, Any] = options) -> None:
            with torch_offload.offload(model, HOST, **options) as handle:
                if not torch.equal(model(x), must):
                    raise AssertionError("the outputs differ")
                handle.describe(fuzz.choice.choice([0, "attn", -1, 10**9, "blocks.0.mlp"]))

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fuzz.attempt("offload", options, call)
            if torch_offload.handle_of(model) is not None or not torch.equal(model(x), must):
                tally.add_fault(f"offload of {_short(options)}: the model is not what it was")
                return


def fuzz_calls(tally: Tally, count: int, seed: int) -> None:
    """Plans, simulations and the checker, with numbers that cannot be."""
    fuzz = Fuzz(tally, seed)
    numbers = (0, 1, 2, 255, 256, 2**20, 2**40, 2**62, 2**63, -1, 2**64, 0.5, "a", None)
    for number in range(count):
        pick = fuzz.choice.choice
        if number % 3 == 0:
            sizes = [pick(numbers) for _ in range(fuzz.choice.randint(0, 4))]
            depth, budget = pick(numbers), pick(numbers)

            def plan(sizes: Any = sizes, depth: Any = depth, budget: Any = budget) -> object:
                units = [_C.Unit(f"u{i}", s, i // 2, "mha") for i, s in enumerate(sizes)]
                return _C.make_plan(units, depth, budget)

            fuzz.attempt("plan", (sizes, depth, budget), plan)
        elif number % 3 == 1:
            passes = [[pick((0, 1, 2, 3, 4, 2**32 - 1)) for _ in range(3)] for _ in range(2)]
            rate, engines = pick((1e9, 0.0, -1.0, float("nan"), 1e-300, None)), pick((1, 0, -1, 9))
            costs_ns = [pick((0, 1000, -1, 2**62, 10**15)) for _ in range(4)]

            def run(p: Any = passes, r: Any = rate, e: Any = engines, c: Any = costs_ns) -> object:
                costs = _C.SimCosts(copy_bytes_per_second=r, compute_ns=c, num_copy_engines=e)
                return _C.simulate(reference_plan(LayerTimes(), 2), "pipeline", "split", costs, p)

            fuzz.attempt("simulate", (passes, rate, engines, costs_ns), run)
        else:
            log = pick([*_ODD, _C.OpLog()])
            fuzz.attempt("check", log, lambda log=log: torch_offload.check(log))  # type: ignore[misc]


_OPTIONS: dict[str, tuple[str, ...]] = {
    "simulate": (
        *("--mha-h2d", "--mha-compute", "--ffn-h2d", "--ffn-compute", "--layers", "--batch"),
        *("--model", "--profile", "--tokens", "--context", "--gpu", "--link", "--gpu-budget"),
        *("--depth", "--granularity", "--mode", "--streams", "--sweep", "--out", "--json"),
    ),
    "timeline": (
        *("--mode", "--compare", "--layers", "--passes", "--streams", "--ahead"),
        *("--copy-engines", "--mha-h2d", "--trace", "--from-ms", "--to-ms", "--out"),
    ),
    "plan": ("--gpu-budget", "--gpu-memory", "--batch", "--tokens", "--gpu", "--link", "--json"),
    "compare": ("--device", "--batch", "--tokens", "--rounds", "--methods", "--gpu-budget"),
    "selfcheck": ("--lanes", "--threads"),
    "doctor": ("--json",),
    "demo": (),
    "bench": (),
    "": ("--version", "--help", "-h", "--install-completion"),
    "nonsense": (),
}
#: Without an argument that is wrong, these would run for long.
_MUST_BE_REFUSED = {
    "selfcheck": ["--lanes", "none"],
    "demo": None,
    "bench": None,
    "doctor": ["--x"],
}


def _command(choice: random.Random, folder: Path) -> list[str]:
    name = choice.choice(list(_OPTIONS))
    values = [
        *("0", "1", "2", "3", "-1", "1e9", "nan", "inf", "", " ", "1.5", "9" * 400, "2GiB"),
        *("sync", "pipeline", "split", "shared", "module", "h100", "sync,pipeline", "batch"),
        *("cpu", "cuda:7", "meta", "\udc80", "é", "-", "--", "[red]", "{}", "/", "/nowhere/x.json"),
        *(str(folder / file) for file in ("profile.json", "timeline.json", "config.json", "o.txt")),
        str(folder),
    ]
    words = [name] if name else []
    for _ in range(choice.randint(0, 3)):
        if _OPTIONS[name] and choice.random() < 0.85:
            words.append(choice.choice(_OPTIONS[name]))
        if choice.random() < 0.85:
            words.append(choice.choice(values))
    forced = _MUST_BE_REFUSED.get(name, [])
    if forced is None:
        return [name, "--help"]
    return words + forced


def _ends_well(status: int, error: str) -> str:
    if status not in _STATUSES:
        return f"exit status {status}"
    if "Traceback" in error:
        return "a traceback"
    if status == cli.BAD_INPUT and not error.strip():
        return "refused without a word"
    if "shows where" in error:
        return error.strip()
    return ""


def _a_config(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 64,
                "dtype": "float32",
            }
        )
    )


def fuzz_command_line(tally: Tally, count: int, seed: int, folder: Path) -> None:
    """All subcommands, in this process."""
    fuzz = Fuzz(tally, seed)
    _a_config(folder)
    for _ in range(count):
        words = _command(fuzz.choice, folder)
        error = io.StringIO()

        def call(words: list[str] = words, error: io.StringIO = error) -> None:
            with redirect_stderr(error), redirect_stdout(io.StringIO()):
                status = cli.main(words)
            if fault := _ends_well(status, error.getvalue()):
                raise AssertionError(fault)

        before = os.getcwd()
        os.chdir(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fuzz.attempt("command line", words, call)
        finally:
            os.chdir(before)


def fuzz_processes(tally: Tally, count: int, seed: int, folder: Path) -> None:
    """The same, each in a process of its own."""
    fuzz = Fuzz(tally, seed)
    _a_config(folder)
    root = Path(__file__).resolve().parents[2]
    for _ in range(count):
        words = [w.replace("\x00", "") for w in _command(fuzz.choice, folder)]

        def call(words: list[str] = words) -> None:
            done = subprocess.run(
                [sys.executable, "-m", "torch_offload", *words],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(root)},
                capture_output=True,
                timeout=120,
                check=False,
            )
            if fault := _ends_well(done.returncode, done.stderr.decode(errors="replace")):
                raise AssertionError(fault)

        tally.count += 1
        try:
            call()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            tally.add_fault(f"process {_short(words)}: {error}")


class BadInput(Lane):
    """So many inputs of all kinds."""

    name = "bad input"
    tried = "mutated files, odd options, sizes, plans and command lines: typed errors, in time"
    counts = "inputs"

    def control(self) -> Tally:
        """A reader that trusts its file."""
        tally = Tally()
        fuzz = Fuzz(tally, 5)
        document = _a_profile()
        for _ in range(200):
            changed = mutated_document(fuzz.choice, document)
            fuzz.attempt("profile", changed, lambda c=changed: c["units"][0]["times"].keys())  # type: ignore[misc]
        return tally

    def run(self, effort: Effort) -> Tally:
        """Quick: some 2,000; full: 100,000 and more."""
        tally = Tally()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parts: list[tuple[str, int, int, Callable[[int], None]]] = [
                ("files", 1000, 60_000, lambda n: fuzz_files(tally, n, 1, folder)),
                ("sizes", 1000, 25_000, lambda n: fuzz_sizes(tally, n, 2)),
                ("calls", 300, 12_000, lambda n: fuzz_calls(tally, n, 3)),
                ("offload", 60, 2_000, lambda n: fuzz_offload(tally, n, 4)),
                ("command lines", 40, 1_500, lambda n: fuzz_command_line(tally, n, 5, folder)),
                ("processes", 0, 20, lambda n: fuzz_processes(tally, n, 6, folder)),
            ]
            for number, (what, quick, full, run) in enumerate(parts, 1):
                before = tally.count
                run(effort.pick(quick, full))
                tally.figures[what] = tally.count - before
                effort.progress(number, len(parts))
        return tally
