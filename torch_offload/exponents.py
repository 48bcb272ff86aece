"""Counts the exponents of weights where the weights are: all that decides what packing comes to."""

from __future__ import annotations

import torch

from torch_offload import _C
from torch_offload.packed_parameter import is_packed, unpacked

_NUM_EXPONENTS = 256
_EXPONENT_SHIFT = 7
# Pieces that are counted at once on a device: a few dozen MiB there for what lies in between.
_PIECES_AT_ONCE = 16


def count_exponents(parameter: torch.Tensor) -> torch.Tensor | None:
    """How often each exponent occurs in every `_C.counted_weights` weights, as they lie in memory.

    Reads the weights once; from another device only the counts come to the host. Blocks.

    Returns:
        int32 of shape (pieces, 256) on the CPU; None where packing leaves the weights as they are,
        because they are not bfloat16.
    """
    if parameter.dtype != torch.bfloat16:
        return None
    plain = unpacked(parameter) if is_packed(parameter) else parameter.detach()
    flat = plain.as_strided((plain.numel(),), (1,))
    return _C.count_exponents(flat) if flat.is_cpu else count_exponents_by_torch(flat)


def count_exponents_by_torch(flat: torch.Tensor) -> torch.Tensor:
    """The same by operators that every device has. Takes its memory from the weights' device."""
    step = _PIECES_AT_ONCE * _C.counted_weights
    counts = [
        _count_pieces(flat[begin : begin + step], _C.counted_weights)
        for begin in range(0, flat.numel(), step)
    ]
    if not counts:
        return torch.zeros(0, _NUM_EXPONENTS, dtype=torch.int32, device="cpu")
    return torch.cat(counts).int().cpu()


def _count_pieces(flat: torch.Tensor, piece: int) -> torch.Tensor:
    """Of one part; its last piece may have fewer weights."""
    num_pieces = -(-flat.numel() // piece)
    exponents = (flat.view(torch.int16) >> _EXPONENT_SHIFT) & (_NUM_EXPONENTS - 1)
    rows = torch.arange(num_pieces, dtype=torch.int32, device=flat.device) * _NUM_EXPONENTS
    rows = rows.repeat_interleave(piece)[: flat.numel()]
    bins = torch.bincount(rows + exponents, minlength=num_pieces * _NUM_EXPONENTS)
    return bins.view(num_pieces, _NUM_EXPONENTS)
