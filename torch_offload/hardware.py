"""What a GPU can do at most, as far as a prediction needs it."""

from __future__ import annotations

from dataclasses import dataclass

# Of a peak, what the kernels of a transformer reach: 16 layers of Llama-70B's shape were measured
# at 0.57 of an H200's arithmetic (16,384 tokens) and at 0.57 of its memory rate (one token).
DEFAULT_EFFICIENCY = 0.57


@dataclass(frozen=True)
class Peak:
    """The peak rates of one device.

    Attributes:
        name: For the reader.
        flops: Dense bf16 operations per second.
        memory_bytes_per_second: Of the device's own memory.
        link_bytes_per_second: What copies from page-locked memory reach; None if not known.
        efficiency: Part of both peaks that kernels reach.
    """

    name: str
    flops: float
    memory_bytes_per_second: float
    link_bytes_per_second: float | None = None
    efficiency: float = DEFAULT_EFFICIENCY

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"expected an efficiency above 0, at most 1, got {self.efficiency}")

    def compute_ns(self, flop: float, memory_bytes: float) -> int:
        """The roofline: the arithmetic or the memory traffic, whichever takes longer."""
        seconds = max(flop / self.flops, memory_bytes / self.memory_bytes_per_second)
        return round(seconds / self.efficiency * 1e9)

    def formula(self) -> str:
        """Says in one sentence how a compute time comes about."""
        return (
            f"compute time of a unit = max(operations / {self.flops / 1e12:,.0f} TFLOP/s, bytes / "
            f"{self.memory_bytes_per_second / 1e12:.2f} TB/s) / {self.efficiency:g} ({self.name})"
        )


# Rates of arithmetic and memory from the vendors' data sheets (SXM where there is one); the link's
# is what was measured over PCIe 5 x16.
PEAKS = {
    "h100": Peak("H100 SXM", 989e12, 3.35e12, 55.2e9),
    "h200": Peak("H200 SXM", 989e12, 4.8e12, 55.2e9),
    "a100": Peak("A100 SXM 80 GB", 312e12, 2.04e12),
    "l40s": Peak("L40S", 362e12, 0.864e12),
    "rtx4090": Peak("RTX 4090", 165e12, 1.008e12),
}


def peak_named(name: str) -> Peak:
    """Looks up a device.

    Raises:
        ValueError: If it is not in the table, which the message lists.
    """
    found = PEAKS.get(name.lower().replace(" ", "").replace("-", ""))
    if found is None:
        known = ", ".join(PEAKS)
        raise ValueError(
            f"expected --gpu to be one of {known}, got {name!r}; or state the peaks yourself: "
            "--peak 989TFLOP/s --memory-rate 3.35TB/s"
        )
    return found
