#!/usr/bin/env python3
"""How many bits a weight of trained models takes packed, cast to bf16, all side data counted.

    benchmarks/packed_bits.py                       as JSON beside the other results
    benchmarks/packed_bits.py --results-dir OUT

Needs no GPU. A model whose package is missing leaves no figures (requirements/models.txt).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))

from records import Records  # noqa: E402  (the path comes first)

from examples.real_models import (  # noqa: E402
    DataPackageMissingError,
    load_gemma,
    load_minilm,
)
from torch_offload import _C, align, offload  # noqa: E402

_MODELS = {"minilm": load_minilm, "gemma": load_gemma}
_TOKENS = 8


def bits_of(tensors: list[torch.Tensor]) -> float:
    """Of each weight, packed as one unit."""
    return 8 * _C.pack(tensors).blob.numel() / sum(tensor.numel() for tensor in tensors)


@torch.inference_mode()
def figures_of(model: nn.Module) -> dict[str, Any]:
    """Of a model in bf16; its forward is compared, bit for bit, with that of the packed one."""
    tokens = torch.arange(100, 100 + _TOKENS)[None]
    expected = model(tokens)[0]
    tensors = [parameter.detach().contiguous() for parameter in model.parameters()]
    with offload(model, "cpu", transport="packed", gpu_budget=None) as handle:
        assert torch.equal(model(tokens)[0], expected), "the packed model gives other bits"
        units = [unit for unit in handle.units if unit.place is not None]
        assert {unit.transport for unit in units} == {"packed"}
        copied = sum(unit.copied_bytes for unit in units)
        size = sum(unit.size_bytes for unit in units)
    with offload(model, "cpu", transport="packed", masters="packed", gpu_budget=None) as handle:
        assert torch.equal(model(tokens)[0], expected), "packed masters give other bits"
        locked = handle.stats.host_bytes
    return {
        "num_weights": sum(tensor.numel() for tensor in tensors),
        "bits_a_weight": bits_of(tensors),
        "num_units": len(units),
        "units_bytes": size,
        "bits_a_weight_of_units": 16 * copied / size,
        "locked_share": locked / size,
        "bit_equal": True,
    }


def main() -> None:
    """Runs all models."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--results-dir", type=Path, default=_HERE / "results")
    options = parser.parse_args()
    command = " ".join(["benchmarks/packed_bits.py", *sys.argv[1:]])
    records = Records(options.results_dir, command, False)
    for name, load in _MODELS.items():
        try:
            model: Any = align(load().model.bfloat16())
        except DataPackageMissingError as missing:
            records.keep_result("packed_bits", name, {}, status="skipped", error=str(missing))
        else:
            figures = {"what": "bits", "model": name, **figures_of(model)}
            print(name, figures)
            records.keep_result("packed_bits", name, figures)


if __name__ == "__main__":
    main()
