"""`torch-offload doctor`: what on this machine makes streaming slower than it could be."""

from __future__ import annotations

from torch_offload.doctor.diagnosis import Diagnosis, diagnose
from torch_offload.doctor.finding import Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
