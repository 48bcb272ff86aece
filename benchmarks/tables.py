"""The results as tables: times of one forward side by side, and all of it for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from figures import GRANULARITIES, Document, Figures, Results, rows, tuple_of


def forward_table(results: Results) -> list[list[str]]:
    """Times of one forward in ms, a line per model and a column per shape; the header first.

    Lines of different GPUs stand in one table, and say which: only those of one compare.
    """
    shapes = results.shapes()

    def line(title: str, value_of: Callable[[str], float | None]) -> list[str] | None:
        results.take_machines_read()
        values = [value_of(shape) for shape in shapes]
        if all(value is None for value in values):
            return None
        times = ("-" if value is None else f"{value:.1f}" for value in values)
        return [title, *times, results.take_machines_read()]

    def any_of(shape: str, name: str) -> float | None:
        for what in ("forward", "mode", "peer"):
            part = results.one(what, shape=shape)
            if part is not None and name in part:
                return _median(part[name])
        return None

    def forward_of(granularity: str) -> Callable[[str], float | None]:
        return lambda shape: _streamed_ms(
            results.one("forward", granularity=granularity, shape=shape)
        )

    def mode_of(mode: str, streams: str) -> Callable[[str], float | None]:
        return lambda shape: _streamed_ms(
            results.one("mode", mode=mode, streams=streams, shape=shape)
        )

    def packed_of(shape: str) -> float | None:
        part = results.one("packed", shape=shape)
        return None if part is None else _median(part["packed_ms"])

    def peer_of(peer: str) -> Callable[[str], float | None]:
        return lambda shape: _streamed_ms(results.one("peer", peer=peer, shape=shape))

    lines = [
        line("link floor", lambda shape: any_of(shape, "floor_ms")),
        line("link floor, small buffer", lambda shape: any_of(shape, "hot_floor_ms")),
        line("resident", lambda shape: any_of(shape, "plain_ms")),
        *(line(f"pipeline, units: {name}", forward_of(name)) for name in GRANULARITIES),
        line("pipeline, packed", packed_of),
        *(
            line(f"mode {mode}, {streams}", mode_of(mode, streams))
            for mode in ("pipeline", "events", "streams", "sync")
            for streams in ("shared", "split")
        ),
        line("bare event pipeline in Python", peer_of("bare")),
        line("accelerate `cpu_offload`", peer_of("accelerate")),
    ]
    return [
        ["ms per forward", *(tuple_of(shape) for shape in shapes), "GPU"],
        *(entry for entry in lines if entry is not None),
    ]


def _median(value: float | dict[str, float]) -> float:
    return value["median"] if isinstance(value, dict) else value


def _streamed_ms(part: Figures | None) -> float | None:
    return None if part is None else _median(part["streamed_ms"])


def print_results(documents: dict[str, Document]) -> None:
    """Prints the tables for people."""
    from rich.console import Console
    from rich.table import Table

    results = Results(documents)
    console = Console(width=120)
    tiny = any(document["tiny"] for document in documents.values())
    note = " (tiny models: the figures say nothing about speed)" if tiny else ""
    header, *lines = forward_table(results)
    if lines:
        table = Table(title=f"One forward{note}", title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for entry in lines:
            table.add_row(*entry)
        console.print(table)
    table = Table(title=f"Figures{note}", title_justify="left", show_lines=True)
    for name in ("figure", "must", "aim", "measured", "reached", "GPU"):
        table.add_column(name)
    for row in rows(results):
        verdict = "-" if tiny else row.verdict
        table.add_row(row.figure, row.must, row.aim, row.measured, verdict, row.machine)
    console.print(table)
    for name, status, reason in results.failures():
        console.print(f"{status}: {name}: {reason}", markup=False)
