"""Rows of the table of figures for packed transport."""

from __future__ import annotations

from collections.abc import Callable

from measured import Results, Row, greatest, row_of, tuple_of


def _bits(results: Results) -> Row:
    parts = results.all("packing", codec="e33")
    return row_of(
        "packed, bits a weight, all side data",
        "<= 11.2",
        "<= 10.9",
        ", ".join(f"{part['bits_a_weight']:.2f}" for part in parts),
        greatest(part["bits_a_weight"] for part in parts),
        (11.2, 10.9),
    )


def packed_link_bound(results: Results) -> Row:
    parts = [part for index in range(3) for part in results.all("packed", shape_index=index)]
    return row_of(
        "packed forward / raw floor at (1,1), (8,512), (1,2048)",
        "<= 0.71",
        "<= 0.67",
        ", ".join(f"{tuple_of(part['shape'])} {part['of_raw_floor']:.3f}" for part in parts),
        greatest(part["of_raw_floor"] for part in parts) if len(parts) == 3 else None,
        (0.71, 0.67),
    )


def _compute_bound(results: Results) -> Row:
    packed, chosen = results.one("packed", shape_index=3), results.one("packed_auto")
    return row_of(
        'what `transport="auto"` chooses at (8,2048), after a profile / max(raw floor, resident)',
        "<= 1.01",
        "1.005",
        ""
        if chosen is None
        else f"{chosen['of_roofline']:.3f}"
        + ("" if packed is None else f"; all packed {packed['of_roofline']:.3f}"),
        None if chosen is None else chosen["of_roofline"],
        (1.01, 1.005),
    )


def beside_peer(results: Results) -> Row:
    parts = results.all("packed_peer")
    return row_of(
        "DFloat11 0.5 / packed forward, same run",
        "faster at all four",
        "",
        ", ".join(
            f"{tuple_of(part['shape'])} {part['peer_of_ours']:.2f}x"
            f" ({part['peer_ms']['median']:.0f} / {part['ours_ms']['median']:.0f} ms)"
            for part in parts
        ),
        min(part["peer_of_ours"] for part in parts) if len(parts) == 4 else None,
        (1.0, None),
        at_least=True,
    )


def _decoder(results: Results) -> Row:
    rates = {
        part["codec"]: part["bytes_per_s"]["0"]["median"] / 1e12
        for part in results.all("decoder")
        if part["codec"] != "raw"
    }
    return row_of(
        "decoder alone, out",
        ">= 1.5 TB/s",
        "2.1 TB/s",
        ", ".join(f"{codec} {rate:.2f} TB/s" for codec, rate in rates.items()),
        min(rates.values()) if rates else None,
        (1.5, 2.1),
        at_least=True,
    )


def _beside(results: Results) -> Row:
    kept = {part["codec"]: part["rate_kept"] for part in results.all("beside")}
    return row_of(
        "copy rate while decoding / alone",
        ">= 0.98",
        "",
        ", ".join(f"{codec} {share:.3f}" for codec, share in kept.items()),
        min(kept.values()) if kept else None,
        (0.98, None),
        at_least=True,
    )


def _packing(results: Results) -> Row:
    rates = {
        part["codec"]: part["bytes_per_s"]["median"] / 1e9
        for part in results.all("packing")
        if part["codec"] != "raw"
    }
    return row_of(
        "packing, weights a second on 16 cores",
        ">= 10 GB/s",
        "25 GB/s",
        ", ".join(f"{codec} {rate:.1f} GB/s" for codec, rate in rates.items()),
        min(rates.values()) if rates else None,
        (10.0, 25.0),
        at_least=True,
    )


def within_budget(results: Results) -> Row:
    by = {part["transport"]: part["streamed_ms"]["median"] for part in results.all("packed_budget")}
    ratio = by["packed"] / by["raw"] if {"packed", "raw"} <= set(by) else None
    return row_of(
        "60 % of the weights, (1,1): packed plan / best raw plan",
        "<= 0.45",
        "0.30",
        "" if ratio is None else f"{ratio:.3f} ({by['packed']:.1f} / {by['raw']:.1f} ms)",
        ratio,
        (0.45, 0.30),
    )


def _all_resident(results: Results) -> Row:
    part = results.one("packed_resident", shape_index=0)
    measured_ms = part["packed_ms"]["median"] if part else None
    return row_of(
        "all packed and resident, (1,1)",
        "<= 35 ms",
        "25 ms",
        f"{measured_ms:.1f} ms (resident {part['plain_ms']['median']:.1f} ms)" if part else "",
        measured_ms,
        (35.0, 25.0),
    )


def _page_locked(results: Results) -> Row:
    part = results.one("packed_masters")
    share = part["page_locked_share"] if part else None
    return row_of(
        'page-locked bytes / weights that stream, `masters="packed"`',
        "<= 0.72",
        "",
        "" if share is None else f"{share:.3f}",
        share,
        (0.72, None),
    )


PACKED_ROWS: tuple[Callable[[Results], Row], ...] = (
    _bits,
    packed_link_bound,
    _compute_bound,
    beside_peer,
    within_budget,
    _all_resident,
    _decoder,
    _beside,
    _packing,
    _page_locked,
)
