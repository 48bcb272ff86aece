"""Device memory that a test makes up, for ``gpu_budget="auto"`` on the host."""

from __future__ import annotations


class FakeMemory:
    """A device of so many bytes, of which others and forwards take what the test says."""

    def __init__(self, total: int) -> None:
        self.total_bytes = total
        self.held_by_others = 0
        self.weights = lambda: 0
        self.kept = 0  # a cache that stays between forwards
        self.activations = 0  # what a forward takes while it runs
        self.resets = 0

    def allocated_bytes(self) -> int:
        return self.weights() + self.kept

    def available_bytes(self) -> int:
        return self.total_bytes - self.held_by_others - self.allocated_bytes()

    def peak_bytes(self) -> int:
        return self.allocated_bytes() + self.activations

    def reset_peak(self) -> None:
        self.resets += 1
