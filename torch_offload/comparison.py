"""One model run plain, streamed, and under accelerate: time, memory, and whether bits are equal."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

import torch_offload
from torch_offload.sizes import format_size

METHODS = ("plain", "sync", "pipeline", "accelerate")


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: One of `METHODS`.
        forward_ms: Median; None if it did not run.
        device_bytes: Peak of device memory; on the host device the weights that stay or pass.
        host_bytes: Page-locked.
        onloads: Copies of units per forward; None where it is not ours.
        is_equal: To the first method that ran, to the last bit; None for that one itself.
        note: Why it did not run.
    """

    method: str
    forward_ms: float | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    onloads: float | None = None
    is_equal: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All methods, side by side."""

    model: str
    device: str
    batch: int
    tokens: int
    rows: tuple[Row, ...]

    @property
    def is_well(self) -> bool:
        """Whether all that ran gave the same bits, and what should stream did."""
        streamed = [row for row in self.rows if row.method in ("sync", "pipeline")]
        return all(row.is_equal is not False for row in self.rows) and all(
            row.onloads for row in streamed
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "model": self.model,
            "device": self.device,
            "batch": self.batch,
            "tokens": self.tokens,
            "is_well": self.is_well,
            "rows": [vars(row) for row in self.rows],
        }

    def __rich__(self) -> RenderableType:
        """For a terminal."""
        table = Table(
            title=f"{self.model} on {self.device}, batch {self.batch}, {self.tokens} tokens",
            title_justify="left",
        )
        table.add_column("method")
        for heading in ("a forward", "device memory", "page-locked", "onloads", "equal"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            if row.forward_ms is None:
                table.add_row(row.method, "-", "-", "-", "-", "-")
                continue
            table.add_row(
                row.method,
                f"{row.forward_ms:,.2f} ms",
                "-" if row.device_bytes is None else format_size(row.device_bytes),
                "-" if row.host_bytes is None else format_size(row.host_bytes),
                "-" if row.onloads is None else f"{row.onloads:g}",
                {None: "reference", True: "yes", False: "NO"}[row.is_equal],
            )
        notes = [Text(f"{row.method}: {row.note}") for row in self.rows if row.note]
        return Group(table, *notes)


def compare(
    model: nn.Module,
    device: torch.device,
    *,
    batch: int,
    tokens: int,
    rounds: int,
    options: dict[str, Any],
    methods: Iterator[str] | Sequence[str] = METHODS,
) -> Comparison:
    """Runs the model by each method. Blocks. The model is on the CPU and plain afterwards.

    Raises:
        ValueError: If the model takes inputs that we cannot make up; for an invalid combination of
            options.
    """
    model = torch_offload.align(model)
    inputs = _inputs(model, device, batch, tokens)
    rows: list[Row] = []
    expected: list[torch.Tensor] | None = None
    for method in methods:
        why = _cannot_run(method, model, device)
        if why:
            rows.append(Row(method, note=why))
            continue
        with _arranged(method, model, device, options) as handle:
            row, outputs = _measure(method, model, inputs, device, rounds, handle)
        if expected is None:
            expected = outputs
        else:
            row = Row(**{**vars(row), "is_equal": _are_equal(expected, outputs)})
        rows.append(row)
    name = f"{type(model).__name__} ({format_size(_weight_bytes(model))})"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the host device"
    return Comparison(name, where, batch, tokens, tuple(rows))


def _cannot_run(method: str, model: nn.Module, device: torch.device) -> str:
    """Why a method is left out; "" if it is not."""
    if method == "accelerate" and importlib.util.find_spec("accelerate") is None:
        return "not installed"
    if method == "plain" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = _weight_bytes(model)
        if needed > 0.9 * free:  # the rest is for activations
            return f"does not fit: {format_size(needed)} of weights, {format_size(free)} free"
    return ""


@contextmanager
def _arranged(
    method: str, model: nn.Module, device: torch.device, options: dict[str, Any]
) -> Iterator[torch_offload.Handle | None]:
    """Brings the model into the state in which a method runs it, and back."""
    if method == "plain":
        model.to(device)
        try:
            yield None
        finally:
            model.to("cpu")
    elif method == "accelerate":
        accelerate = importlib.import_module("accelerate")  # optional, and without types
        accelerate.cpu_offload(model, execution_device=device)
        try:
            yield None
        finally:
            accelerate.hooks.remove_hook_from_submodules(model)
            model.to("cpu")
    else:
        with torch_offload.offload(model, device, **{**options, "mode": method}) as handle:
            yield handle


def _measure(
    method: str,
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    device: torch.device,
    rounds: int,
    handle: torch_offload.Handle | None,
) -> tuple[Row, list[torch.Tensor]]:
    with torch.inference_mode():
        outputs = _tensors(model(**inputs))  # also what learns the order
        before = handle.stats.onloads if handle else 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            outputs = _tensors(model(**inputs))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - begin) * 1e3)
    return (
        Row(
            method=method,
            forward_ms=median(times),
            device_bytes=_device_bytes(method, model, device, handle),
            host_bytes=handle.stats.host_bytes if handle else None,
            onloads=(handle.stats.onloads - before) / rounds if handle else None,
        ),
        [output.to("cpu", copy=True) for output in outputs],
    )


def _device_bytes(
    method: str, model: nn.Module, device: torch.device, handle: torch_offload.Handle | None
) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if handle is not None:
        return handle.stats.device_bytes
    return _weight_bytes(model) if method == "plain" else None


def _weight_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _inputs(
    model: nn.Module, device: torch.device, batch: int, tokens: int
) -> dict[str, torch.Tensor]:
    """Made-up inputs: random tokens, or a random image where the model sees."""
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "")
    made: dict[str, Any] = {}
    if name == "input_ids":
        text = config.get_text_config()
        ids = torch.randint(0, text.vocab_size, (batch, tokens), generator=generator, device="cpu")
        made["input_ids"] = ids.to(device)
        if getattr(config, "is_encoder_decoder", False):
            made["decoder_input_ids"] = made["input_ids"]
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (batch, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        dtype = next(model.parameters()).dtype
        made["pixel_values"] = torch.randn(shape, generator=generator, device="cpu").to(
            device, dtype
        )
    else:
        raise ValueError(
            f"expected a model of text (input_ids) or images (pixel_values), got "
            f"{type(model).__name__}, which takes {name or 'something else'}; offload it in a "
            "script of your own"
        )
    if getattr(config, "use_cache", None):
        made["use_cache"] = False
    return made


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values: Callable[[], Any] | None = getattr(output, "values", None)
    parts = values() if values is not None else output
    if not isinstance(output, dict | list | tuple):
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


def _are_equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))
