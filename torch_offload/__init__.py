"""Streams the weights of a transformer from host memory while the GPU computes."""

from __future__ import annotations

# isort: off
# It imports torch, whose libraries the extension links against, and says if the two do not fit.
import torch_offload._build_check  # noqa: F401

# isort: on
from torch_offload._C import StateError
from torch_offload._version import __version__
from torch_offload.calls import probe as _probe
from torch_offload.checkpoint import CheckpointError
from torch_offload.config import Config
from torch_offload.counts import OffloadStats, UnitInfo
from torch_offload.handle import Handle, handle_of
from torch_offload.hazards import Finding, check
from torch_offload.offload import offload, offload_with
from torch_offload.pretrained import from_pretrained, offload_from_checkpoint
from torch_offload.storage import align

_probe()

__all__ = [
    "CheckpointError",
    "Config",
    "Finding",
    "Handle",
    "OffloadStats",
    "StateError",
    "UnitInfo",
    "__version__",
    "align",
    "check",
    "from_pretrained",
    "handle_of",
    "offload",
    "offload_from_checkpoint",
    "offload_with",
]
