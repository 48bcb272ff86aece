"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from torch_offload.cli import compare, doctor, plan, scripts, selfcheck, simulate, timeline

app = typer.Typer(
    name="torch-offload",
    help="Streams the weights of a transformer from host memory while the GPU computes.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from torch_offload._version import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


scripts.register(app)
plan.register(app)
simulate.register(app)
timeline.register(app)
compare.register(app)
doctor.register(app)
selfcheck.register(app)
