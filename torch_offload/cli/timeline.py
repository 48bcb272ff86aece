"""`timeline`: a simulated run, or a recorded one, as text, picture or Perfetto trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from torch_offload.cli.durations import FfnCompute, FfnH2d, MhaCompute, MhaH2d, layer_times
from torch_offload.cli.output import check_writable, split_list

if TYPE_CHECKING:
    from torch_offload.reference import LayerTimes
    from torch_offload.trace import Trace


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        epilog="Example: torch-offload timeline --compare sync,pipeline --layers 2 --out t.png",
    )(timeline)


def timeline(
    mode: Annotated[str, typer.Option(help="sync, streams, events or pipeline.")] = "pipeline",
    compare: Annotated[
        str | None,
        typer.Option(metavar="MODES", help="Several modes above each other, as sync,pipeline."),
    ] = None,
    layers: Annotated[int, typer.Option(help="How many layers.")] = 2,
    passes: Annotated[int, typer.Option(help="How many forwards, one after the other.")] = 1,
    streams: Annotated[str, typer.Option(help="Stream layout: shared or split.")] = "shared",
    ahead: Annotated[
        float | None, typer.Option(help="How many layers copies run ahead (1).")
    ] = None,
    copy_engines: Annotated[int, typer.Option(help="How many copies can run at once.")] = 1,
    mha_h2d: MhaH2d = None,
    mha_compute: MhaCompute = None,
    ffn_h2d: FfnH2d = None,
    ffn_compute: FfnCompute = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            "--trace", metavar="FILE", help="A timeline saved as .json, instead of a simulation."
        ),
    ] = None,
    from_ms: Annotated[float, typer.Option(help="Leave out what was before.")] = 0.0,
    to_ms: Annotated[float | None, typer.Option(help="Leave out what comes behind.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .png, .svg, .pdf, .json or .txt; else the terminal."),
    ] = None,
) -> None:
    """Draw the CPU and every stream: copies, computes, waits, and the events between them.

    Without --trace a layer of the given durations is simulated with the real scheduler, and each
    call costs the CPU what it does in the reference.
    """
    from torch_offload.timeline import check_suffix, read_traces, text_of, write_timeline

    if out is not None:
        check_suffix(out)
        check_writable(out)
    if trace:
        traces = [found for path in trace for found in read_traces(path)]
        if not traces:
            raise ValueError(f"expected at least one run in {trace[0]}, got an empty file")
    else:
        options = {
            "layers": layers,
            "passes": passes,
            "ahead": ahead,
            "num_copy_engines": copy_engines,
        }
        times = layer_times(mha_h2d, mha_compute, ffn_h2d, ffn_compute)
        modes = [mode] if compare is None else _modes(compare)
        traces = _simulated(times, modes, streams, options)
    traces = _cut(traces, from_ms, to_ms)
    if out is None:
        console = Console()
        console.print(text_of(traces, console.width))
    else:
        write_timeline(traces, out)
        typer.echo(f"wrote {out}")


def _modes(compare: str) -> list[str]:
    from torch_offload.simulate import MODES

    return split_list(compare, "--compare", MODES)


def _simulated(
    times: LayerTimes,
    modes: list[str],
    streams: str,
    options: dict[str, Any],
) -> list[Trace]:
    from torch_offload.reference import CallCosts
    from torch_offload.simulate import run_layers, streams_for

    for name, most in (("layers", 2000), ("passes", 100), ("num_copy_engines", 100)):
        if not 1 <= options[name] <= most:
            option = name.removeprefix("num_").replace("_", "-")
            raise ValueError(f"expected --{option} between 1 and {most}, got {options[name]}")
    if options["ahead"] is not None and not 0 <= options["ahead"] <= 1e6:
        raise ValueError(f"expected --ahead between 0 and 1e6 layers, got {options['ahead']}")
    traces = []
    for mode in modes:
        run = run_layers(
            times,
            mode=mode,
            streams=streams if len(modes) == 1 else streams_for(mode, streams),
            calls=CallCosts(),
            **options,
        )
        traces.append(run.trace())
    return traces


def _cut(traces: list[Trace], from_ms: float, to_ms: float | None) -> list[Trace]:
    longest_ms = max(trace.end_ns for trace in traces) / 1e6
    last_ms = longest_ms if to_ms is None else to_ms
    if not 0 <= from_ms < last_ms <= 1e12 or from_ms >= longest_ms:
        raise ValueError(
            f"expected --from-ms before --to-ms, both within the {longest_ms:.3f} ms of the run, "
            f"got {from_ms:g} and {last_ms:g}"
        )
    if from_ms == 0 and to_ms is None:
        return traces
    return [trace.between(round(from_ms * 1e6), round(last_ms * 1e6)) for trace in traces]
