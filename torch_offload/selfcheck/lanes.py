"""All lanes, in the order in which they run."""

from __future__ import annotations

import torch

from torch_offload.selfcheck.equality import Equality, VisibleRaces
from torch_offload.selfcheck.lane import Lane
from torch_offload.selfcheck.overlap import Overlap
from torch_offload.selfcheck.races import PublishedRaces, TriedRaces
from torch_offload.selfcheck.schedules import (
    AllSmallSchedules,
    Linearisations,
    Mutants,
    RandomSchedules,
)
from torch_offload.selfcheck.stream_sanitizer import StreamSanitizer


def all_lanes() -> list[Lane]:
    """Makes every lane. One more is one more line here: any `Lane` will do."""
    host = torch.device("cpu")
    gpu = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return [
        PublishedRaces(),
        TriedRaces(),
        Mutants(),
        Linearisations(),
        AllSmallSchedules(),
        RandomSchedules(),
        StreamSanitizer(),
        VisibleRaces(host),
        Equality(host),
        VisibleRaces(gpu),
        Equality(gpu),
        Overlap(gpu),
    ]
