"""The figures of what can be seen: simulator, profile, timeline, and the CPU that is free."""

from __future__ import annotations

from collections.abc import Callable

from measured import Results, Row, greatest, row_of, tuple_of


def _simulated(results: Results) -> Row:
    parts = results.all("simulated")
    worst = max(parts, key=lambda part: abs(part["error"]), default=None)
    measured = ""
    if worst is not None:
        measured = (
            f"{len(parts)} forwards, largest error {100 * worst['error']:+.1f} % "
            f"({worst['mode']} at {tuple_of(worst['shape'])})"
        )
    return row_of(
        "simulated against measured forward, four modes, four shapes",
        "<= 5 %",
        "",
        measured,
        greatest(abs(part["error"]) for part in parts),
        (0.05, None),
    )


def _profile_cost(results: Results) -> Row:
    parts = results.all("profile")
    measured = ", ".join(
        f"{part['model']} {tuple_of(part['shape'])} {100 * part['cost']:+.2f} %" for part in parts
    )
    value = greatest(part["cost"] for part in parts)
    return row_of("cost of profiling a forward", "<= 2 %", "", measured, value, (0.02, None))


def _attributed(results: Results) -> Row:
    parts = results.all("profile")
    shares = [part["attributed"][end] for part in parts for end in ("min", "max")]
    measured = f"{100 * min(shares):.2f} to {100 * max(shares):.2f} %" if shares else ""
    return row_of(
        "time that a profile attributes, of the wall time",
        "within 2 %",
        "",
        measured,
        greatest(abs(share - 1) for share in shares),
        (0.02, None),
    )


def _layer_gain(results: Results) -> Row:
    layers = {part["mode"]: part for part in results.all("layer")}
    gains = {
        mode: 1 - part["layer_ms"] / layers["sync"]["layer_ms"]
        for mode, part in layers.items()
        if "sync" in layers and mode != "sync"
    }
    measured = ""
    if "events" in gains:
        ratio = layers["sync"]["compute_over_copy"]
        listed = ", ".join(f"{mode} {100 * gain:.1f} %" for mode, gain in gains.items())
        measured = f"{listed} less than sync; computing takes {ratio:.1f} x as long as copying"
    return row_of(
        "a layer of Llama-3.1-70B's shape under a heavy load: gain of events over sync",
        "measured, beside the published 9.9 %",
        "",
        measured,
        gains.get("events"),
        (None, None),
    )


def _cpu_free(results: Results) -> Row:
    parts = results.all("cpu_free")
    measured = ", ".join(
        f"{part['mode']} {tuple_of(part['shape'])} {100 * part['streamed']['free']:.0f} % "
        f"(plain {100 * part['plain']['free']:.0f} %, ours {part['ours_ms']:.2f} ms)"
        for part in parts
    )
    return row_of(
        "Python thread free for other work",
        "measured, sync against pipeline",
        "",
        measured,
        greatest(part["streamed"]["free"] for part in parts),
        (None, None),
        at_least=True,
    )


def _simulator_speed(results: Results) -> Row:
    part = results.one("simulator")
    value = part["records_per_s"]["median"] if part is not None else None
    measured = f"{value / 1e6:.2f} M" if value is not None else ""
    return row_of(
        "simulator, op-log records a second",
        ">= 1 M",
        "",
        measured,
        value,
        (1e6, None),
        at_least=True,
    )


SEEN_ROWS: tuple[Callable[[Results], Row], ...] = (
    _simulated,
    _attributed,
    _profile_cost,
    _layer_gain,
    _cpu_free,
    _simulator_speed,
)
