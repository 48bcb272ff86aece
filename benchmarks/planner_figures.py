"""The figures of the planner: how long it takes, how right it is, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable

from measured import Figures, Results, Row, greatest, row_of, tuple_of


def _way(part: Figures) -> str:
    transport = part.get("transport", "raw")
    return "" if transport == "raw" else f", transport {transport},"


def _planning_time(results: Results) -> Row:
    parts = results.all("planning")
    listed = ", ".join(
        f"{part['num_units']} units{_way(part)} {1e3 * part['seconds_at_most']:.0f} ms"
        for part in parts
    )
    return row_of(
        "planning time, 80 layers, slowest of five budgets",
        "<= 0.5 s",
        "0.1 s",
        listed,
        greatest(part["seconds_at_most"] for part in parts),
        (0.5, 0.1),
    )


def _predicted(results: Results) -> Row:
    parts = results.all("budget")
    worst = max(parts, key=lambda part: abs(_error_in_turn(part)), default=None)
    measured = ""
    if worst is not None:
        raw = max(parts, key=lambda part: abs(part["error"]))
        measured = f"{len(parts)} forwards, largest error {_of_part(worst, _error_in_turn(worst))}"
        if "error_in_turn" in worst:
            measured += (
                " with what the same kernels and copies took in turn with them; with what they "
                f"took before all of them {_of_part(raw, raw['error'])}"
            )
    return row_of(
        "predicted against measured forward, 5 budgets, 2 shapes",
        "within 5 %",
        "3 %",
        measured,
        greatest(abs(_error_in_turn(part)) for part in parts),
        (0.05, 0.03),
    )


def _error_in_turn(part: Figures) -> float:
    return float(part.get("error_in_turn", part["error"]))  # older results have none


def _of_part(part: Figures, error: float) -> str:
    where = f"{part['share']:.0%} of the weights at {tuple_of(part['shape'])}"
    return f"{100 * error:+.1f} % ({where})"


def _decode(results: Results) -> Row:
    """Of the granularity that is chosen by what is predicted, where that was measured."""
    parts = results.all("budget", is_decode=True)
    chosen = [part for part in parts if part.get("asked_granularity") == "auto"]
    halves = [part for part in parts if part not in chosen]
    listed = ", ".join(_ratios(chosen or halves))
    if chosen and halves:
        listed += f"; halves {', '.join(_ratios(halves))}"
    return row_of(
        "decode at 5 budgets / (bytes left to stream / link rate)",
        "<= 1.03",
        "1.01",
        listed,
        greatest(part["link_ratio"] for part in chosen or halves),
        (1.03, 1.01),
    )


def _ratios(parts: list[Figures]) -> list[str]:
    return [f"{part['link_ratio']:.3f}" for part in parts if part["link_ratio"] is not None]


def _patterns(results: Results) -> Row:
    parts = results.all("patterns")
    slower = [part["slower_than_best"] for part in parts]
    listed = ", ".join(
        f"{tuple_of(part['shape'])} {100 * part['slower_than_best']:+.1f} % ({part['best']})"
        for part in parts
    )
    return row_of(
        "planner's choice against the best of 6 fixed patterns, same budget",
        "never > 1 % slower",
        "fastest",
        listed,
        greatest(slower),
        (0.01, 0.0),
    )


def _used(results: Results) -> Row:
    parts = [part for part in results.all("budget") if part["planned_over_used"] is not None]
    ratios = [part["planned_over_used"] for part in parts]
    listed = f"{min(ratios):.4f} to {max(ratios):.4f}" if ratios else ""
    # Both ends count: how far the worse one is outside of [0.97, 1].
    outside = greatest(max(ratio - 1.0, 0.97 - ratio, 0.0) for ratio in ratios)
    return row_of(
        "planned bytes / device memory really used, 5 budgets",
        "<= 1.00, >= 0.97",
        "",
        listed,
        outside,
        (0.0, None),
    )


def accelerate(results: Results) -> Row:
    parts = results.all("auto_peer")
    gains = [part["peer_ms"] / part["streamed_ms"] for part in parts]
    listed = ", ".join(
        f"{part['share']:.0%} of the weights {gain:.1f}x"
        for part, gain in zip(parts, gains, strict=True)
    )
    return row_of(
        'accelerate\'s `device_map="auto"` with the same budget / ours, 3 budgets',
        "faster at each",
        ">= 5x",
        listed,
        min(gains, default=None),
        (1.0, 5.0),
        at_least=True,
    )


def airllm(results: Results) -> Row:
    part = results.one("airllm")
    gain = part["times_faster"] if part else None
    return row_of(
        "AirLLM 4.0 on the same checkpoint / ours, both within 4 GiB of device memory",
        "faster",
        ">= 10x",
        f"{gain:.1f}x" if gain is not None else "",
        gain,
        (1.0, 10.0),
        at_least=True,
    )


PLANNER_ROWS: tuple[Callable[[Results], Row], ...] = (
    _planning_time,
    _predicted,
    _decode,
    _patterns,
    _used,
    accelerate,
    airllm,
)
