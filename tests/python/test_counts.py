"""What a handle counts, and what it comes to."""

from __future__ import annotations

from dataclasses import fields

from torch_offload import OffloadStats


def test_device_bytes_are_all_that_lies_on_the_device_and_nothing_else() -> None:
    counts = {field.name: 2**index for index, field in enumerate(fields(OffloadStats))}
    stats = OffloadStats(**counts)
    on_device = ("bytes_resident", "window_bytes", "staging_bytes", "packed_bytes")
    assert stats.device_bytes == sum(counts[name] for name in on_device)
