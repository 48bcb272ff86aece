"""Whether a real copy runs beside a real kernel on this GPU, and the result is right then."""

from __future__ import annotations

from typing import Any

import torch

from torch_offload.config import Config
from torch_offload.intervals import intersect, total, union
from torch_offload.offload import offload_with
from torch_offload.selfcheck.equality import why_no_gpu
from torch_offload.selfcheck.lane import Effort, Lane, Tally
from torch_offload.selfcheck.subjects import Stack
from torch_offload.storage import align

# Kernels about as long as copies on a data-center GPU, and both far longer than a launch.
_WIDTH, _ROWS = 2048, 4096
# Less than this of the time of copies beside kernels is no overlap.
_LEAST_SHARE = 0.2


class Overlap(Lane):
    """By the log's own times: those of the device, not of the host."""

    name = "overlap"
    tried = "whether a real copy overlaps a real kernel here, and the result is right"
    counts = "copies beside kernels"

    def __init__(
        self, device: torch.device, width: int = _WIDTH, rows: int = _ROWS, num_blocks: int = 4
    ) -> None:
        self._device = device
        self._width, self._rows, self._num_blocks = width, rows, num_blocks

    def why_not(self) -> str | None:
        """It needs a GPU: on the host, copies and kernels share the same cores."""
        return why_no_gpu() or (None if self._device.type == "cuda" else "needs a GPU")

    def control(self) -> Tally:
        """The mode in which the host waits for every copy: nothing may overlap."""
        return self.measure("sync")

    def run(self, effort: Effort) -> Tally:
        """The mode for production."""
        return self.measure("pipeline")

    @torch.no_grad()
    def measure(self, mode: Any) -> Tally:
        """Runs some forwards and looks at the last one's times."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = Stack(self._num_blocks, self._width).eval()
            x = torch.randn(self._rows, self._width)
        align(model)
        x = x.to(self._device)
        with offload_with(model, self._device, Config(mode=mode, gpu_budget=None)) as handle:
            for _ in range(3):
                model(x)
            with handle.record(times=True):
                outputs = [model(x) for _ in range(2)]
            trace = handle.trace()
        must = model.to(self._device)(x)  # as it is again, on the device
        copies = [bar for bar in trace.bars if bar.kind == "copy"]
        computes = union((bar.begin_ns, bar.end_ns) for bar in trace.bars if bar.kind == "compute")
        beside = [intersect([(bar.begin_ns, bar.end_ns)], computes) for bar in copies]
        copying_ns = sum(bar.duration_ns for bar in copies)
        share = sum(map(total, beside)) / copying_ns if copying_ns else 0.0
        tally = Tally(sum(1 for intervals in beside if intervals))
        tally.note = f"{100 * share:.0f} % of the time of {len(copies)} copies beside kernels"
        tally.figures = {"share": share, "copies": len(copies), "copying_ms": copying_ns / 1e6}
        if share < _LEAST_SHARE:
            tally.add_fault(f"no overlap: {tally.note}")
        if not all(torch.equal(output, must) for output in outputs):
            tally.add_fault("the outputs differ from the plain model's")
        return tally
