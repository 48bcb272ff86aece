"""The four durations of a layer, as options of more than one command."""

from __future__ import annotations

from typing import Annotated

import typer

from torch_offload.reference import LayerTimes

_REFERENCE = LayerTimes()


def _option(name: str, what: str, default: float) -> typer.models.OptionInfo:
    found: typer.models.OptionInfo = typer.Option(
        f"--{name}", metavar="MS", help=f"{what}, in ms ({default:g} if not given)."
    )
    return found


MhaH2d = Annotated[
    float | None, _option("mha-h2d", "Copy of a layer's attention", _REFERENCE.mha_h2d_ms)
]
MhaCompute = Annotated[
    float | None, _option("mha-compute", "Computing its attention", _REFERENCE.mha_compute_ms)
]
FfnH2d = Annotated[float | None, _option("ffn-h2d", "Copy of its FFN", _REFERENCE.ffn_h2d_ms)]
FfnCompute = Annotated[
    float | None, _option("ffn-compute", "Computing its FFN", _REFERENCE.ffn_compute_ms)
]


def layer_times(
    mha_h2d: float | None,
    mha_compute: float | None,
    ffn_h2d: float | None,
    ffn_compute: float | None,
) -> LayerTimes:
    """The given ones, the reference's in place of those that were not given.

    Raises:
        ValueError: For invalid durations.
    """
    given = {
        "mha_h2d_ms": mha_h2d,
        "mha_compute_ms": mha_compute,
        "ffn_h2d_ms": ffn_h2d,
        "ffn_compute_ms": ffn_compute,
    }
    return LayerTimes(**{name: value for name, value in given.items() if value is not None})
