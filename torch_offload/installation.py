"""Everything that `offload` changes in a model, in an order in which it can be undone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from torch_offload import _C
from torch_offload.adapting import Adaptation
from torch_offload.budget import AUTO, budget_on
from torch_offload.config import Config
from torch_offload.counts import stats_of
from torch_offload.debugging import LOGGER
from torch_offload.devices import make_device
from torch_offload.file_masters import FileMasters
from torch_offload.handle import HANDLE_KEY, Handle
from torch_offload.host_memory import HOST_RESERVE_BYTES, added_bytes
from torch_offload.kept_cut import KeptCut
from torch_offload.leaves import LeafCut
from torch_offload.measured_times import MeasuredTimes
from torch_offload.memory import Memory
from torch_offload.module_tree import parameter_slots
from torch_offload.packed_parameter import is_packed, packed_class_of
from torch_offload.packing import Packing
from torch_offload.packing_watch import PackingWatch
from torch_offload.placed import Placed
from torch_offload.planning import (
    Cut,
    Planned,
    least_budget,
    plan_cut,
    plan_in_window,
    streamed_units,
)
from torch_offload.progress import Progress
from torch_offload.recording import Recorder
from torch_offload.storage import ResidentMove
from torch_offload.structure import size_bytes
from torch_offload.units import UnitSpec
from torch_offload.user_warning import warn_user
from torch_offload.wrapping import Wrapping

if TYPE_CHECKING:
    from torch_offload.packed_cache import Keeping, PackedCache

_MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)
# Smaller weights that stay on the device are not worth locking pages of a file for.
_LEAST_BYTES_FROM_FILE = 2**20
# Of a table that comes back from the device: so much of it is compared with its file at a time.
_COMPARED_BYTES = 64 * 2**20


class FilesNotLockedError(MemoryError):
    """The system refuses to page-lock the pages of checkpoint files."""


def install(
    model: nn.Module,
    device: torch.device,
    config: Config,
    cut: Cut,
    planned: Planned,
    memory: Memory | None,
    files: FileMasters,
    *,
    packing: Packing,
    wants_leaves: bool,
) -> Handle:
    """Moves the weights, wraps the calls and guards the model. Blocks while copying.

    Args:
        model: Checked.
        device: Where it is to run.
        config: Of `offload`.
        cut: What was planned.
        planned: How its units are to lie.
        memory: Of the device; None where there is nothing to adapt to.
        files: Parameters that are streamed from checkpoint files.
        packing: How units may travel.
        wants_leaves: Whether the units are to be cut into leaves once a pass has proven them.

    Raises:
        MemoryError: If host or device memory is missing. As after any other exception, the model
            is exactly what it was.
        FilesNotLockedError: A MemoryError as well, if it is the pages of checkpoint files.
    """
    installation = _Installation(
        model, device, config, cut, planned, memory, files, packing, wants_leaves
    )
    try:
        installation.move_weights(model, planned, files)
        installation.wrapping.wrap(model, planned)
        return installation.commit(model)
    except BaseException:
        installation.undo(model)
        raise


_P = ParamSpec("_P")
_T = TypeVar("_T")
_Method = Callable[Concatenate["_Installation", _P], _T]


def _at_rest(call: str) -> Callable[[_Method[_P, _T]], _Method[_P, _T]]:
    """Lets no forward begin, and no other thread change anything, while the method runs."""

    def keep(method: _Method[_P, _T]) -> _Method[_P, _T]:
        @wraps(method)
        def kept(self: _Installation, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
            return self._engine.at_rest(call, partial(method, self, *args, **kwargs))

        return kept

    return keep


class _Installation:
    """Owned by the handle; holds modules and parameters by name or weakly."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        config: Config,
        cut: Cut,
        planned: Planned,
        memory: Memory | None,
        files: FileMasters,
        packing: Packing,
        wants_leaves: bool,
    ) -> None:
        self._device = device
        self.config = config
        self._memory = memory
        self._packing = packing
        self._times: MeasuredTimes | None = None  # of the last profile
        self._packed_cache = _cache_in(config.packed_cache)
        self._cut = KeptCut.of(cut)
        self.placed = Placed.of(planned)
        self._residents = ResidentMove(device)
        self._gathered = ResidentMove(torch.device("cpu"))
        self.bytes_resident = 0
        self._former_devices: list[tuple[weakref.ref[torch.Tensor], torch.device]] = []
        slots = [slot for spec in planned.specs for slot in parameter_slots(spec, files)]
        self._positions = {name: index for index, (name, *_) in enumerate(slots)}
        try:
            lock_limit_bytes = files.lock_limit_bytes([spec for _, spec in streamed_units(planned)])
        except MemoryError as error:
            raise FilesNotLockedError(str(error)) from error
        self._engine = _C.Engine(
            device=make_device(device),
            torch_device=device,
            mode=config.mode,
            streams=config.streams,
            poison_on_release=config.poison or config.debug,
            parameters=slots,
            plan=planned.plan,
            ranges=self._ranges(self.placed.parameters),
            wait_for_each=config.debug,
            lock_limit_bytes=lock_limit_bytes,
            residents=list(files.views.values()),
            packed_class_of=packed_class_of if config.masters == "packed" else None,
            tensors_of_model=partial(_tensors_of, weakref.ref(model)),
        )
        self._recorder = Recorder(self._engine)
        self._table_views = {
            table.name: view
            for table in cut.outsiders.tables
            if (view := files.view_of(table.weight)) is not None
        }
        self._packing_watch = PackingWatch(self._engine, self.placed)
        self._adaptation = Adaptation(
            model,
            memory,
            config,
            self._weights_bytes,
            self._shrink,
            self._grow,
            self._packing_watch,
        )
        self.wrapping = Wrapping(
            self._engine,
            device,
            LeafCut(model, cut.specs, self._cut_anew) if wants_leaves else None,
            self._adaptation,
            self._table_views,
            names_ranges=config.nvtx,
            finds_edits=bool(files.views),
        )

    def move_weights(self, model: nn.Module, planned: Planned, files: FileMasters) -> None:
        """Streamed weights to the arena, everything else to the device."""

        def from_file(tensor: torch.Tensor) -> torch.Tensor | None:
            """Locked pages are copied at the link's rate, others at an eighth of it."""
            view = files.view_of(tensor)
            if view is None or view.size_bytes < _LEAST_BYTES_FROM_FILE:
                return None
            moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            try:
                return moved if self._engine.copy_resident(view, moved) else None
            except MemoryError:  # what cannot be locked goes the ordinary way
                return None

        streamed = streamed_units(planned)
        tables = {id(table.weight) for table in planned.tables}
        elsewhere = {id(weight) for _, spec in streamed for _, weight in spec.parameters} | tables
        residents = [
            tensor
            for tensor in (*model.parameters(), *model.buffers())
            if id(tensor) not in elsewhere
        ]
        total_bytes = sum(size_bytes(tensor) for tensor in residents)
        total_bytes += sum(spec.num_bytes for _, spec in streamed)
        with Progress("moving weights", total_bytes) as progress:
            self._residents.move(residents, from_file, progress.advance)
            self.bytes_resident = self._residents.size_bytes
            self._move_streamed(planned, progress)
        for index, _ in streamed[:1]:
            try:
                self._engine.lock_files(index)
            except MemoryError as error:
                raise FilesNotLockedError(str(error)) from error
        self._engine.unlock_residents()
        self._pack(planned, self._packing.take_counts(self._positions), keeps="all")

    def _move_streamed(self, planned: Planned, progress: Progress) -> None:
        """Tables to the host, streamed weights into their masters."""
        # A table that is on the host stays where it is: its rows are aligned as they are gathered.
        self._gathered.move(
            table.weight
            for table in planned.tables
            if not table.head and table.weight.device.type != "cpu"
        )
        for index, spec in streamed_units(planned):
            self._engine.move_in(index)
            progress.advance(spec.num_bytes)

    def _pack(
        self,
        planned: Planned | Placed,
        counts: Sequence[torch.Tensor | None] = (),
        *,
        keeps: Keeping = "nothing",
    ) -> None:
        """Packs what this plan, which the engine has, wants packed.

        Args:
            planned: It.
            counts: Of parameters that have not changed since, by position.
            keeps: What may be written to the cache.
        """
        is_raw = all(way == "raw" for way in planned.plan.transports)
        if is_raw and self.config.masters == "plain":
            return
        most_bytes = planned.packable.packed_bytes
        if self._packed_cache is None:
            self._engine.pack(most_bytes, counts)
        else:
            self._packed_cache.pack(self._engine, most_bytes, counts, keeps=keeps)

    def commit(self, model: nn.Module) -> Handle:
        """Lets go of the former weights and returns the handle, which the model keeps."""
        self._former_devices = [
            (weakref.ref(tensor), device)
            for move in (self._residents, self._gathered)
            for tensor, device in move.former_devices()
        ]
        self._residents.forget()
        self._gathered.forget()
        handle = Handle(model, self._engine, self._device, self._recorder, self)
        if self.config.debug:
            self._recorder.keep()
        LOGGER.info("offloaded: %r", handle)
        vars(model)[HANDLE_KEY] = handle  # the last thing that can be interrupted
        return handle

    @_at_rest("remove()")
    def undo(self, model: nn.Module) -> None:
        """Gives the plain model back, from whatever point was reached. Blocks while copying."""
        elsewhere = self._engine.move_out()
        self.wrapping.unwrap(model)
        vars(model).pop(HANDLE_KEY, None)
        self._residents.undo()
        self._gathered.undo()
        with torch.inference_mode(False), torch.no_grad():
            for tensor_reference, device in self._former_devices:
                tensor = tensor_reference()
                if tensor is not None and tensor.device != device:
                    tensor.data = tensor.data.to(device)
        self._engine.close()
        LOGGER.info("removed: the plain model is back")
        if elsewhere:
            warn_user(
                f"no room on their former device for {', '.join(elsewhere)}; they "
                "are on the CPU now"
            )

    def _ranges(self, parameters: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
        """Each unit's run of consecutive positions in the engine's list of parameters."""
        firsts = [self._positions[names[0]] for names in parameters]
        return [
            (first, first + len(names)) for first, names in zip(firsts, parameters, strict=True)
        ]

    # --- other plans -------------------------------------------------------------------------

    @_at_rest("replan()")
    def replan(self, model: nn.Module, config: Config, times: MeasuredTimes | None) -> None:
        """Goes on with other options for budget and depth; see `Handle.replan`."""
        cut = self._cut.find(model)
        specs = (*cut.specs, *cut.outsiders.heads)
        self._packing.count_anew(specs, self._blob_bytes(specs))
        planned = plan_cut(cut, config, self._budget(config), self._packing, times)
        self._apply(model, planned)
        self.config = config
        self._times = times
        self._adaptation.configure(config)
        self._packing_watch.begin_anew()

    def _blob_bytes(self, specs: Sequence[UnitSpec]) -> dict[str, int]:
        """Of the units, in the engine's order, whose weights are nowhere but in their blob."""
        return {
            spec.name: blob.nbytes
            for index, spec in enumerate(specs)
            if all(is_packed(parameter) for _, parameter in spec.parameters)
            and (blob := self._engine.packed_blob(index)) is not None
        }

    def note_times(self, times: MeasuredTimes) -> None:
        """Lets later plans go by what forwards were measured to take."""
        self._times = times

    def _plan(self, cut: Cut, budget: int | None, packing: Packing | None = None) -> Planned:
        """By the options that there are."""
        knows = self._times is not None and self._times.knows(cut.units)
        times = self._times if knows else None
        return plan_cut(cut, self.config, budget, packing or self._packing, times)

    def _budget(self, config: Config) -> int | None:
        """What weights may take by these options; None where every unit is to stream."""
        if config.gpu_budget == AUTO:
            return self._adaptation.budget()
        return budget_on(config.gpu_budget, self._memory)

    def _weights_bytes(self) -> int:
        return stats_of(self._engine, self.bytes_resident).device_bytes

    def _grow(self, model: nn.Module, budget: int) -> None:
        """Takes what has turned out to be free, or gives back what is not; at the least the window.

        What does not work out leaves all as it is.
        """
        try:
            cut = self._cut.find(model)
            budget = max(budget, least_budget(cut, self._packing))
            planned = self._plan(cut, budget)
            if not Placed.of(planned).is_like(self.placed):  # else nothing would move
                self._apply(model, planned)
        except (ValueError, _C.StateError, *_MEMORY_ERRORS) as error:
            LOGGER.info("kept the plan: %s", error)

    def _shrink(self, model: nn.Module) -> int:
        """Gives back all resident units. Returns how many bytes that are.

        Raises:
            StateError: If another thread's forward has begun.
        """
        before = self._weights_bytes()
        cut = self._cut.find(model)
        packing = self._packing.streaming()
        planned = self._plan(cut, None, packing)
        if planned.device_bytes >= before:
            planned = self._plan(cut, least_budget(cut, packing), packing)
        if planned.device_bytes < before:
            self._apply(model, planned, may_be_raw=True)
        return before - self._weights_bytes()

    @_at_rest("replan()")
    def _apply(
        self,
        model: nn.Module,
        planned: Planned,
        *,
        may_be_raw: bool = False,
        keeps: Keeping = "nothing",
    ) -> None:
        """Moves what changes its home, and nothing else. Blocks until that is done.

        Args:
            model: The model.
            planned: How it is to lie.
            may_be_raw: Whether units may travel raw, with a warning, where the memory to pack them
                is missing.
            keeps: What may be written to the cache.

        Raises:
            MemoryError: If host or device memory is missing; all is then as it was.
        """
        LOGGER.info("planning anew: %d units", len(planned.specs))
        streamed = [spec for _, spec in streamed_units(planned)]
        leaving: list[list[torch.Tensor]] = [
            [parameter for _, parameter in spec.parameters if parameter.device.type != "cpu"]
            for spec in streamed
        ]
        if any(leaving):
            _C.check_host_memory(added_bytes(leaving), HOST_RESERVE_BYTES)
        names = {table.name for table in planned.tables}
        free = [table for table in self._cut.find(model).outsiders.tables if not table.head]
        now = {table.name for table in free if table.name in self.placed.tables}
        to_host = [t for t in free if t.name in names - now]
        to_device = [t for t in free if t.name in now - names]
        moves = [ResidentMove(torch.device("cpu")), ResidentMove(self._device)]
        former, placed = self.placed, Placed.of(planned)
        try:
            for table in to_host:
                moves[0].move(
                    [table.weight], partial(_shown_again, self._table_views.get(table.name))
                )
            moved = self._engine.recut(planned.plan, self._ranges(placed.parameters))
            moves[1].move(table.weight for table in to_device)
            self._pack_again(planned, *_MEMORY_ERRORS if may_be_raw else (), keeps=keeps)
            bytes_resident = self.bytes_resident + moved
            bytes_resident -= sum(table.size_bytes for table in to_host)
            bytes_resident += sum(table.size_bytes for table in to_device)
            former_devices = self._former_devices + [
                (weakref.ref(tensor), device)
                for move in moves
                for tensor, device in move.former_devices()
                if all(known() is not tensor for known, _ in self._former_devices)
            ]
        except BaseException:
            try:
                if not self._lies_as(former.plan):  # an interrupt may strike just behind a success
                    self._engine.recut(former.plan, self._ranges(former.parameters))
                    self._pack_again(former, Exception)
            finally:
                for move in moves:
                    move.undo()
            raise

        def adopt() -> None:
            self.bytes_resident, self._former_devices = bytes_resident, former_devices
            self.placed = placed
            self._packing_watch.follow(placed)
            self.wrapping.unwrap(model)
            self.wrapping.wrap(model, planned)

        try:
            adopt()
        except BaseException:
            adopt()  # half wrapped is neither plan: the weights lie by the new one
            raise
        if self.config.debug:
            self._recorder.keep()  # the former log tells of another plan

    def _lies_as(self, plan: _C.Plan) -> bool:
        """Whether the engine has this plan."""
        now = self._engine.plan
        names, former_names = ([unit.name for unit in one.units] for one in (now, plan))
        return (now.places, now.transports, names) == (plan.places, plan.transports, former_names)

    def _pack_again(
        self, planned: Planned | Placed, *bearable: type[Exception], keeps: Keeping = "nothing"
    ) -> None:
        """Packs the units of another plan. After an error that can be borne a warning says so."""
        try:
            self._pack(planned, keeps=keeps)
        except bearable as error:
            what_follows = (
                "the units travel raw"
                if self.config.masters == "plain"
                else "the next forward packs the units"
            )
            warn_user(f"{what_follows}, as they could not be packed anew: {error}")

    def _cut_anew(self, model: nn.Module, specs: list[UnitSpec]) -> None:
        """Goes on with other units. Blocks until nothing is in flight.

        Where there is no room for what becomes resident, a warning says so and the units stay as
        they are.

        Raises:
            StateError: If another thread's forward has begun.
        """
        LOGGER.info("cutting the units anew: %d leaves and sublayers", len(specs))
        cut = replace(self._cut.find(model), specs=tuple(specs), granularity="module")
        budget = self._budget(self.config)
        try:
            if budget is None and self._packing.transport != "packed_resident":
                window_bytes = self._engine.window_bytes
                planned = plan_in_window(cut, self.config, window_bytes, self._packing)
            else:
                planned = self._plan(cut, budget)
            self._apply(model, planned, may_be_raw=True, keeps="missing")
        except (ValueError, *_MEMORY_ERRORS) as error:
            warn_user(
                "the units stay as they are, as there is no room for the small "
                "weights that would stay on the device beside leaves; change gpu_budget or free "
                f"memory ({error})"
            )
            return
        self._cut = KeptCut.of(cut)


def _cache_in(folder: str | Path | None) -> PackedCache | None:
    if folder is None:
        return None
    # Imported here, as only the cache needs safetensors.
    from torch_offload.packed_cache import PackedCache

    return PackedCache(folder)


def _shown_again(view: _C.FileView | None, tensor: torch.Tensor) -> torch.Tensor | None:
    """What a view of files shows, if those are the tensor's bytes: that takes no memory."""
    if view is None:
        return None
    view.check_unchanged()
    shown = view.tensor(tensor.dtype, tensor.shape)
    rows = max(1, _COMPARED_BYTES // max(1, tensor[:1].nbytes))
    parts = zip(torch.split(tensor, rows), torch.split(shown, rows), strict=True)
    is_same = all(
        torch.equal(part.cpu().view(torch.uint8), known.view(torch.uint8)) for part, known in parts
    )
    return shown if is_same else None


def _tensors_of(model: weakref.ref[nn.Module]) -> list[torch.Tensor]:
    alive = model()
    return [] if alive is None else [*alive.parameters(), *alive.buffers()]
