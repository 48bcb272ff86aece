"""`plan`: whether and how a model fits a GPU, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torch_offload.cli import BAD_ANSWER
from torch_offload.cli.output import (
    JsonOption,
    busy,
    check_picture,
    check_writable,
    show,
    tracked,
)
from torch_offload.cli.packed import DecodeRateOption, MastersOption, TransportOption


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog="Example: torch-offload plan llama-70b/config.json --gpu-budget 20GiB --out plan.png"
    )(plan)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder with a config.json, that file, or a hub's name in the local cache.",
        ),
    ],
    gpu_budget: Annotated[
        str | None, typer.Option(help="Device memory for weights, as 20GiB.")
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="The whole device, as 24GiB: cache and activations are taken off."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 1024,
    host_memory: Annotated[
        str | None, typer.Option(help="What the host has for weights, as 64GiB.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Peaks of h100, h200, a100, l40s or rtx4090.")] = "h100",
    link: Annotated[str | None, typer.Option(help="Host-to-device rate, as 25GB/s.")] = None,
    granularity: Annotated[
        str, typer.Option(help="sublayer, layer, module, or auto for what is faster.")
    ] = "sublayer",
    transport: TransportOption = "raw",
    masters: MastersOption = "plain",
    decode_rate: DecodeRateOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where all lies, and time by budget, as a picture."),
    ] = None,
    json_target: JsonOption = None,
) -> int:
    """Say whether a model fits, where its weights would lie, and how fast it would run.

    Reads a config, loads no weights, needs no GPU. Exit status 1: the host has too little memory;
    2: no plan is possible, and the message names the least budget.
    """
    check_writable(out, json_target)
    if out is not None:
        check_picture(out)
    from torch_offload.plan_report import Planner, PlanOptions

    options = PlanOptions(
        model=model,
        gpu_budget=gpu_budget,
        gpu_memory=gpu_memory,
        batch=batch,
        tokens=tokens,
        host_memory=host_memory,
        gpu=gpu,
        link=link,
        granularity=granularity,
        transport=transport,
        masters=masters,
        decode_rate=decode_rate,
    )
    with busy("building the model without weights"):
        planner = Planner(options)
        planner.report(())  # what cannot be is said before the curve is drawn
    budgets = tracked(planner.budgets(), "planning for other budgets")
    report = planner.report([planner.fit(budget) for budget in budgets])
    show(report, report.to_json(), json_target)
    if out is not None:
        from torch_offload.timeline.plan_chart import write_plan_chart

        write_plan_chart(report, out)
        typer.echo(f"wrote {out}", err=json_target == "-")
    return 0 if report.fits else BAD_ANSWER
