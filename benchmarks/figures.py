"""The figures that were asked for, read out of the results, with what must and should be.

No torch in here: the tables of README and docs are made on machines that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from file_figures import FILE_ROWS
from measured import Document, Figures, Results, Row, greatest, row_of, tuple_of
from packed_figures import PACKED_ROWS, beside_peer, packed_link_bound, within_budget
from planner_figures import PLANNER_ROWS, accelerate, airllm
from seen_figures import SEEN_ROWS

__all__ = [
    "GRANULARITIES",
    "Document",
    "Figures",
    "Results",
    "Row",
    "chosen_rows",
    "rows",
    "tuple_of",
]

GRANULARITIES = ("sublayer", "module", "layer")
_MIB = 2**20


def _ratios(parts: Iterable[Figures]) -> str:
    return ", ".join(
        f"{tuple_of(part['shape'])} {part['ratio']:.3f}"
        f" ({part['ratio_min']:.3f}-{part['ratio_max']:.3f})"
        + (f", {part['hot_ratio']:.3f} of a small buffer's rate" if "hot_ratio" in part else "")
        + (
            f", resident beside bare copies {part['plain_beside_copies_ratio']:.3f}"
            if "plain_beside_copies_ratio" in part
            else ""
        )
        for part in parts
    )


def _link_bound(results: Results) -> Row:
    parts = [
        part
        for index in range(3)
        for part in results.all("forward", granularity="sublayer", shape_index=index)
    ]
    return row_of(
        "pipeline / roofline at (1,1), (8,512), (1,2048)",
        "<= 1.01",
        "1.002",
        _ratios(parts),
        greatest(part["ratio"] for part in parts) if len(parts) == 3 else None,
        (1.01, 1.002),
    )


def _compute_bound(results: Results) -> Row:
    parts = results.all("forward", granularity="sublayer", shape_index=3)
    return row_of(
        "the same at (8,2048), resident and streamed alternating",
        "<= 1.01",
        "1.003",
        _ratios(parts),
        greatest(part["ratio"] for part in parts),
        (1.01, 1.003),
    )


def _modes(results: Results) -> Row:
    shapes = {part["shape"] for part in results.all("mode")}
    won = 0
    for shape in shapes:
        parts = results.all("mode", shape=shape)
        best = min(parts, key=lambda part: part["streamed_ms"]["median"])
        won += best["mode"] == "pipeline"
    count = len(results.all("mode"))
    return row_of(
        "all four modes x both layouts",
        "in one table",
        "the pipeline first everywhere",
        f"{count} of {7 * len(shapes)} below; the pipeline first at {won} of {len(shapes)} shapes",
        float(len(shapes) - won) if shapes and count == 7 * len(shapes) else None,
        (None, 0.0),
    )


def _wrapper_us(results: Results) -> float | None:
    """What the wrapper adds to what the calls themselves count."""
    idle = results.one("submit_idle")
    return idle["us_per_unit"] - idle["inside_us_per_unit"] if idle else None


def _unit_us(results: Results) -> float | None:
    """All of ours for a unit, between a model's launches."""
    wrapper_us = _wrapper_us(results)
    parts = results.all("submit", shape_index=0)
    if wrapper_us is None:
        return None
    return greatest(part["inside_us_per_unit"] + wrapper_us for part in parts)


def _unit_cost(results: Results) -> Row:
    idle, wrapper_us = results.one("submit_idle"), _wrapper_us(results)
    measured = "".join(
        f"{part['inside_us_per_unit']:.1f} us inside our calls"
        for part in results.all("submit", shape_index=0)
    ) + "".join(
        f"; {part['inside_us_per_unit']:.1f} us with small units and no pause between forwards"
        for part in results.all("submit_thin")
    )
    if idle:
        measured += (
            f"; {wrapper_us:.1f} us more in the wrapper, "
            f"{idle['us_per_unit']:.1f} us in all where units compute nothing"
        )
    return row_of(
        "our CPU time per unit at (1,1)",
        "<= 20 us",
        "8 us",
        measured,
        _unit_us(results),
        (20.0, 8.0),
    )


def _submission(results: Results) -> Row:
    parts = results.all("submit")
    return row_of(
        "CPU until `forward()` returns, beyond the plain model's",
        "<= 0.7 ms",
        "0.3 ms",
        ", ".join(map(_beyond_plain, parts))
        + "".join(
            f"; with small units and no pause between forwards {part['beyond_plain_ms']:.2f} ms"
            for part in results.all("submit_thin")
        )
        + "".join(
            f", of which the five calls into the driver alone {part['beyond_plain_ms']:.2f} ms"
            for part in results.all("submit_driver")
        ),
        greatest(part["beyond_plain_ms"] for part in parts),
        (0.7, 0.3),
    )


def _beyond_plain(part: Figures) -> str:
    text = f"{tuple_of(part['shape'])} {part['beyond_plain_ms']:.2f} ms"
    if (wire := part.get("wire_beyond_plain_ms")) is not None:
        text += f" (plain beside bare copies: {wire['median']:.2f})"
    return text


def _nothing_of_ours(results: Results) -> Row:
    part = results.one("outside")
    figure = "host waits, device allocations, pageable copies of ours in a forward"
    if part is None or part["ours"] is None:
        return Row(figure, "0", "", "-", "not measured")
    ours, device = part["ours"], part["counted_by_device"]
    counts = [ours["host_waits"], ours["allocations"], ours["pageable_copies"]]
    allocator = [
        memory["allocator"][name] - memory["plain_allocator"][name]
        for memory in results.all("memory")
        if memory["allocator"] is not None
        for name in memory["allocator"]
    ]
    inside = [device["host_synchronizes"], device["allocations"]]
    measured = (
        f"profiler {counts[0]}, {counts[1]}, {counts[2]}; device {inside[0]:.0f}, {inside[1]:.0f}; "
        f"allocator {max(allocator, default=0):+d}"
    )
    value = float(max([*counts, *inside, *allocator]))
    return row_of(figure, "0", "", measured, value, (0.0, None))


def _window(results: Results) -> Row:
    worst: dict[str, tuple[float, float]] = {}
    for granularity in GRANULARITIES:
        parts = results.all("forward", granularity=granularity)
        if len(parts) == 4:
            layers = parts[0]["window_bytes"] / parts[0]["layer_bytes"]
            worst[granularity] = (layers, max(part["ratio"] for part in parts))
    within = [layers for layers, ratio in worst.values() if ratio <= 1.01]
    measured = ", ".join(
        f"{granularity} {layers:.2f} layers at {ratio:.3f}"
        for granularity, (layers, ratio) in worst.items()
    )
    value = (min(within) if within else float("inf")) if worst else None
    return row_of(
        "window at <= 1.01 of the roofline, all four shapes",
        "<= 2 layers",
        "<= 1 layer",
        measured,
        value,
        (2.0, 1.0),
    )


def _activations(results: Results) -> Row:
    parts = [part for part in results.all("memory") if part["activation_bytes"] is not None]
    beyond = {
        part["shape"]: part["activation_bytes"]
        + part["extra_bytes_at_rest"]
        - part["plain_activation_bytes"]
        for part in parts
    }
    # As a share of what is allowed, so that both kinds of limit fit one verdict.
    shares = [
        beyond[part["shape"]]
        / (0.01 * part["plain_activation_bytes"] if part["shape_index"] == 3 else 2 * _MIB)
        for part in parts
    ]
    measured = ", ".join(
        f"{tuple_of(part['shape'])} {beyond[part['shape']] / _MIB:+.2f} MiB of "
        f"{part['plain_activation_bytes'] / _MIB:.0f}"
        for part in parts
    )
    return row_of(
        "device memory beyond resident + window + the plain model's activations",
        "+1 % at (8,2048), +2 MiB elsewhere",
        "",
        measured,
        greatest(shares),
        (1.0, None),
    )


def _page_locked(results: Results) -> Row:
    parts = results.all("offload")
    value = greatest(part["page_locked_ratio"] for part in parts)
    return row_of(
        "page-locked bytes / bytes of the weights",
        "<= 1.01",
        "",
        f"{value:.4f}" if value is not None else "",
        value,
        (1.01, None),
    )


def _host_peak(results: Results) -> Row:
    part = results.one("offload", source="cpu")
    measured = ""
    if part is not None:
        measured = (
            f"{part['host_bytes_used'] / 1e9:.2f} GB for {part['model_bytes'] / 1e9:.2f} GB, "
            f"{part['host_ratio']:.3f} of model + unit"
        )
    return row_of(
        "peak of host memory while offloading",
        "model + one unit + 5 %",
        "",
        measured,
        part["host_ratio"] if part is not None else None,
        (1.05, None),
    )


def _offload_rate(results: Results) -> Row:
    rates = {part["source"]: part["offload_bytes_per_s"] / 1e9 for part in results.all("offload")}
    return row_of(
        "`offload()` itself",
        ">= 3 GB/s of weights",
        "5 GB/s",
        ", ".join(f"from the {source.upper()} {rate:.1f} GB/s" for source, rate in rates.items()),
        min(rates.values()) if rates else None,
        (3.0, 5.0),
        at_least=True,
    )


def _deep(results: Results) -> Row:
    parts = results.all("deep")
    measured = "; ".join(
        f"{tuple_of(part['shape'])} {part['ratio']:.3f}, caller kept {part['submit_ms']:.0f} ms "
        f"(plain {part['plain_submit_ms']:.0f})"
        for part in parts
    )
    return row_of(
        "80 layers of 8B shape: pipeline / roofline, CPU blocked",
        "measured, explained",
        "<= 1.01",
        measured,
        greatest(part["ratio"] for part in parts),
        (None, 1.01),
    )


def _split_activations(results: Results) -> Row:
    pairs = []
    for shape in results.shapes():
        shared, split = (
            results.one("mode", mode="pipeline", streams=streams, shape=shape)
            for streams in ("shared", "split")
        )
        if shared and split and shared["activation_bytes"] is not None:
            pairs.append((shape, shared["activation_bytes"], split["activation_bytes"]))
    return row_of(
        "activations under `split` against `shared`",
        "measured",
        "",
        ", ".join(
            f"{tuple_of(shape)} {split / _MIB:.0f} against {shared / _MIB:.0f} MiB"
            for shape, shared, split in pairs
        ),
        0.0 if pairs else None,
        (None, None),
    )


_ROWS: tuple[Callable[[Results], Row], ...] = (
    _link_bound,
    _compute_bound,
    _modes,
    _unit_cost,
    _submission,
    _nothing_of_ours,
    _window,
    _activations,
    _page_locked,
    _host_peak,
    _offload_rate,
    _deep,
    _split_activations,
    *FILE_ROWS,
    *SEEN_ROWS,
    *PLANNER_ROWS,
    *PACKED_ROWS,
)


def rows(results: Results) -> list[Row]:
    """Every figure that was asked for, measured or not."""
    return _made(_ROWS, results)


def chosen_rows(results: Results) -> list[Row]:
    """The few that the README shows, where the others say too much in fewer words."""
    return _made(_CHOSEN_ROWS, results)


def _made(makers: Iterable[Callable[[Results], Row]], results: Results) -> list[Row]:
    results.take_machines_read()
    return [replace(make(results), machine=results.take_machines_read()) for make in makers]


def _in_short(row: Row, figure: str, measured: str) -> Row:
    return replace(row, figure=figure, measured=measured if row.measured != "-" else "-")


def _short_ratios(parts: Iterable[Figures]) -> str:
    return ", ".join(
        f"{tuple_of(part['shape'])} {part['ratio']:.3f}"
        f" ({part['streamed_ms']['median']:.0f} / {part['roofline_ms']:.0f} ms)"
        for part in parts
    )


def _link_bound_in_short(results: Results) -> Row:
    row = _link_bound(results)
    parts = results.all("forward", granularity="sublayer")
    listed = _short_ratios(part for part in parts if part["shape_index"] < 3)
    return _in_short(row, "a forward / roofline, the link being the limit", listed)


def _compute_bound_in_short(results: Results) -> Row:
    row = _compute_bound(results)
    listed = _short_ratios(results.all("forward", granularity="sublayer", shape_index=3))
    return _in_short(row, "the same, kernels being the limit", listed)


def _unit_cost_in_short(results: Results) -> Row:
    row = _unit_cost(results)
    return _in_short(row, row.figure, f"{_unit_us(results) or 0.0:.1f} us")


_CHOSEN_ROWS: tuple[Callable[[Results], Row], ...] = (
    _link_bound_in_short,
    _compute_bound_in_short,
    _unit_cost_in_short,
    _page_locked,
    packed_link_bound,
    within_budget,
    accelerate,
    airllm,
    beside_peer,
)
