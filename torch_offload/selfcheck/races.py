"""Lanes of the published races and of those that were tried: each planted, each with its twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_offload import _C
from torch_offload.selfcheck.lane import Effort, Lane, Tally
from torch_offload.selfcheck.plants import PLANTS

_NUM_PUBLISHED = 18


def is_seen(race: _C.PublishedRace, device: torch.device, *, planted: bool) -> bool:
    """Whether a race, or else its twin, comes to light as it should.

    Those that are calls of a device run on a host device of their own; those that live above it,
    on `device`.
    """
    if race.python_test is None:
        is_caught, findings = _C.run_race(race, _C.Device(torch.device("cpu")), planted=planted)
        return is_caught or bool(findings)
    (plant,) = (plant for plant in PLANTS if plant.id == race.id)
    return plant.run(device, planted)


class _Races(Lane):
    def __init__(self) -> None:
        self._races = self._chosen(_C.published_races())

    @staticmethod
    def _chosen(races: Sequence[_C.PublishedRace]) -> Sequence[_C.PublishedRace]:
        raise NotImplementedError

    def control(self) -> Tally:
        """A twin that is said to be planted."""
        tally = Tally()
        tally.must(is_seen(self._races[0], _device(), planted=False), "the twin is not seen")
        return tally

    def run(self, effort: Effort) -> Tally:
        """All of them, whatever the effort."""
        tally = Tally()
        caught = 0
        for number, race in enumerate(self._races, 1):
            is_caught = is_seen(race, _device(), planted=True)
            is_clean = not is_seen(race, _device(), planted=False)
            caught += is_caught
            what = f"{race.id}, {race.what} ({race.where})"
            verdict = "is not caught" if not is_caught else "is caught, and so is its clean twin"
            tally.must(is_caught and is_clean, f"{what}: {verdict}")
            effort.progress(number, len(self._races))
        tally.note = f"{caught} of {len(self._races)} caught, {tally.count} twins pass"
        tally.figures = {"caught": caught, "of": len(self._races)}
        return tally


class PublishedRaces(_Races):
    """Those that shipped in systems of this kind."""

    name = "published races"
    tried = "the races that others have shipped, each planted and each with its clean twin"
    counts = "published races caught"

    @staticmethod
    def _chosen(races: Sequence[_C.PublishedRace]) -> Sequence[_C.PublishedRace]:
        return races[:_NUM_PUBLISHED]


class TriedRaces(_Races):
    """Those that were found while this was built."""

    name = "tried races"
    tried = "the faults that we met ourselves, each planted and each with its clean twin"
    counts = "tried races caught"

    @staticmethod
    def _chosen(races: Sequence[_C.PublishedRace]) -> Sequence[_C.PublishedRace]:
        return races[_NUM_PUBLISHED:]


def _device() -> torch.device:
    if torch.cuda.is_available() and _C.has_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
