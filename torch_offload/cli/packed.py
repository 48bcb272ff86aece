"""The options of packed transport, which several commands share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

TransportOption: TypeAlias = Annotated[
    str,
    typer.Option(help="raw, packed, packed_resident, or auto: packed units where that is faster."),
]
MastersOption: TypeAlias = Annotated[
    str, typer.Option(help="What waits in host memory: plain, or packed and nothing else.")
]
DecodeRateOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help="What comes out of the decoder, as 1600GB/s; else as one H100's."),
]
