"""The options of packed transport, which `plan` and `simulate` share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

TransportOption: TypeAlias = Annotated[
    str, typer.Option(help="raw, packed, or auto: packed units where that is faster.")
]
DecodeRateOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help="What comes out of the decoder, as 1600GB/s; else as one H100's."),
]
