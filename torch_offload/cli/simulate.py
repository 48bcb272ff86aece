"""`simulate`: the reference table, or what a model would do on a GPU that one does not own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torch_offload.cli.durations import FfnCompute, FfnH2d, MhaCompute, MhaH2d, layer_times
from torch_offload.cli.output import (
    JsonOption,
    busy,
    check_picture,
    check_writable,
    show,
    split_list,
    tracked,
)
from torch_offload.cli.packed import DecodeRateOption

if TYPE_CHECKING:
    from torch_offload.estimate import Estimate, ModelRequest
    from torch_offload.sweep import Axis, Sweep

Model = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="A folder with a config.json, or that file: no weights."),
]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog="Example: torch-offload simulate --model llama-70b/config.json --gpu h100 "
        "--gpu-budget 24GiB --batch 8 --tokens 512 --sweep budget --out sweep.png",
    )(simulate)


def simulate(
    mha_h2d: MhaH2d = None,
    mha_compute: MhaCompute = None,
    ffn_h2d: FfnH2d = None,
    ffn_compute: FfnCompute = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the table (80).")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences at once (100; with --model 1).")
    ] = None,
    model: Model = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Times from a profile, as Profile.save writes it."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each sequence in a forward (1).")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that each attends to; --tokens if not given.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Peaks of h100, h200, a100, l40s or rtx4090.")
    ] = None,
    peak: Annotated[str | None, typer.Option(help="Peak arithmetic, as 989TFLOP/s.")] = None,
    memory_rate: Annotated[str | None, typer.Option(help="Peak memory rate, as 3.35TB/s.")] = None,
    efficiency: Annotated[
        float | None, typer.Option(help="Part of both peaks that kernels reach (0.57).")
    ] = None,
    link: Annotated[str | None, typer.Option(help="Host-to-device rate, as 55GB/s.")] = None,
    gpu_budget: Annotated[
        str | None, typer.Option(help="Device memory for weights, as 24GiB.")
    ] = None,
    depth: Annotated[str | None, typer.Option(help="Bytes that copies run ahead.")] = None,
    granularity: Annotated[
        str | None, typer.Option(help="sublayer, layer or module (sublayer).")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="sync, streams, events or pipeline (pipeline).")
    ] = None,
    streams: Annotated[str, typer.Option(help="Stream layout: shared or split.")] = "shared",
    transport: Annotated[
        str | None, typer.Option(help="raw, packed, or auto: packed units where faster (raw).")
    ] = None,
    decode_rate: DecodeRateOption = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="AXES", help="Some of depth,layout,budget.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chart of the sweeps: .png, .svg, .pdf.")
    ] = None,
    json_target: JsonOption = None,
) -> None:
    """Run the real scheduler in virtual time.

    With durations: the published figures of the reference design, recomputed, beside ours. With
    --model or --profile: what a forward takes, what bounds it, and how that changes.
    """
    check_writable(out, json_target)
    durations = (mha_h2d, mha_compute, ffn_h2d, ffn_compute)
    if model is None and profile is None:
        given = {
            "--sweep": sweep, "--out": out, "--gpu": gpu, "--gpu-budget": gpu_budget,
            "--link": link, "--depth": depth, "--peak": peak, "--context": context,
            "--memory-rate": memory_rate, "--efficiency": efficiency,
            "--decode-rate": decode_rate, "--transport": transport, "--tokens": tokens,
            "--granularity": granularity, "--mode": mode,
        }  # fmt: skip
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"expected --model or --profile beside {wrong[0]}, got neither")
        from torch_offload.reference_table import reference_table

        with busy("simulating the layers"):
            table = reference_table(
                layer_times(*durations),
                80 if layers is None else layers,
                100 if batch is None else batch,
                streams,
            )
        show(table, table.to_json(), json_target)
        return
    if layers is not None or any(value is not None for value in durations):
        raise ValueError(
            "expected either durations and --layers, or --model and --profile, got both"
        )
    from torch_offload.estimate import ModelRequest

    request = ModelRequest(
        model=model,
        profile=profile,
        batch=batch,
        tokens=tokens,
        context=context,
        gpu=gpu,
        peak=peak,
        memory_rate=memory_rate,
        efficiency=efficiency,
        link=link,
        gpu_budget=gpu_budget,
        depth=depth,
        granularity=granularity,
        mode=mode,
        streams=streams,
        transport=transport,
        decode_rate=decode_rate,
    )
    _estimate(request, sweep, out, json_target)


def _estimate(
    request: ModelRequest, sweep: str | None, out: Path | None, json_target: str | None
) -> None:
    from torch_offload.estimate import estimate
    from torch_offload.sweep import AXES

    axes: list[Axis] = list(AXES) if out is not None else []
    if sweep is not None:
        names = split_list(sweep, "--sweep", AXES)
        axes = [axis for axis in AXES if axis in names]
    if out is not None:
        check_picture(out)
    with busy("building the model and simulating a forward"):
        found = estimate(request)
    sweeps = [_swept(axis, found) for axis in axes]
    document = {**found.to_json(), "sweeps": {s.axis: s.to_json() for s in sweeps}}
    from rich.console import Group

    show(Group(found, *sweeps), document, json_target)
    if out is not None:
        from torch_offload.timeline.chart import write_chart

        write_chart(sweeps, found.title, out)
        typer.echo(f"wrote {out}", err=json_target == "-")


def _swept(axis: Axis, found: Estimate) -> Sweep:
    from torch_offload.sweep import scenarios_along, sweep_along

    points = scenarios_along(axis, found.prediction.scenario)
    return sweep_along(axis, tracked(points, f"sweep over {axis}"))
