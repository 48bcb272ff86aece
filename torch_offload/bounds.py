"""What bounds a run, from where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch_offload.attribution import Attribution

Bottleneck: TypeAlias = Literal["link", "order", "compute", "launch", "nothing"]

# A resource that is busy for this part of the time is what the rest waits for.
_BUSY = 0.9
# Below this part of the time a cause is not worth a word.
_SLIGHT = 0.03


@dataclass(frozen=True)
class Bound:
    """What bounds a run.

    Attributes:
        by: ``"link"``: copies take up the time; ``"order"``: compute waits for copies although the
            copy engine is idle at times, so they come too late; ``"compute"``: kernels take it up;
            ``"launch"``: neither, the device waits for the host or runs kernels outside of units;
            ``"nothing"``: nothing was run.
        busy_share: How busy that resource is; for ``"order"``, how long compute waits.
        stall_share: Part of the time in which compute waits for copies.
    """

    by: Bottleneck
    busy_share: float
    stall_share: float

    @property
    def sentence(self) -> str:
        """For people, without a full stop."""
        busy, stall = 100 * self.busy_share, 100 * self.stall_share
        return {
            "link": f"bound by the link: {busy:.0f} % busy",
            "order": (
                f"bound by the order of copies: compute waits {stall:.0f} % of the time while the "
                "link is idle in between"
            ),
            "compute": f"bound by compute: kernels run {busy:.0f} % of the time",
            "launch": (
                f"bound by what lies between the units: {busy:.0f} % of the time is launching, "
                "resident units or other kernels"
            ),
            "nothing": "nothing was run",
        }[self.by]


def bound_of(found: Attribution) -> Bound:
    """Names the bottleneck."""
    if found.span_ns <= 0 or found.compute_ns + found.stall_ns + found.copy_ns == 0:
        return Bound("nothing", 0.0, 0.0)
    copies, computes, stall, between = (
        part / found.span_ns
        for part in (found.copy_ns, found.compute_ns, found.stall_ns, found.between_ns)
    )
    if stall > _SLIGHT:
        is_link = copies >= _BUSY
        return Bound("link" if is_link else "order", copies if is_link else stall, stall)
    if between + found.outside_ns / found.span_ns > computes:
        return Bound("launch", between + found.outside_ns / found.span_ns, stall)
    return Bound("compute", computes, stall)
