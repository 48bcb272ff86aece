"""`doctor`: what on this machine keeps streaming from being fast, and how to mend it."""

from __future__ import annotations

import typer
from rich.console import Console

from torch_offload.cli.output import JsonOption, check_writable, show


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: torch-offload doctor --json doctor.json")(doctor)


def doctor(json_target: JsonOption = None) -> None:
    """Look at versions, driver, GPU, link, overlap, NUMA and memory limits of this machine.

    Exit status 1 if something is off; what this machine does not let us see is said, and is no
    fault.
    """
    from torch_offload.cli import BAD_ANSWER
    from torch_offload.doctor import diagnose

    check_writable(json_target)
    with Console(stderr=True).status("looking") as status:
        found = diagnose(progress=lambda what: status.update(f"looking at {what}"))
    show(found, found.to_json(), json_target)
    raise typer.Exit(BAD_ANSWER if found.off else 0)
