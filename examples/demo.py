"""Runs real models plain and streamed, and says that the outputs are equal to the last bit.

    python examples/demo.py [--device cuda|cpu] [--stand-in]

MiniLM embeds a few sentences, Gemma continues a prompt; each runs plain, with ``mode="sync"`` and
with ``mode="pipeline"``, on the GPU where there is one, else on the host device. The exit status is
1 if an output differs by a bit or if nothing was streamed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# An installed package comes first; else the tree that `make build` has built in place.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from real_models import (
    DataPackageMissingError,
    RealModel,
    gemma_is_cached,
    load_gemma,
    load_minilm,
    load_stand_in,
)
from rich import box
from rich.console import Console
from rich.table import Table

import torch_offload

SENTENCES = (
    "The cat sleeps in the sun.",
    "A kitten naps on the sill.",
    "Interest rates were raised.",
    "The central bank acted.",
    "He baked sourdough bread.",
    "A loaf came from the oven.",
)
PROMPT = "Photosynthesis is the process by which"
NEW_TOKENS = 10
EMBEDDINGS = 8  # forwards
MODES = ("sync", "pipeline")


@dataclass(frozen=True)
class Task:
    """What one model does, again and again.

    Attributes:
        loaded: The model.
        work: Does it once; returns the tensors to compare.
        warm_up: One forward of it, before anything is timed.
        forwards: Forwards of one `work()`.
        repeats: How often it is timed.
        show: Says what came out, for people.
    """

    loaded: RealModel
    work: Callable[[], tuple[torch.Tensor, ...]]
    warm_up: Callable[[], object]
    forwards: int
    repeats: int
    show: Callable[[tuple[torch.Tensor, ...]], Iterable[str]]


@dataclass(frozen=True)
class Run:
    """One row of the table: a model in one mode; `stats` is None where it ran plain."""

    name: str
    mode: str
    seconds_per_forward: float
    weight_bytes: int
    stats: torch_offload.OffloadStats | None
    is_equal: bool | None


def embedding_task(loaded: RealModel, device: torch.device) -> Task:
    """Sentences to unit vectors: the mean of a sentence's token vectors, normalized."""
    batch = loaded.tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device)

    def work() -> tuple[torch.Tensor, ...]:
        return (loaded.model(**batch).last_hidden_state,)

    def show(output: tuple[torch.Tensor, ...]) -> Iterable[str]:
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors = torch.nn.functional.normalize((output[0] * mask).sum(1) / mask.sum(1), dim=-1)
        likeness = vectors @ vectors.T - 2 * torch.eye(len(SENTENCES), device=device)
        for first, (value, second) in enumerate(zip(*likeness.max(-1), strict=True)):
            yield f"{SENTENCES[first]:<28} nearest: {SENTENCES[int(second)]:<28} ({value:.2f})"

    return Task(loaded, work, work, forwards=1, repeats=EMBEDDINGS, show=show)


def generation_task(loaded: RealModel, device: torch.device) -> Task:
    """A prompt continued greedily; tokens and the logits they were chosen from are compared."""
    if loaded.tokenizer is None:
        inputs = {"input_ids": torch.arange(100, 112, device=device)[None]}
    else:
        inputs = loaded.tokenizer(PROMPT, return_tensors="pt").to(device)

    def work() -> tuple[torch.Tensor, ...]:
        result = loaded.model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        return (result.sequences, *result.logits)

    def show(output: tuple[torch.Tensor, ...]) -> Iterable[str]:
        tokens = output[0][0]
        if loaded.tokenizer is None:
            yield f"tokens: {' '.join(str(int(token)) for token in tokens[-NEW_TOKENS:])}"
        else:
            yield loaded.tokenizer.decode(tokens, skip_special_tokens=True)

    return Task(
        loaded, work, lambda: loaded.model(**inputs), forwards=NEW_TOKENS, repeats=1, show=show
    )


def forward_task(loaded: RealModel, device: torch.device) -> Task:
    """Plain forwards, for a stand-in in the place of the embedding model."""
    tokens = torch.arange(2 * 16, device=device).view(2, 16)

    def work() -> tuple[torch.Tensor, ...]:
        return (loaded.model(tokens, use_cache=False).logits,)

    def show(output: tuple[torch.Tensor, ...]) -> Iterable[str]:
        yield f"logits of shape {tuple(output[0].shape)}, random like their weights"

    return Task(loaded, work, work, forwards=1, repeats=EMBEDDINGS, show=show)


def timed(task: Task, device: torch.device) -> tuple[float, list[tuple[torch.Tensor, ...]]]:
    """Warms up by a forward, then repeats the task; returns seconds per forward, and outputs."""
    with torch.inference_mode():
        task.warm_up()
        _finish(device)
        start = time.perf_counter()
        outputs = [task.work() for _ in range(task.repeats)]
        _finish(device)
    return (time.perf_counter() - start) / (task.repeats * task.forwards), outputs


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def same_bits(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    """Whether two outputs are equal to the last bit, -0.0 and NaN told apart as well."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


def run_task(task: Task, device: torch.device, console: Console) -> list[Run]:
    """Runs a task plain and in each mode."""
    model, name = task.loaded.model, task.loaded.name
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.to(device)
    seconds, outputs = timed(task, device)
    expected = outputs[0]
    runs = [Run(name, "plain", seconds, weight_bytes, None, None)]
    for mode in MODES:
        with torch_offload.offload(model, device, mode=mode, gpu_budget=None) as handle:
            seconds, outputs = timed(task, device)
            is_equal = all(same_bits(output, expected) for output in outputs)
            runs.append(Run(name, mode, seconds, weight_bytes, handle.stats, is_equal))
    model.to("cpu")
    console.print(f"\n[bold]{name}[/bold], its weights streamed, says:")
    for line in task.show(outputs[-1]):
        console.print(f"  {line}", highlight=False)
    return runs


def table_of(runs: list[Run]) -> Table:
    """The one table: a line for each model, and one for each way it ran."""
    table = Table(box=box.SIMPLE_HEAD, title="Plain and streamed, the same inputs")
    table.add_column("model", no_wrap=True)
    for heading in (
        "ms per\nforward",
        "\nstreamed",
        "\nonloads",
        "\nmisses",
        "\nwindow",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bits\nequal", justify="center", no_wrap=True)
    for run in runs:
        if run.stats is None:
            table.add_row(f"[bold]{run.name}[/bold]")
            counts = ["", "", "", f"all {megabytes(run.weight_bytes)}", ""]
        else:
            counts = [
                megabytes(run.stats.bytes_onloaded),
                f"{run.stats.onloads:,}",
                f"{run.stats.misses:,}",
                megabytes(run.stats.window_bytes),
                "[green]yes[/green]" if run.is_equal else "[bold red]NO[/bold red]",
            ]
        table.add_row(f"  {run.mode}", f"{1e3 * run.seconds_per_forward:,.1f}", *counts)
    return table


def megabytes(size_bytes: int) -> str:
    """A size for people, in powers of 1000."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def verdict_of(runs: list[Run], device: torch.device) -> tuple[bool, list[str]]:
    """Whether all is well, and what was seen, in plain words."""
    streamed = [run for run in runs if run.stats is not None]
    different = [run for run in streamed if not run.is_equal]
    idle = [run for run in streamed if not run.stats or not run.stats.bytes_onloaded]
    lines = []
    for run in different:
        lines.append(f"{run.name}, {run.mode}: the output DIFFERS from the plain model's.")
    for run in idle:
        lines.append(f"{run.name}, {run.mode}: NOTHING was streamed, so equality proves nothing.")
    if lines:
        return False, lines
    lines.append(
        "All outputs are equal to the last bit, though the layers' weights lay in host memory and "
        "passed through the window in every forward. Embeddings and other things that are small "
        "or shared stayed on the device."
    )
    lines.append(
        "sync copies a unit when it is asked for: each onload is a miss. The pipeline has copied "
        "it by then: it misses the first unit of all, and copies the next forward's first ones."
    )
    if device.type == "cpu":
        lines.append(
            "No GPU took part: the window is ordinary memory, and a copy is a memcpy on the cores "
            "that compute. So the times say little here; the equality is what was shown."
        )
    return True, lines


def load_tasks(device: torch.device, stand_in: bool, console: Console) -> list[Task]:
    """Loads both models, or what takes their place, and says so."""
    loaders = (
        (load_minilm, embedding_task, forward_task),
        (load_gemma, generation_task, generation_task),
    )
    tasks = []
    for load, task_of, task_of_stand_in in loaders:
        try:
            if stand_in:
                raise DataPackageMissingError("a stand-in was asked for")
            if load is load_gemma and not gemma_is_cached():
                console.print("Rebuilding Gemma as a bf16 checkpoint, once: a minute or two ...")
            tasks.append(task_of(load(), device))
        except DataPackageMissingError as missing:
            console.print(
                f"[yellow]No trained weights: {missing}. A Llama of TinyLlamas 42M's shape with "
                "random weights takes the place.[/yellow]"
            )
            tasks.append(task_of_stand_in(load_stand_in(), device))
    return tasks


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Plain and streamed models, compared bit by bit.")
    parser.add_argument("--device", help="where to compute: the GPU if there is one, else 'cpu'")
    parser.add_argument("--stand-in", action="store_true", help="random weights instead of trained")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the host device"

    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is for the copies

    console = Console(highlight=False)
    console.print(f"torch_offload on {where}, torch {torch.__version__}")
    runs = []
    for task in load_tasks(device, options.stand_in, console):
        runs += run_task(task, device, console)
    is_well, lines = verdict_of(runs, device)
    console.print()
    console.print(table_of(runs))
    for line in lines:
        console.print(line, style="" if is_well else "bold red")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
