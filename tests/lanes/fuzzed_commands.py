"""Command lines, by the thousand: an exit status that is documented, a line that says why, in time.

Options are those that the commands have.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import typer.main

from tests.lanes.fuzzing import Fuzz, short
from torch_offload import cli
from torch_offload.cli.app import app
from torch_offload.selfcheck.lane import Tally

_STATUSES = (0, cli.BAD_ANSWER, cli.BAD_INPUT, cli.NOT_HERE)

#: Of a refusal that is meant: ours, the parser's of options, the system's of a file.
_SIGNS = ("torch-offload: expected", "(see --help)", "torch-offload: [Errno ")


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: As it is written.
        is_flag: Whether it takes no value.
    """

    name: str
    is_flag: bool

    def a_value(self, choice: random.Random) -> str:
        """One that it may well take."""
        return choice.choice(GOOD.get(self.name, _NUMBERS))


_SIZES = ("0", "4KiB", "40GB", "2GiB")
#: Values that options take; all others take numbers.
GOOD: dict[str, tuple[str, ...]] = {
    "--mode": ("sync", "pipeline", "events", "streams", "sync,pipeline"),
    "--streams": ("shared", "split"),
    "--granularity": ("sublayer", "layer", "module", "auto"),
    "--transport": ("raw", "packed", "packed_resident", "auto"),
    "--masters": ("plain", "packed"),
    "--gpu": ("h100", "h200", "a100"),
    "--link": ("25GB/s", "64GB/s"),
    "--peak": ("989TFLOP/s",),
    "--memory-rate": ("3.35TB/s",),
    "--decode-rate": ("100GB/s",),
    "--model": ("config.json",),
    "--profile": ("profile.json",),
    "--trace": ("timeline.json",),
    "--out": ("o.txt", "o.json"),
    "--json": ("o.json",),
    "--sweep": ("batch", "depth"),
    "--device": ("cpu",),
    "--methods": ("resident",),
    "--lanes": ("none",),
    **dict.fromkeys(("--gpu-budget", "--gpu-memory", "--host-memory", "--depth"), _SIZES),
}
_NUMBERS = ("1", "2", "3", "20", "0.5")


@cache
def options_of_commands() -> dict[str, tuple[Option, ...]]:
    """The options of each command, as it has them, and of none and of one that is not there."""
    group = typer.main.get_command(app)
    commands = {**group.commands, "": group}  # type: ignore[attr-defined]
    options = {
        name: tuple(
            Option(spelt, bool(getattr(parameter, "is_flag", False)))
            for parameter in command.params
            for spelt in (*parameter.opts, *parameter.secondary_opts)
            if spelt.startswith("-")
        )
        for name, command in commands.items()
    }
    flags = tuple(Option(name, True) for name in ("--help", "-h", "--install-completion"))
    return options | {"": options[""] + flags, "nonsense": ()}


#: Without an argument that is wrong, these would run for long.
_MUST_BE_REFUSED = {
    "selfcheck": ["--lanes", "none"],
    "demo": None,
    "bench": None,
    "doctor": ["--x"],
}


def _command(choice: random.Random, folder: Path) -> list[str]:
    options = options_of_commands()
    name = choice.choice(list(options))
    values = [
        *("0", "1", "2", "3", "-1", "1e9", "nan", "inf", "", " ", "1.5", "9" * 400, "2GiB"),
        *("sync", "pipeline", "split", "shared", "module", "h100", "sync,pipeline", "batch"),
        *("cpu", "cuda:7", "meta", "\udc80", "é", "-", "--", "[red]", "{}", "/", "/nowhere/x.json"),
        *(str(folder / file) for file in ("profile.json", "timeline.json", "config.json", "o.txt")),
        str(folder),
    ]
    words = [name] if name else []
    if name == "plan" and choice.random() < 0.8:
        words.append("config.json")
    for _ in range(choice.randint(0, 3)):
        option = choice.choice(options[name]) if options[name] else None
        if option is None or choice.random() < 0.1:
            words.append(choice.choice(values))
            continue
        words.append(option.name)
        if not option.is_flag or choice.random() < 0.05:
            is_good = choice.random() < 0.75
            words.append(option.a_value(choice) if is_good else choice.choice(values))
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
    if status == cli.BAD_INPUT and not any(sign in error for sign in _SIGNS):
        return f"refused by accident: {error.strip()}"
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
    for _ in fuzz.draws(count):
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


def fuzz_processes(
    tally: Tally,
    count: int,
    seed: int,
    folder: Path,
    program: Sequence[str] = ("-m", "torch_offload"),
) -> None:
    """The same, each in a process of its own."""
    fuzz = Fuzz(tally, seed)
    _a_config(folder)
    root = Path(__file__).resolve().parents[2]
    for _ in fuzz.draws(count):
        words = [w.replace("\x00", "") for w in _command(fuzz.choice, folder)]

        def call(words: list[str] = words) -> None:
            done = subprocess.run(
                [sys.executable, *program, *words],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(root)},
                capture_output=True,
                timeout=120,
                check=False,
            )
            if fault := _ends_well(done.returncode, done.stderr.decode(errors="replace")):
                raise AssertionError(fault)

        if not fuzz.is_new("process", words):
            continue
        try:
            call()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            tally.add_fault(f"process {short(words)}: {error}")
