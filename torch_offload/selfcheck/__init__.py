"""`torch-offload selfcheck`: whether copies and kernels can go wrong, tried on this machine."""

from __future__ import annotations

from torch_offload.selfcheck.lane import Effort, Lane, Tally
from torch_offload.selfcheck.lanes import all_lanes
from torch_offload.selfcheck.report import LaneResult, Report
from torch_offload.selfcheck.runner import run_lanes

__all__ = ["Effort", "Lane", "LaneResult", "Report", "Tally", "all_lanes", "run_lanes"]
