"""Choosing a plan before anybody knows what the forwards will be."""

from __future__ import annotations

from collections.abc import Sequence

from torch_offload import _C

# Between the end of one copy and the begin of the next: what copies of 1 MiB take beyond their
# bytes, measured on PCIe 5.
COPY_LATENCY_NS = 5_000
# Only the proportion of kernels to copies matters, and the latency beside both.
NOMINAL_LINK_BYTES_PER_SECOND = 55.2e9
# Kernels as parts of the copies of everything: a token, and a prompt that takes just as long. In
# between and beyond, whoever does well at both does well.
KERNEL_SHARES = (0.02, 1.0)


def choose(
    units: Sequence[_C.Unit],
    *,
    budget_bytes: int | None,
    depth_bytes: int | None = None,
    mode: str = "pipeline",
    streams: str = "shared",
    sequence: Sequence[int] | None = None,
) -> _C.Choice:
    """Chooses what stays and where the rest lies, good for a token and for a long prompt alike.

    Does not block for longer than a fraction of a second. The same arguments give the same plan:
    a plan that was predicted is the one that is made.

    Raises:
        ValueError: If the budget is below the least, which the message names.
    """
    rate = NOMINAL_LINK_BYTES_PER_SECOND
    copies = [unit.size_bytes / rate * 1e9 for unit in units]
    return _C.choose_plan(
        units,
        forwards=[([round(share * ns) for ns in copies], 1.0) for share in KERNEL_SHARES],
        link_bytes_per_second=rate,
        copy_latency_ns=COPY_LATENCY_NS,
        sequence=sequence or (),
        budget_bytes=budget_bytes,
        depth_bytes=depth_bytes,
        mode=mode,
        streams="shared" if mode == "sync" else streams,
    )
