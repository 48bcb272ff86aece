"""What a handle counts: sums since `offload`, and each unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch_offload import _C


@dataclass(frozen=True)
class OffloadStats:
    """Counts since `offload`. Sizes in bytes.

    Attributes:
        forwards: Passes that were completed: calls of the model or of any part of it.
        onloads: Copies of a whole unit into its place.
        prefetched: Onloads issued before their unit was asked for.
        misses: Units asked for that nobody had prefetched.
        bytes_onloaded: Bytes of all onloads, padding between parameters included.
        bytes_resident: Weights and buffers that stay on the device.
        window_bytes: The one device allocation that streamed units pass through.
        host_bytes: Page-locked host memory of the masters.
        cpu_seconds: Time spent in our own calls during forwards.
        hits: Units asked for that were still whole in their places.
        extra_places: Units called inside one that they overlap, which got places of their own.
        bytes_copied: What went over the link: less than `bytes_onloaded` where units are packed.
        staging_bytes: The device allocation that packed units are copied to and decoded from.
        file_bytes_locked: Bytes of checkpoint files that were brought into memory and page-locked
            so far: each once, and once more whenever it has its turn where not all are locked.
        packed_bytes: The device allocation in which units stay packed.
        device_bytes: All that weights take on the device: `bytes_resident`, `window_bytes`,
            `staging_bytes` and `packed_bytes`.
    """

    forwards: int
    onloads: int
    prefetched: int
    misses: int
    bytes_onloaded: int
    bytes_resident: int
    window_bytes: int
    host_bytes: int
    cpu_seconds: float
    hits: int
    extra_places: int
    bytes_copied: int
    staging_bytes: int
    file_bytes_locked: int
    packed_bytes: int

    @property
    def device_bytes(self) -> int:
        """All that weights take on the device, window and ring included."""
        return self.bytes_resident + self.window_bytes + self.staging_bytes + self.packed_bytes


def stats_of(engine: _C.Engine, bytes_resident: int) -> OffloadStats:
    """Counts of an engine so far, and what stays on the device beside it. Does not block.

    Raises:
        StateError: If the engine is closed.
    """
    stats = engine.stats
    return OffloadStats(
        forwards=stats.forwards,
        onloads=stats.onloads,
        prefetched=stats.prefetched,
        misses=stats.misses,
        bytes_onloaded=stats.bytes_onloaded,
        bytes_resident=bytes_resident,
        window_bytes=engine.window_bytes,
        host_bytes=engine.host_bytes,
        cpu_seconds=engine.cpu_seconds,
        hits=stats.hits,
        extra_places=stats.extra_places,
        bytes_copied=engine.bytes_copied,
        staging_bytes=engine.staging_bytes,
        file_bytes_locked=engine.file_bytes_locked,
        packed_bytes=engine.packed_resident_bytes,
    )


@dataclass(frozen=True)
class UnitInfo:
    """One unit of an offloaded model.

    Attributes:
        name: Qualified name of its module.
        layer_index: Running number of its layer.
        kind: ``"mha"`` or ``"ffn"``.
        size_bytes: Flat size, each parameter aligned to 256 bytes.
        place: Its byte range ``(begin, end)`` in the window; None if it stays on the device.
        parameters: Qualified names of its parameters.
        acquired: How often it was used.
        transport: How it reaches its place: ``"raw"`` (or not at all, if it has none),
            ``"packed"``, or ``"packed_resident"``: decoded from where it stays on the device.
        copied_bytes: What one copy of it carries: less than `size_bytes` where it is packed, 0
            where it stays packed.
        onloads: How often it was copied or decoded.
        misses: How often it was asked for before its copy had been issued.
        copies: How many copies an onload takes; 0 if it stays on the device, packed or not.
        bytes_in_files: How many of its bytes are streamed from checkpoint files.
    """

    name: str
    layer_index: int
    kind: Literal["mha", "ffn"]
    size_bytes: int
    place: tuple[int, int] | None
    parameters: tuple[str, ...]
    acquired: int
    transport: Literal["raw", "packed", "packed_resident"]
    copied_bytes: int
    onloads: int
    misses: int
    copies: int
    bytes_in_files: int
