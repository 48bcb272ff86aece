"""A unit's weights, packed, and the decoder on them."""

from __future__ import annotations

import torch
from clocks import DEVICE, ON_GPU

from torch_offload import _C


def feed_forward(tiny: bool) -> list[torch.Tensor]:
    """The three matrices of a feed-forward unit of Llama-70B, random normal as at creation."""
    hidden, intermediate = (256, 896) if tiny else (8192, 28672)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return [
        torch.randn(shape, generator=generator, device=DEVICE).mul_(0.02).bfloat16().cpu()
        for shape in shapes
    ]


class OnDevice:
    """A packed unit in device memory, and the place that it is decoded into."""

    def __init__(self, unit: _C.PackedUnit) -> None:
        self.unit = unit
        self.blob = unit.blob.to(DEVICE)
        self.place = torch.zeros(unit.place_bytes, dtype=torch.uint8, device=DEVICE)

    def decode(self, max_blocks: int = 0) -> None:
        """Submits it, in at most so many blocks of threads; 0: as many as the GPU holds at once."""
        if ON_GPU:
            _C.unpack_on_gpu(self.blob, self.place, self.unit.num_tiles, max_blocks)
        else:
            _C.unpack(self.blob, self.place)

    def require_right(self, tensors: list[torch.Tensor]) -> None:
        """Raises unless the decoder gives these bits."""
        self.place.zero_()
        self.decode()
        begin = 0
        for tensor in tensors:
            plain = tensor.reshape(-1).view(torch.uint8)
            decoded = self.place[begin : begin + plain.numel()].cpu()
            assert torch.equal(decoded, plain), "the decoder has changed bits"
            begin += _C.aligned_size(plain.numel())
