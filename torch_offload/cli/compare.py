"""`compare`: one model plain, streamed and under accelerate, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from torch_offload.cli.output import (
    JsonOption,
    NotHereError,
    busy,
    check_writable,
    show,
    split_list,
    tracked,
)
from torch_offload.cli.packed import TransportOption


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog="Example: torch-offload compare ./Llama-3.1-8B --tokens 512 --gpu-budget 8GiB",
    )(compare)


def compare(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder, or a config.json: random weights.")
    ],
    device: Annotated[str | None, typer.Option(help="Where to compute; the GPU if any.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 16,
    rounds: Annotated[int, typer.Option(help="Timed forwards of each method.")] = 3,
    methods: Annotated[
        str, typer.Option(help="Some of plain,sync,pipeline,accelerate.")
    ] = "plain,sync,pipeline,accelerate",
    gpu_budget: Annotated[str | None, typer.Option(help="As offload(gpu_budget=).")] = None,
    depth: Annotated[str | None, typer.Option(help="As offload(depth=).")] = None,
    granularity: Annotated[str, typer.Option(help="As offload(granularity=).")] = "sublayer",
    transport: TransportOption = "raw",
    json_target: JsonOption = None,
) -> None:
    """Run a model plain (if it fits), streamed by sync and pipeline, and under accelerate.

    Exit status 1 if any output differs by a bit, or if nothing was streamed.
    """
    from torch_offload import comparison, model_files
    from torch_offload.cli import BAD_ANSWER

    check_writable(json_target)
    for name, value in (("batch", batch), ("tokens", tokens), ("rounds", rounds)):
        if not 1 <= value <= 1_000_000:
            raise ValueError(f"expected --{name} between 1 and 1,000,000, got {value}")
    names = split_list(methods, "--methods", comparison.METHODS)
    target = _device(device)
    with busy(f"loading {model}"):
        loaded = model_files.load_model(model)
    options: dict[str, Any] = {
        "gpu_budget": gpu_budget,
        "depth": depth,
        "granularity": granularity,
        "transport": transport,
    }
    found = comparison.compare(
        loaded,
        target,
        batch=batch,
        tokens=tokens,
        rounds=rounds,
        options=options,
        methods=tracked(names, "forwards"),
    )
    show(found, found.to_json(), json_target)
    raise typer.Exit(0 if found.is_well else BAD_ANSWER)


def _device(name: str | None) -> Any:
    import torch

    from torch_offload.devices import resolve_device

    try:
        wanted = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"expected --device cuda or cpu, got {name!r}") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise NotHereError(
            f"expected a GPU for --device {name}, got a machine where torch sees none; leave "
            "--device out, or say cpu"
        )
    return resolve_device(wanted)
