"""Many forwards of changing shapes between random edits: right bits, and nothing grows."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import torch_offload
from tests.lanes.leftovers import Devices, Process
from tests.python import expect
from torch_offload.devices import devices_made_by
from torch_offload.selfcheck.lane import Effort, Lane, Tally
from torch_offload.selfcheck.subjects import Stack

HOST = torch.device("cpu")
_WIDTH = 16
_WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"streams": "split"},
    {"mode": "events"},
    {"mode": "streams"},
    {"mode": "sync"},
    {"granularity": "module"},
    {"granularity": "layer"},
    {"depth": None},
)
# Until the units are cut and the order is learned.
_WARM_UP = 5

Edit = Callable[[random.Random, torch_offload.Handle, list[nn.Module]], None]


def _in_place(choice: random.Random, handle: torch_offload.Handle, models: list[nn.Module]) -> None:
    name = choice.choice([name for name, _ in models[0].named_parameters()])
    for model in models:
        model.get_parameter(name).mul_(0.99)


def _one_element(
    choice: random.Random, handle: torch_offload.Handle, models: list[nn.Module]
) -> None:
    """Which no counter shows: it needs `refresh`."""
    name = choice.choice([name for name, _ in models[0].named_parameters()])
    value = choice.uniform(-1, 1)
    for model in models:
        model.get_parameter(name).data.view(-1)[-1] = value
    handle.refresh()


def _replaced(choice: random.Random, handle: torch_offload.Handle, models: list[nn.Module]) -> None:
    block, seed = choice.randrange(4), choice.randrange(2**31)
    values = torch.randn(_WIDTH, _WIDTH, generator=torch.Generator().manual_seed(seed)) / 8
    for model in models:
        model.blocks[block].attn.weight = nn.Parameter(values.clone())
    torch_offload.align(models[1])


def _loaded(choice: random.Random, handle: torch_offload.Handle, models: list[nn.Module]) -> None:
    state = {name: value * 1.01 for name, value in models[1].state_dict().items()}
    for model in models:
        model.load_state_dict(state)


def _refresh(choice: random.Random, handle: torch_offload.Handle, models: list[nn.Module]) -> None:
    handle.refresh()


_EDITS: tuple[Edit, ...] = (_in_place, _one_element, _replaced, _loaded, _refresh)


class Soak(Lane):
    """So many forwards, shared out to all ways to stream."""

    name = "soak"
    tried = "forwards of changing shapes and orders, random edits with refresh: bits and counters"
    counts = "forwards bit-equal"

    def control(self) -> Tally:
        """An edit of one element that the streamed model does not get, as if it were missed."""

        def unseen(
            choice: random.Random, handle: torch_offload.Handle, models: list[nn.Module]
        ) -> None:
            models[1].get_parameter("blocks.0.attn.weight").data.view(-1)[1] += 1.0

        tally = Tally()
        self._soak(tally, {"gpu_budget": None}, 40, seed=1, edits=(unseen,))
        return tally

    def run(self, effort: Effort) -> Tally:
        """Quick: 400 forwards; full: 10,000."""
        tally = Tally()
        share = effort.pick(400, 10_000) // len(_WAYS)
        for number, way in enumerate(_WAYS, 1):
            self._soak(tally, {"depth": 0, "gpu_budget": None} | way, share, seed=number)
            effort.progress(number, len(_WAYS))
        tally.note = f"{tally.figures['edits']:,} edits; counters as at the start"
        return tally

    @torch.no_grad()
    def _soak(
        self,
        tally: Tally,
        options: dict[str, Any],
        count: int,
        seed: int,
        edits: tuple[Edit, ...] = _EDITS,
    ) -> None:
        choice = random.Random(seed)
        process, devices = Process.now(), Devices()
        torch.manual_seed(seed)
        model: Any = torch_offload.align(Stack(4, _WIDTH).eval())
        plain: Any = torch_offload.align(copy.deepcopy(model))
        num_edits = 0
        with warnings.catch_warnings(), devices_made_by(devices):
            warnings.filterwarnings("ignore", "torch_offload: the first forward called")
            handle = torch_offload.offload(model, HOST, **options)
            for number in range(count):
                if number == _WARM_UP:
                    held, running = devices.held(), Process.now()
                if number > _WARM_UP and choice.random() < 0.3:
                    choice.choice(edits)(choice, handle, [model, plain])
                    num_edits += 1
                if choice.random() < 0.1:
                    model.sequence = plain.sequence = choice.choices(range(4), k=4)
                x = torch.randn(choice.randint(1, 9), _WIDTH)
                tally.must(torch.equal(model(x), plain(x)), f"{options}: forward {number} differs")
            expect.assert_at_rest(handle)
            if devices.held() != held:
                tally.add_fault(f"{options}: holds {devices.held()}, was {held}")
            if gained := running.gained():
                tally.add_fault(f"{options}: has {gained} while offloaded")
            handle.remove()
        if devices.held().memory != (0, 0, 0):
            tally.add_fault(f"{options}: left {devices.held()}")
        for name, parameter in plain.named_parameters():
            if not torch.equal(model.get_parameter(name), parameter):
                tally.add_fault(f"{options}: {name} has other values after remove()")
        devices.last = None
        if gained := process.gained():
            tally.add_fault(f"{options}: left {gained}")
        tally.figures["edits"] = tally.figures.get("edits", 0) + num_edits
