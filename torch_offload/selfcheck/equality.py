"""Lanes of the whole product: streamed under delays, it gives the plain model's bits."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from torch_offload import _C
from torch_offload._C import StateError
from torch_offload.calls import unwrap
from torch_offload.config import Config
from torch_offload.devices import devices_made_by
from torch_offload.offload import offload_with
from torch_offload.selfcheck.delays import RandomDelays, delay, loading_streams
from torch_offload.selfcheck.lane import Effort, Lane, Tally, all_caught
from torch_offload.selfcheck.schedules import MODES
from torch_offload.selfcheck.subjects import SUBJECTS, Subject
from torch_offload.selfcheck.uses import Uses
from torch_offload.storage import align
from torch_offload.transport import why_nothing_decodes

_GRANULARITIES = ("sublayer", "layer", "module")
# Wide enough for a copy on a GPU to take its time; the host only has to be right.
_WIDTH_CUDA, _WIDTH_HOST = 256, 16
# Narrower ones are not worth packing.
_WIDTH_PACKED = 128
_PACKED = ("packed", "packed_resident")
# Of copies on the host device.
_LONGEST_DELAY_US = 500
# Of those that a fault is to be seen beside.
_CONTROL_DELAY_US = 20_000
# Long against the submission of a forward.
_FAULT_DELAY_MS = 60

#: Brackets the forwards that something is planted in.
Plant = Callable[[], AbstractContextManager[None]]


@cache
def _prototype(subject: Subject, width: int, dtype: torch.dtype) -> nn.Module:
    return subject.model(width).to(dtype)


@cache
def _plain(subject: Subject, width: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    plain = align(copy.deepcopy(_prototype(subject, width, dtype))).to(device)
    # A module with hooks gives up torch's fast path, and the streamed one has hooks for delays.
    for module in plain.modules():
        if not any(True for _ in module.children()):
            module.register_forward_pre_hook(lambda *_: None)
    return plain


@dataclass(frozen=True)
class Case:
    """One way to stream one model."""

    subject: Subject
    mode: Any
    streams: Any
    granularity: Any = "sublayer"
    transport: Any = "raw"

    def __str__(self) -> str:
        way = f"{self.subject.name}, {self.mode}, {self.streams}, {self.granularity}"
        return way if self.transport == "raw" else f"{way}, {self.transport}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: nothing but bf16 is packed."""
        return torch.float32 if self.transport == "raw" else torch.bfloat16

    def width(self, device: torch.device) -> int:
        """Of the model."""
        if device.type == "cuda":
            return _WIDTH_CUDA
        return _WIDTH_HOST if self.transport == "raw" else _WIDTH_PACKED


def all_cases() -> Iterator[Case]:
    """All models in all modes, layouts and granularities, and in all modes and layouts packed."""
    for subject, (mode, streams), granularity in itertools.product(SUBJECTS, MODES, _GRANULARITIES):
        yield Case(subject, mode, streams, granularity)
    granularities = itertools.cycle(_GRANULARITIES)
    for subject, (mode, streams), transport in itertools.product(SUBJECTS, MODES, _PACKED):
        yield Case(subject, mode, streams, next(granularities), transport)


def cases_on(device: torch.device) -> list[Case]:
    """Those that can be tried there: packed weights need a decoder."""
    decodes = why_nothing_decodes(device) is None
    return [case for case in all_cases() if decodes or case.transport == "raw"]


class StreamedModel:
    """A case on a device, which may have a fault, with its plain model beside it."""

    def __init__(self, case: Case, device: torch.device, seed: int, fault: str = "none") -> None:
        self._case = case
        self._device = device
        self._seed = seed
        self._fault = _C.DeviceFault(fault)
        self._model: Any = align(
            copy.deepcopy(_prototype(case.subject, case.width(device), case.dtype))
        )

    def __str__(self) -> str:
        return str(self._case)

    @property
    def transport(self) -> str:
        """Of the units that are worth packing."""
        return str(self._case.transport)

    @contextmanager
    def offloaded(self, longest_delay_us: int = _LONGEST_DELAY_US) -> Iterator[StreamedModel]:
        """Offloads the model, with poisoned places, and removes it at the end."""
        config = Config(
            mode=self._case.mode,
            streams=self._case.streams,
            granularity=self._case.granularity,
            transport=self._case.transport,
            depth=0 if self._seed % 2 == 0 else None,
            gpu_budget=None,
            poison=True,
        )

        def make(device: torch.device) -> _C.Device:
            return _C.faulty_device(
                device, self._fault, seed=self._seed, longest_delay_us=longest_delay_us
            )

        with warnings.catch_warnings(), devices_made_by(make):
            warnings.filterwarnings("ignore", "torch_offload: the first forward called")
            with offload_with(self._model, self._device, config) as self.handle:
                yield self

    def forwards(
        self, count: int, first_seed: int = 0, plant: Plant = nullcontext
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Runs forwards of other inputs each, all submitted before any is looked at.

        Args:
            count: How many.
            first_seed: Of the first one's input.
            plant: Brackets the streamed ones.

        Returns:
            What the streamed model gave, and what the plain one gives.
        """
        seeds = range(first_seed, first_seed + count)
        inputs = [self._rows(seed) for seed in seeds]
        musts = [self._plain(x) for x in inputs]
        self._synchronize()
        delays = RandomDelays(self.handle, self._seed)
        outputs = []
        with plant():
            with delays.inside(self._model):
                for x in inputs:
                    delays.before_forward()
                    outputs.append(self._model(x))
            self._synchronize()
        return list(zip(outputs, musts, strict=True))

    def forward_with_fault(
        self, held: str, seed: int, *, armed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward with the fault switched on, or not, and with copies or kernels held back.

        Of an input that nothing was computed of before: the allocator hands out memory that still
        holds what was computed in it, which must not be what is computed now.
        """
        x = self._rows(seed)
        self._synchronize()
        with self.held_back(held, armed=armed):
            output = self._model(x)
            self._synchronize()
        return output, self._plain(x)

    def _rows(self, seed: int) -> torch.Tensor:
        width = self._case.width(self._device)
        return self._case.subject.rows(width, seed, self._device).to(self._case.dtype)

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        case = self._case
        plain = _plain(case.subject, case.width(self._device), case.dtype, self._device)
        output: torch.Tensor = plain(x)
        return output

    @contextmanager
    def held_back(self, held: str, *, armed: bool) -> Iterator[None]:
        """Holds copies and decoders, or kernels back; inside, the fault is switched on, or not."""
        if self._device.type == "cuda":
            caller = [torch.cuda.current_stream(self._device)]
            for stream in loading_streams(self.handle) if held == "copies" else caller:
                delay(stream, _FAULT_DELAY_MS)
        self._fault.is_armed = armed
        try:
            yield
        finally:
            self._fault.is_armed = False

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Nothing is streamed: units compute the right bits with weights that never left."""
        modules = [self._model.get_submodule(unit.name) for unit in self.handle.units]
        masters = [(weight, weight.data) for module in modules for weight in module.parameters()]
        for module in modules:
            unwrap(module)
        for weight, master in masters:
            weight.data = master.to(self._device, copy=True)
        try:
            yield
        finally:
            for weight, master in masters:
                weight.data = master

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Equality(Lane):
    """Real streams, real copies, random delays on both sides, and NaN where nobody may read."""

    tried = "models in all modes, layouts and granularities, raw and packed: random delays, poison"
    counts = "runs bit-equal"

    def __init__(self, device: torch.device) -> None:
        self.name = f"equality on {device.type}"
        self._device = device

    def why_not(self) -> str | None:
        """The GPU's needs one."""
        return why_no_gpu() if self._device.type == "cuda" else None

    @torch.no_grad()
    def control(self) -> Tally:
        """A device whose kernels do not wait for copies, and a model that is not streamed."""
        plants: dict[str, Callable[[StreamedModel], Plant]] = {
            "no waits": lambda streamed: partial(streamed.held_back, "copies", armed=True),
            "not streamed": lambda streamed: streamed.unwrapped,
        }
        controls = {}
        for case in _control_cases(self._device):
            for name, plant in plants.items():
                named = name if case.transport == "raw" else f"{name}, {case.transport}"
                tally = controls[named] = Tally()
                streamed = StreamedModel(case, self._device, 0, "compute_waits")
                try:
                    self._try(tally, streamed, 3, _CONTROL_DELAY_US, plant)
                except StateError as error:  # as in _is_visible
                    tally.add_fault(f"{case}: {error}")
        return all_caught(controls)

    @torch.no_grad()
    def run(self, effort: Effort) -> Tally:
        """So many forwards of each case; all of a case are submitted before any is looked at."""
        tally = Tally()
        cases = cases_on(self._device)
        num_forwards = effort.pick(3, 12)
        num_uses = num_copies = 0
        for number, case in enumerate(cases):
            streamed = StreamedModel(case, self._device, number)
            uses, copies = self._try(tally, streamed, num_forwards)
            num_uses += uses
            num_copies += copies
            effort.progress(number + 1, len(cases))
        tally.figures = {"cases": len(cases), "uses": num_uses, "copies": num_copies}
        tally.note = f"{len(cases)} cases; {num_copies:,} copies for {num_uses:,} uses of units"
        return tally

    @staticmethod
    def _try(
        tally: Tally,
        model: StreamedModel,
        num_forwards: int,
        longest_delay_us: int = _LONGEST_DELAY_US,
        plant: Callable[[StreamedModel], Plant] = lambda _: nullcontext,
    ) -> tuple[int, int]:
        with model.offloaded(longest_delay_us) as streamed:
            # Leaves are cut, and the order is learned, in the first ones.
            pairs = streamed.forwards(2)
            uses = Uses(streamed.handle)
            pairs += streamed.forwards(num_forwards - 2, 2, plant(streamed))
            num_uses, num_copies = uses.counts()
            ways = {unit.transport for unit in streamed.handle.units if unit.place is not None}
        if model.transport not in ways:
            tally.add_fault(f"{model}: no unit is {model.transport}, but {ways}")
        for number, (output, must) in enumerate(pairs):
            tally.must(torch.equal(output, must), f"{model}: forward {number} differs")
        if num_copies < num_uses or num_uses == 0:
            tally.add_fault(f"{model}: {num_copies} copies for {num_uses} uses of units")
        return num_uses, num_copies


def _control_cases(device: torch.device) -> list[Case]:
    """One for each transport."""
    ways = dict.fromkeys(case.transport for case in cases_on(device))
    return [Case(SUBJECTS[0], "pipeline", "shared", transport=way) for way in ways]


@dataclass(frozen=True)
class PlantedFault:
    """A fault of a device, where it shows, and what has to be held back for it to show."""

    kind: str
    mode: str
    streams: str
    held: str
    transport: str = "raw"

    def __str__(self) -> str:
        return f"{self.kind}, {self.mode}, {self.streams}, {self.transport}"


_FAULTS_HOST = (
    PlantedFault("compute_waits", "pipeline", "shared", "copies"),
    PlantedFault("records", "pipeline", "shared", "copies"),
    PlantedFault("synchronizes", "streams", "shared", "copies"),
    PlantedFault("compute_waits", "pipeline", "shared", "copies", "packed"),
    PlantedFault("compute_waits", "pipeline", "shared", "copies", "packed_resident"),
    PlantedFault("records", "pipeline", "split", "copies", "packed_resident"),
)
# The host computes on the calling thread, where no kernel can be late.
_FAULTS_CUDA = (
    *_FAULTS_HOST,
    PlantedFault("copy_waits", "pipeline", "shared", "kernels"),
    PlantedFault("copy_waits", "pipeline", "split", "kernels"),
    PlantedFault("handovers", "pipeline", "split", "kernels"),
    # What the decoder reads then is no blob: on the host that is an error, and no wrong number.
    PlantedFault("records", "pipeline", "shared", "copies", "packed"),
    PlantedFault("copy_waits", "pipeline", "shared", "kernels", "packed"),
    PlantedFault("copy_waits", "pipeline", "shared", "kernels", "packed_resident"),
)


class VisibleRaces(Lane):
    """That a comparison of numbers bites: each planted race becomes visible as wrong numbers."""

    tried = "the product on a device that leaves waits or records out: wrong numbers must show"
    counts = "planted races visible"

    def __init__(self, device: torch.device) -> None:
        self.name = f"visible races on {device.type}"
        self._device = device
        self._faults = _FAULTS_CUDA if device.type == "cuda" else _FAULTS_HOST

    def why_not(self) -> str | None:
        """The GPU's needs one."""
        return why_no_gpu() if self._device.type == "cuda" else None

    @torch.no_grad()
    def control(self) -> Tally:
        """A fault that is not switched on, which must not be taken for one that is."""
        tally = Tally()
        self._try(tally, self._faults[:1], armed=False)
        return tally

    @torch.no_grad()
    def run(self, effort: Effort) -> Tally:
        """Each fault switched on, for a forward between others which are right."""
        tally = Tally()
        transports = {case.transport for case in cases_on(self._device)}
        faults = [fault for fault in self._faults if fault.transport in transports]
        self._try(tally, faults, armed=True, effort=effort)
        tally.note = f"{tally.count - tally.num_faults} of {tally.count} visible"
        return tally

    def _try(
        self,
        tally: Tally,
        faults: Sequence[PlantedFault],
        *,
        armed: bool,
        effort: Effort | None = None,
    ) -> None:
        for number, fault in enumerate(faults, 1):
            case = Case(SUBJECTS[0], fault.mode, fault.streams, transport=fault.transport)
            with StreamedModel(case, self._device, 0, fault.kind).offloaded(
                _CONTROL_DELAY_US
            ) as streamed:
                before = streamed.forwards(2)
                twin = streamed.forward_with_fault(fault.held, 98, armed=False)
                is_visible = _is_visible(streamed, fault, armed)
            tally.must(is_visible, f"{fault}: the numbers are right")
            if not all(torch.equal(*pair) for pair in (*before, twin)):
                tally.add_fault(f"{fault}: numbers are wrong without it")
            if effort is not None:
                effort.progress(number, len(faults))


def _is_visible(streamed: StreamedModel, fault: PlantedFault, armed: bool) -> bool:
    try:
        output, must = streamed.forward_with_fault(fault.held, 99, armed=armed)
    except StateError:  # a copy came so late that it was taken for an edit by the forward
        return True
    return not torch.equal(output, must)


def why_no_gpu() -> str | None:
    """Why nothing can be tried on a GPU here; None if it can."""
    if not _C.has_cuda:
        return "this build of torch_offload was made against a torch without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None
