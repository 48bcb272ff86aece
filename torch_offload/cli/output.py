"""What commands print, and where: tables for people, JSON for scripts, progress on the side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

Item = TypeVar("Item")

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Also write the result as JSON; - prints only it."),
]


class NotHereError(RuntimeError):
    """Something that the command needs is not on this machine."""


def show(table: RenderableType, document: Any, json_target: str | None) -> None:
    """Prints a table, and writes the same as JSON where that was asked for.

    Raises:
        OSError: If the file cannot be written.
    """
    if json_target == "-":
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
        return
    if json_target is not None:
        Path(json_target).write_text(json.dumps(document, indent=1) + "\n")
    Console().print(table)


def check_writable(*paths: str | Path | None) -> None:
    """Makes sure that files can be written before anything that takes long is run.

    Raises:
        OSError: If the folder of one is not there.
    """
    for path in paths:
        if path is not None and str(path) != "-" and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(
                f"expected a file in a folder that exists, got {str(path)!r}; make the folder first"
            )


def check_picture(out: Path) -> None:
    """Makes sure that a name is one of a picture.

    Raises:
        ValueError: If it is not.
    """
    from torch_offload.timeline.picture import picture_suffixes

    suffixes = picture_suffixes()
    if suffixes and out.suffix.lower() not in suffixes:
        raise ValueError(f"expected --out as a picture, such as sweep.png, got {str(out)!r}")


def progress_bar() -> Progress:
    """A bar on standard error, which is gone afterwards."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def tracked(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Goes through items with a bar on standard error, which is gone afterwards."""
    with progress_bar() as progress:
        yield from progress.track(items, description=what)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Shows that something takes its time, on standard error."""
    with Console(stderr=True).status(what):
        yield


def split_list(text: str, what: str, allowed: Iterable[str]) -> list[str]:
    """Returns the names in ``"a,b"``.

    Raises:
        ValueError: If one is not allowed, or there is none.
    """
    allowed = list(allowed)
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in allowed]
    if wrong or not names:
        got = ", ".join(map(repr, wrong)) if wrong else "nothing"
        raise ValueError(f"expected {what} to list some of {', '.join(allowed)}, got {got}")
    return names
