"""What a forward costs its caller until it returns, of the plain model and of the streamed one."""

from __future__ import annotations

from typing import Any

from clocks import HostCost, Submission, alternate_submission, spread
from conftest import Reference
from observe import Counting
from records import Part
from yardstick import Pair


def measure_submission(
    benchmark: Any,
    part: Part,
    pair: Pair,
    reference: Reference,
    what: str,
    *,
    wanted_rounds: int,
    weight: float = 1.0,
) -> None:
    """Both models take turns; what a call costs the host, and what of it is spent inside ours."""
    streamed = pair.streamed
    plain_ms = reference.plain_ms(pair.workload, pair.shape)
    floor_ms = reference.floor_ms(streamed.streamed_bytes)
    round_s = (plain_ms + 2 * max(plain_ms, floor_ms)) * 1e-3
    with Counting(streamed) as counting:
        costs = alternate_submission(
            benchmark,
            pair.plain_run,
            pair.streamed_run,
            lambda: reference.link.copy(streamed.streamed_bytes),
            rounds=part.rounds(wanted_rounds, round_s, least=3, weight=weight),
        )
    host_costs = _host_costs(costs)
    per_forward = counting.per_forward()
    part.figures.update(
        **pair.header(what),
        shape_index=pair.shape_index,
        **host_costs,
        # Of two clocks: inside our C++ calls, and the whole call less the plain model's.
        inside_us_per_unit=per_forward["cpu_seconds"] * 1e6 / streamed.num_units,
        beyond_plain_us_per_unit=host_costs["beyond_plain_ms"] * 1e3 / streamed.num_units,
        per_forward=per_forward,
    )


def _host_costs(costs: Submission) -> dict[str, Any]:
    over_plain = beyond(costs.plain, costs.streamed)
    return {
        "plain_submit_ms": spread([cost.wall_ms for cost in costs.plain]),
        "submit_ms": spread([cost.wall_ms for cost in costs.streamed]),
        "beyond_plain_ms": over_plain["median"],
        "beyond_plain_spread_ms": over_plain,
        "wire_beyond_plain_ms": beyond(costs.plain, costs.plain_beside_copies),
        "beyond_plain_beside_copies_ms": beyond(costs.plain_beside_copies, costs.streamed),
        "blocked_ms": spread([max(cost.wall_ms - cost.busy_ms, 0.0) for cost in costs.streamed]),
        "plain_blocked_ms": spread([max(cost.wall_ms - cost.busy_ms, 0.0) for cost in costs.plain]),
    }


def beyond(base: list[HostCost], costs: list[HostCost]) -> dict[str, float]:
    """By how much `costs` exceed `base`, in ms, pair by pair.

    What slows the host for a while slows all calls of a round.
    """
    return spread([more.wall_ms - less.wall_ms for less, more in zip(base, costs, strict=True)])
