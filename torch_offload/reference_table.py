"""The reference table: published and ours, side by side, with a note for each difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torch_offload.reference import PRINTED, Figures, LayerTimes, Published, published
from torch_offload.simulate import MODES, figures_of


@dataclass(frozen=True)
class ReferenceTable:
    """All that the table shows.

    Attributes:
        times: The four durations.
        layers: How many layers.
        batch: Sequences of which each forward makes one token.
        streams: Layout of our modes other than `sync`.
        published: Recomputed by formula.
        ours: Simulated, by mode.
    """

    times: LayerTimes
    layers: int
    batch: int
    streams: str
    published: Published
    ours: Mapping[str, Figures]

    @property
    def is_the_reference(self) -> bool:
        """Whether the inputs are those of the printed figures."""
        return (self.times, self.layers, self.batch) == (LayerTimes(), 80, 100)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""

        def plain(figures: Figures) -> dict[str, Any]:
            return {**asdict(figures), "tokens_per_hour": figures.tokens_per_hour}

        return {
            "inputs": {
                **asdict(self.times),
                "layers": self.layers,
                "batch": self.batch,
                "streams": self.streams,
            },
            "published": {
                "events": plain(self.published.events),
                "sync": plain(self.published.sync),
                "printed": PRINTED if self.is_the_reference else {},
            },
            "ours": {mode: plain(figures) for mode, figures in self.ours.items()},
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """What the two differ in, and why; numbered from 1 in the table."""
        times, theirs, ours = self.times, self.published, self.ours
        first_ms, compute_ms = times.mha_h2d_ms, times.compute_ms
        ran_ms, printed_ms = ours["sync"].total_ms, theirs.sync.total_ms
        events, pipeline = ours["events"], ours["pipeline"]
        shown_ms = (1 - events.hidden_share) * times.copy_ms
        steady_ms = self.layers * pipeline.layer_ms
        printed = self.is_the_reference
        return [
            f"Published sync counts the next layer's first copy ({first_ms:g} ms) with each layer"
            + (", printed as 205.42 ms" if printed else "")
            + f". So {_seconds(printed_ms)} for all layers counts every next copy twice; a run "
            f"takes {self.layers} x {ours['sync'].layer_ms:.2f} ms = {_seconds(ran_ms)}.",
            f"Tokens an hour are 3600 times those of {_seconds(theirs.events.total_ms)} and "
            f"{_seconds(printed_ms)}"
            + (
                "; printed are 24,480 and 21,960, which are 3600 times the rounded 6.8 and 6.1."
                if printed
                else "."
            ),
            f"GPU use is the computing ({compute_ms:g} ms) over the layer"
            + ("; the printed 82 % and 75 % do not follow from the inputs." if printed else "."),
            "Published: 3 copies and 2 launches of 0.010 ms, 2 events and a wait of 0.001 ms, a "
            "second wait of 0.011 ms. Ours: each of our calls at the same prices, a wait 0.001 ms; "
            "where the host is blocked, that counts.",
            "Published says all copy time is hidden, although the first copy of a layer shows. "
            f"Ours is the copy time in which no compute waited: under events {shown_ms:.2f} of "
            f"{times.copy_ms:.2f} ms show in each layer.",
            "Published counts streams with work queued. Ours counts those that work at one moment: "
            "with one copy engine a copy and a compute. Its own timeline shows no more.",
            "In the steady state of the pipeline the first copy of a layer, and of a forward, is "
            f"hidden as well: {pipeline.layer_ms:.2f} against {events.layer_ms:.2f} ms a layer. "
            f"All layers are {self.layers} x {pipeline.layer_ms:.2f} ms and, from a cold start, "
            f"{pipeline.total_ms - steady_ms:.2f} ms more.",
        ]

    def __rich__(self) -> RenderableType:
        """For a terminal."""
        title = (
            f"{self.layers} layers of {self.times.mha_h2d_ms:g} + {self.times.mha_compute_ms:g} ms "
            f"(attention) and {self.times.ffn_h2d_ms:g} + {self.times.ffn_compute_ms:g} ms (FFN), "
            f"batch {self.batch}"
        )
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for heading in ("events\nthere", "sync\nthere", *(f"{mode}\nours" for mode in self.ours)):
            table.add_column(heading, justify="right", no_wrap=True)
        columns = [self.published.events, self.published.sync, *self.ours.values()]
        for name, marks, text in _ROWS:
            table.add_row(f"{name} {marks}".rstrip(), *map(text, columns))
        notes = Table.grid(padding=(0, 1))
        for number, said in enumerate(self.notes(), start=1):
            notes.add_row(Text(f"[{number}]"), Text(said))
        return Group(table, notes)


def reference_table(
    times: LayerTimes, layers: int, batch: int, streams: str = "shared"
) -> ReferenceTable:
    """Makes the table: formulas for *published*, four simulations for *ours*.

    Raises:
        ValueError: For invalid numbers.
    """
    for name, value, most in (("layers", layers, 2000), ("batch", batch, 1_000_000)):
        if not 1 <= value <= most:
            raise ValueError(f"expected {name} between 1 and {most:,}, got {value}")
    return ReferenceTable(
        times=times,
        layers=layers,
        batch=batch,
        streams=streams,
        published=published(times, layers, batch),
        ours={mode: figures_of(times, layers, batch, mode, streams) for mode in MODES},
    )


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.2f} s"


def _milliseconds(ms: float) -> str:
    return f"{ms:,.3f}" if ms < 1 else f"{ms:,.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


_ROWS: tuple[tuple[str, str, Callable[[Figures], str]], ...] = (
    ("a layer, ms", "\\[1,7]", lambda figures: _milliseconds(figures.layer_ms)),
    ("all layers, s", "\\[1]", lambda figures: f"{figures.total_ms / 1e3:.2f}"),
    ("tokens a second", "", lambda figures: f"{figures.tokens_per_second:,.1f}"),
    ("tokens an hour", "\\[2]", lambda figures: f"{figures.tokens_per_hour:,.0f}"),
    ("CPU a layer, ms", "\\[4]", lambda figures: _milliseconds(figures.cpu_ms)),
    ("CPU blocked, %", "", lambda figures: _percent(figures.blocked_share)),
    ("copies hidden, %", "\\[5]", lambda figures: _percent(figures.hidden_share)),
    ("streams at once", "\\[6]", lambda figures: str(figures.streams_at_once)),
    ("GPU use, %", "\\[3]", lambda figures: _percent(figures.gpu_share)),
)
