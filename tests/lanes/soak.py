"""Many forwards of changing shapes between random edits: bits and copies right, nothing grows."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import torch_offload
from tests.lanes.edits import EditedPasses
from tests.lanes.leftovers import Devices, Process
from tests.python import expect
from torch_offload.calls import unwrap
from torch_offload.devices import devices_made_by
from torch_offload.selfcheck.lane import Effort, Lane, Tally, all_caught
from torch_offload.selfcheck.subjects import Stack

HOST = torch.device("cpu")
# Narrower ones are not worth packing.
_WIDTH, _PACKED_WIDTH = 16, 128
_WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"streams": "split"},
    {"mode": "events"},
    {"mode": "streams"},
    {"mode": "sync"},
    {"granularity": "module"},
    {"granularity": "layer"},
    {"depth": None},
    {"transport": "packed"},
    {"transport": "packed", "mode": "events", "streams": "split"},
    {"transport": "packed_resident"},
    {"transport": "packed", "masters": "packed"},
    {"transport": "packed_resident", "masters": "packed", "streams": "split"},
)
# Until the units are cut and the order is learned.
_WARM_UP = 5


class Streamed:
    """A streamed model beside its plain one."""

    def __init__(
        self, options: dict[str, Any], choice: random.Random, *, knows_packing: bool = True
    ) -> None:
        self.choice = choice
        is_packed = "transport" in options
        self.width = _PACKED_WIDTH if is_packed else _WIDTH
        self.dtype = torch.bfloat16 if is_packed else torch.float32
        self.model: Any = torch_offload.align(Stack(4, self.width).eval().to(self.dtype))
        self.plain: Any = torch_offload.align(copy.deepcopy(self.model))
        self.handle = torch_offload.offload(self.model, HOST, **options)
        self.passes = EditedPasses(self.handle, knows_packing=knows_packing)
        self._cuts_leaves = options.get("granularity") == "module"

    @property
    def both(self) -> tuple[Any, Any]:
        """The streamed model, and the plain one."""
        return self.model, self.plain

    def weight(self) -> str:
        """The name of one parameter or other."""
        return self.choice.choice([name for name, _ in self.plain.named_parameters()])

    def values(self, rows: int, seed: int | None = None) -> torch.Tensor:
        """Random ones, of the model's width."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.randn(rows, self.width, generator=generator).to(self.dtype)

    def forward(self, x: torch.Tensor) -> int:
        """One forward of both. Returns how many copies it took.

        Raises:
            AssertionError: If they differ, or it did not copy what it must.
        """
        must = self.plain(x)
        if self._cuts_leaves:  # in the first forward, of which the oracle can know nothing
            self._cuts_leaves = False
            assert torch.equal(self.model(x), must), "differs"
            return 0
        with self.passes.watched() as calls:
            output = self.model(x)
        assert torch.equal(output, must), "differs"
        assert len(calls.passes) == 1, "was not streamed"
        return calls.passes[0].onloads


Edit = Callable[[Streamed], None]


def _in_place(streamed: Streamed) -> None:
    name = streamed.weight()
    for model in streamed.both:
        model.get_parameter(name).mul_(0.99)
    streamed.passes.edited([name])


def _one_element(streamed: Streamed) -> None:
    """Which no counter shows: it needs `refresh`."""
    name, value = streamed.weight(), streamed.choice.uniform(-1, 1)
    for model in streamed.both:
        model.get_parameter(name).data.view(-1)[-1] = value
    streamed.handle.refresh()
    streamed.passes.refreshed([name])


def _replaced(streamed: Streamed) -> None:
    block, seed = streamed.choice.randrange(4), streamed.choice.randrange(2**31)
    values = streamed.values(streamed.width, seed) / 8
    for model in streamed.both:
        model.blocks[block].attn.weight = nn.Parameter(values.clone())
    torch_offload.align(streamed.plain)
    streamed.passes.replaced([f"blocks.{block}.attn.weight"])


def _loaded(streamed: Streamed) -> None:
    state = {name: value * 1.01 for name, value in streamed.plain.state_dict().items()}
    for model in streamed.both:
        model.load_state_dict(state)
    streamed.passes.edited(list(state))


def _unseen(streamed: Streamed) -> None:
    """Of the plain model alone, as if it were missed."""
    streamed.plain.get_parameter("blocks.0.attn.weight").data.view(-1)[1] += 1.0


def _unwrapped(streamed: Streamed) -> None:
    """As if nothing had ever been installed: the bits stay right."""
    for unit in streamed.handle.units:
        unwrap(streamed.model.get_submodule(unit.name))


def _passed_by(streamed: Streamed) -> None:
    """The same, behind wrappers that look as if they were ours."""
    for unit in streamed.handle.units:
        module = streamed.model.get_submodule(unit.name)
        unwrap(module)
        vars(module)["_call_impl"] = module._call_impl


_EDITS: tuple[Edit, ...] = (_in_place, _one_element, _replaced, _loaded)


class Soak(Lane):
    """So many forwards, shared out to all ways to stream."""

    name = "soak"
    tried = "forwards of changing shapes and orders, random edits: bits, copies and counters"
    counts = "forwards bit-equal"

    def control(self) -> Tally:
        """An edit of one element that the streamed model does not get, and models not streamed.

        And an oracle that takes edits of packed units for those of raw ones.
        """
        controls = {}
        options = {"depth": 0, "gpu_budget": None}
        packed = {"transport": "packed", "masters": "packed"}
        for way in ({}, packed):
            for plant in (_unseen, _unwrapped, _passed_by):
                tally = controls[f"{plant.__name__} {way}"] = Tally()
                self._soak(tally, options | way, 40, seed=1, edits=(plant,))
        tally = controls["edits of raw units"] = Tally()
        self._soak(tally, options | packed, 40, seed=1, edits=(_in_place,), knows_packing=False)
        return all_caught(controls)

    def run(self, effort: Effort) -> Tally:
        """Quick: 400 forwards; full: 10,000."""
        tally = Tally()
        share = -(-effort.pick(400, 10_000) // len(_WAYS))  # no less in all
        for number, way in enumerate(_WAYS, 1):
            self._soak(tally, {"depth": 0, "gpu_budget": None} | way, share, seed=number)
            effort.progress(number, len(_WAYS))
        tally.note = (
            f"{tally.figures['edits']:,} edits; {tally.figures['copies']:,} copies as must be; "
            "counters as at the start"
        )
        return tally

    @torch.no_grad()
    def _soak(
        self,
        tally: Tally,
        options: dict[str, Any],
        count: int,
        seed: int,
        edits: tuple[Edit, ...] = _EDITS,
        *,
        knows_packing: bool = True,
    ) -> None:
        choice = random.Random(seed)
        process, devices = Process.now(), Devices()
        torch.manual_seed(seed)
        num_edits = num_copies = 0
        with warnings.catch_warnings(), devices_made_by(devices):
            warnings.filterwarnings("ignore", "torch_offload: the first forward called")
            streamed = Streamed(options, choice, knows_packing=knows_packing)
            for number in range(count):
                if number == _WARM_UP:
                    held, running = devices.held(), Process.now()
                if number > _WARM_UP and choice.random() < 0.3:
                    choice.choice(edits)(streamed)
                    num_edits += 1
                if choice.random() < 0.1:
                    sequence = choice.choices(range(4), k=4)
                    streamed.model.sequence = streamed.plain.sequence = sequence
                x = streamed.values(choice.randint(1, 9))
                tally.count += 1
                try:
                    num_copies += streamed.forward(x)
                except AssertionError as error:
                    tally.add_fault(f"{options}: forward {number}: {error}")
            expect.assert_at_rest(streamed.handle)
            if devices.held() != held:
                tally.add_fault(f"{options}: holds {devices.held()}, was {held}")
            if gained := running.gained():
                tally.add_fault(f"{options}: has {gained} while offloaded")
            streamed.handle.remove()
        if devices.held().memory != (0, 0, 0):
            tally.add_fault(f"{options}: left {devices.held()}")
        for name, parameter in streamed.plain.named_parameters():
            if not torch.equal(streamed.model.get_parameter(name), parameter):
                tally.add_fault(f"{options}: {name} has other values after remove()")
        devices.last = None
        if gained := process.gained():
            tally.add_fault(f"{options}: left {gained}")
        for figure, by in (("edits", num_edits), ("copies", num_copies)):
            tally.figures[figure] = tally.figures.get(figure, 0) + by
