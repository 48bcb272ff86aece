"""`demo` and `bench`: the repository's own scripts, where they are there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from torch_offload.cli.output import NotHereError

_ROOT = Path(__file__).resolve().parents[2]
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(
        epilog="Example: torch-offload demo --device cpu --stand-in",
        context_settings=_PASS_ON,
    )(demo)
    app.command(
        epilog="Example: torch-offload bench benchmarks/bench_yardstick.py --tiny",
        context_settings=_PASS_ON,
    )(bench)


def demo(
    context: typer.Context,
    device: Annotated[str | None, typer.Option(help="Where to compute: cuda or cpu.")] = None,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Random weights instead of trained ones.")
    ] = False,
) -> None:
    """Run two real models, plain and streamed, and compare them bit by bit."""
    script = _in_the_repository("examples/demo.py")
    arguments = [*(["--device", device] if device else []), *(["--stand-in"] if stand_in else [])]
    raise typer.Exit(_run([str(script), *arguments, *context.args]))


def bench(context: typer.Context) -> None:
    """Run the benchmarks, tiny where there is no GPU; all arguments go to pytest."""
    folder = _in_the_repository("benchmarks")
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise NotHereError(
                f"bench needs {package}, which is not installed; run `pip install "
                f"{package.replace('_', '-')}`"
            )
    chosen = [argument for argument in context.args if not argument.startswith("-")]
    default = [] if any("bench" in argument for argument in chosen) else [str(folder)]
    raise typer.Exit(_run(["-m", "pytest", *default, *context.args]))


def _in_the_repository(path: str) -> Path:
    found = _ROOT / path
    if not found.exists():
        raise NotHereError(
            f"{path} belongs to the repository, not to the installed package; run this command in "
            "a clone after `make build`"
        )
    return found


def _run(arguments: list[str]) -> int:
    return subprocess.run([sys.executable, *arguments], cwd=_ROOT, check=False).returncode
