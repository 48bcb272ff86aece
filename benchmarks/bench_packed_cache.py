"""How long `offload` takes with packed weights: packed anew, kept, and taken from the cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import DEVICE, Stamp, spread, synchronize
from records import Part
from torch import nn

from torch_offload import offload

_ROUNDS = 3


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def _model(tiny: bool) -> nn.Sequential:
    """Random normal weights in bf16: 4.3 GB, or 4 MB."""
    width, count = (256, 4) if tiny else (4096, 16)
    torch.manual_seed(0)
    with torch.no_grad():
        model = nn.Sequential(*(_Block(width).bfloat16() for _ in range(count)))
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    return model.requires_grad_(False)


@pytest.mark.parametrize("masters", ["plain", "packed"])
def bench_packed_cache_offload(part: Part, tiny: bool, tmp_path: Path, masters: Any) -> None:
    """Each round starts from the plain model; the file's pages are in the page cache."""
    model = _model(tiny)
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    seconds: dict[str, list[float]] = {"without": [], "written": [], "taken": []}
    file_bytes = 0
    for _ in range(_ROUNDS):
        for how, folder in (("without", None), ("written", tmp_path), ("taken", tmp_path)):
            begin = Stamp()
            handle = offload(
                model, DEVICE, transport="packed", masters=masters, packed_cache=folder
            )
            synchronize()
            seconds[how].append(Stamp() - begin)
            handle.remove()
        (file,) = tmp_path.iterdir()
        file_bytes = file.stat().st_size
        shutil.rmtree(tmp_path)
    part.figures.update(
        what="packed_cache",
        masters=masters,
        weights_bytes=weights_bytes,
        file_bytes=file_bytes,
        offload_s={how: spread(values) for how, values in seconds.items()},
    )
