"""What `gpu_budget` may be, and what it comes to in bytes."""

from __future__ import annotations

from torch_offload import _C
from torch_offload.memory import Memory
from torch_offload.sizes import format_size, parse_size

AUTO = "auto"


def check_budget(value: int | float | str | None) -> None:
    """Refuses what no budget can be.

    Raises:
        ValueError: For a fraction outside (0, 1], a negative size, or a string of no meaning.
        TypeError: For another type.
    """
    if value is None or value == AUTO:
        return
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(
                f"expected gpu_budget as a fraction above 0, at most 1.0, got {value}; write bytes "
                "as a whole number, or as '12GiB'"
            )
        return
    parse_size(value, "gpu_budget")


def budget_in_bytes(value: int | float | str | None, total_bytes: int | None) -> int | None:
    """Returns the bytes that a budget allows; None where it names none (``None``, ``"auto"``).

    Args:
        value: As `check_budget` takes it.
        total_bytes: All memory of the device; None where nobody knows.

    Raises:
        ValueError: If it is more than the device has, or a fraction of what nobody knows.
    """
    if value is None or value == AUTO:
        return None
    if isinstance(value, float):
        if total_bytes is None:
            raise ValueError(
                f"expected gpu_budget in bytes or as '12GiB', got the fraction {value} of a device "
                "whose memory has no size of its own"
            )
        return int(value * total_bytes)
    return _at_most(parse_size(value, "gpu_budget"), total_bytes, "the device")


def budget_on(value: int | float | str | None, memory: Memory | None) -> int | None:
    """As `budget_in_bytes`, on the device whose memory this is, or on the host device (None).

    The host device has no size of its own, so no fraction of it is a budget; but what it holds lies
    in host memory.
    """
    if memory is not None:
        return budget_in_bytes(value, memory.total_bytes)
    budget = budget_in_bytes(value, None)
    limits = _C.host_limits()
    known = [b for b in (limits.total_bytes, limits.cgroup_limit_bytes) if b is not None]
    if budget is None or not known:
        return budget
    return _at_most(budget, min(known), "this machine, on whose host device nothing would stream")


def _at_most(budget: int, total_bytes: int | None, whose: str) -> int:
    if total_bytes is not None and budget > total_bytes:
        raise ValueError(
            f"expected gpu_budget of at most {format_size(total_bytes)}, all memory of {whose}, "
            f"got {format_size(budget)}; write what weights may take, as '12GiB', or leave "
            "gpu_budget out"
        )
    return budget
