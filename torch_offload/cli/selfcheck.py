"""`selfcheck`: whether an order of copies and kernels can go wrong, tried on this machine."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from torch_offload.cli.output import JsonOption, check_writable, progress_bar, show, split_list


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: torch-offload selfcheck --json selfcheck.json")(selfcheck)


def selfcheck(
    full: Annotated[
        bool, typer.Option("--full", help="Try much more: half an hour and more.")
    ] = False,
    lanes: Annotated[
        str | None, typer.Option(help="Some lanes only, such as random,mutants.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="How many threads may compute; all cores if left out.")
    ] = None,
    json_target: JsonOption = None,
) -> None:
    """Check the scheduler, the checker and this machine's streams: lane by lane, in a table.

    Each lane first runs a planted fault that it must catch. One that cannot be run here is said to
    be not run, never to have passed. Exit status 1 if a lane fails.
    """
    from torch_offload.cli import BAD_ANSWER
    from torch_offload.selfcheck import Effort, all_lanes, run_lanes

    check_writable(json_target)
    cores = len(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"expected --threads between 1 and 1024, got {threads}")
    chosen = all_lanes()
    if lanes is not None:
        names = split_list(lanes, "--lanes", [lane.name for lane in chosen])
        chosen = [lane for lane in chosen if lane.name in names]
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        report = run_lanes(
            chosen,
            Effort(
                full=full,
                num_threads=threads or cores,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            ),
            starts=lambda name: progress.reset(task, description=name, total=None),
        )
    show(report, report.to_json(), json_target)
    raise typer.Exit(0 if report.is_well else BAD_ANSWER)
