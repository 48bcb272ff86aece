#!/usr/bin/env python3
"""Draws the pictures of README and docs into docs/figures.

    tools/figures.py [RESULTS]        RESULTS: a folder of benchmark results (benchmarks/results)

The pictures of the reference come from the simulator. Those of a real GPU come from the timelines
that `benchmarks/bench_layer.py` and `bench_packed.py` have recorded, where there are any; otherwise
they are left alone. `--host` records that of packed units on the host device instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from torch_offload.estimate import ModelRequest, estimate  # noqa: E402  (the path comes first)
from torch_offload.plan_report import Planner, PlanOptions  # noqa: E402
from torch_offload.reference import CallCosts, LayerTimes  # noqa: E402
from torch_offload.simulate import MODES, run_layers  # noqa: E402
from torch_offload.sweep import AXES, scenarios_along, sweep_along  # noqa: E402
from torch_offload.timeline import read_traces, write_timeline  # noqa: E402
from torch_offload.timeline.chart import write_chart  # noqa: E402
from torch_offload.timeline.plan_chart import write_plan_chart  # noqa: E402
from torch_offload.trace import Trace  # noqa: E402

FIGURES = _ROOT / "docs" / "figures"
RECORDED = "timeline.trace.json"
PACKED = "packed.trace.json"
_HOST_RUNS = 8

_REFERENCE = LayerTimes()
# Copies of a layer take twice as long as computing it.
_LINK_BOUND = LayerTimes(mha_h2d_ms=6, mha_compute_ms=4, ffn_h2d_ms=24, ffn_compute_ms=11)
# Copying and computing take as long, but a short compute meets a long copy.
_EVEN = LayerTimes(mha_h2d_ms=6, mha_compute_ms=18, ffn_h2d_ms=24, ffn_compute_ms=12)
_LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


def _layers(times: LayerTimes, layers: int, mode: str, title: str = "", **options: object) -> Trace:
    run = run_layers(times, layers, mode=mode, calls=CallCosts(), **options)  # type: ignore[arg-type]
    return run.trace(title)


def _steady(trace: Trace, layers: int) -> Trace:
    """A few layers from the middle of the last forward, from the first compute of the first."""
    first = max(0, len(trace.unit_names) // 4 - layers // 2)
    starts, ends = (
        [bar.begin_ns for bar in trace.of_kind("compute") if bar.unit == 2 * layer]
        for layer in (first, first + layers)
    )
    return trace.between(starts[-1], ends[-1] if ends else trace.end_ns)


def reference_figures() -> None:
    """What needs no GPU."""
    write_timeline(
        [_layers(_REFERENCE, 2, mode) for mode in MODES],
        FIGURES / "reference-modes.png",
    )
    write_timeline(
        [_layers(_REFERENCE, 2, "pipeline", "a window of one layer", streams="split", ahead=0)],
        FIGURES / "reference-split.png",
    )
    write_timeline(
        [_steady(_layers(_LINK_BOUND, 8, "pipeline", "bound by the link"), 3)],
        FIGURES / "bound-by-link.png",
    )
    write_timeline(
        [
            _steady(_layers(_EVEN, 12, "pipeline", title, ahead=ahead), 3)
            for title, ahead in (("bound by order, depth=0", 0), ("the default depth", None))
        ],
        FIGURES / "bound-by-order.png",
    )
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(_LLAMA_70B))
        found = estimate(ModelRequest(model=config, gpu="h100", batch=8, tokens=512))
        planner = Planner(PlanOptions(model=str(config), gpu_budget="24GiB", batch=8))
        report = planner.report([planner.fit(budget) for budget in planner.budgets()])
    sweeps = [sweep_along(axis, scenarios_along(axis, found.prediction.scenario)) for axis in AXES]
    write_chart(sweeps, f"predicted: {found.title}, H100", FIGURES / "sweep-70b.png")
    write_plan_chart(report, FIGURES / "plan-70b.png")


def recorded_figures(results: Path) -> bool:
    """What a GPU has recorded; says whether there was anything."""
    path = results / RECORDED
    if not path.is_file():
        return False
    traces = [_steady(trace, 2) for trace in read_traces(path)]
    write_timeline(traces, FIGURES / "gpu-sync-pipeline.png")
    return True


def host_traces() -> list[Trace]:
    """Packed units on the host device, where copies are faster than decoders; the quietest run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import torch_offload

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (2, 128))
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    traces = []
    for transport, title in (
        ("packed", "host device, units travel packed"),
        ("packed_resident", "host device, they stay packed"),
    ):
        with (
            torch_offload.offload(model, "cpu", transport=transport) as handle,
            torch.inference_mode(),
        ):
            runs = []
            for _ in range(_HOST_RUNS):
                with handle.record(times=True):
                    model(tokens)
                    model(tokens)
                runs.append(handle.trace(title))
        traces.append(min(runs, key=lambda run: _steady(run, 2).end_ns))
    return traces


def packed_figure(traces: Sequence[Trace]) -> None:
    """Copy, decoder and kernels of packed units, two layers of each run."""
    write_timeline([_steady(trace, 2) for trace in traces], FIGURES / "packed-timeline.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws the pictures of README and docs.")
    parser.add_argument("results", nargs="?", type=Path, default=_ROOT / "benchmarks" / "results")
    parser.add_argument("--host", action="store_true", help="packed units on the host device only")
    options = parser.parse_args(arguments)
    results = options.results
    FIGURES.mkdir(parents=True, exist_ok=True)
    if options.host:
        packed_figure(host_traces())
        print("drew packed units on the host device")
        return
    reference_figures()
    print(f"drew the reference figures into {FIGURES.relative_to(_ROOT)}")
    drawn = recorded_figures(results)
    if (results / PACKED).is_file():
        packed_figure(read_traces(results / PACKED))
        drawn = True
    if drawn:
        print("drew the recorded GPU runs")
    else:
        print(f"no recorded GPU run: {RECORDED} is not in the results folder, pictures kept as is")


if __name__ == "__main__":
    main()
