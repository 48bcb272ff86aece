"""What a matrix product loses to a decoder beside it, by how many blocks the decoder runs in."""

from __future__ import annotations

from functools import partial

import torch
from clocks import DEVICE, ON_GPU, Run, Stamp, device_ms, spread, synchronize
from packed_units import OnDevice, feed_forward
from records import Part

from torch_offload import _C

# 0: as many as the GPU holds at once, which is what the pipeline asks for.
_BLOCKS = (0, 132, 264, 528, 1056)
_PRODUCTS = 12
_DECODES = 6


def bench_decoder_beside_products(part: Part, tiny: bool) -> None:
    """A feed-forward's product over and over; beside it one unit after another is decoded."""
    tensors = feed_forward(tiny)
    unit = OnDevice(_C.pack(tensors, "e33"))
    weight = tensors[0].to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    rows = torch.randn(
        (64 if tiny else 16384, weight.shape[1]), generator=generator, device=DEVICE
    ).bfloat16()
    output = torch.empty((rows.shape[0], weight.shape[0]), dtype=rows.dtype, device=DEVICE)

    def products() -> None:
        for _ in range(_PRODUCTS):
            torch.mm(rows, weight.t(), out=output)

    products()
    expected = output.clone()
    by_blocks = {}
    for blocks in _BLOCKS if ON_GPU else (0,):
        alone_ms, beside_ms = [], []
        for _ in range(5):
            alone_ms += device_ms(products, forwards=1, rounds=1)
            beside_ms.append(_beside(products, unit, blocks))
        decode_ms = device_ms(partial(unit.decode, blocks), forwards=4, rounds=5)
        assert torch.equal(output, expected), "the product has changed beside the decoder"
        alone, beside = spread(alone_ms), spread(beside_ms)
        by_blocks[str(blocks)] = {
            "decode_alone_ms": spread(decode_ms),
            "products_alone_ms": alone,
            "products_beside_ms": beside,
            "lost_ms_per_decode": (beside["median"] - alone["median"]) / _DECODES,
        }
    unit.require_right(tensors)
    part.figures.update(
        what="decoder_beside",
        codec="e33",
        weights_bytes=sum(tensor.nbytes for tensor in tensors),
        products=_PRODUCTS,
        decodes=_DECODES,
        by_blocks=by_blocks,
        bit_equal=True,
    )


def _beside(products: Run, unit: OnDevice, blocks: int) -> float:
    """Time of the products, and of decoders that another stream submits to at the same time."""
    if not ON_GPU:  # one thread does both: there is no beside
        return device_ms(products, forwards=1, rounds=1)[0]
    decoding = torch.cuda.Stream(DEVICE, priority=-1)  # as the pipeline's
    synchronize()
    begin = Stamp()
    decoding.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(decoding):
        for _ in range(_DECODES):
            unit.decode(blocks)
        decoded = torch.cuda.Event()
        decoded.record()
    products()
    torch.cuda.current_stream(DEVICE).wait_event(decoded)
    elapsed = (Stamp() - begin) * 1e3
    synchronize()
    return elapsed
