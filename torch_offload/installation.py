"""Everything that `offload` changes in a model, in an order in which it can be undone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_offload import _C
from torch_offload.adapting import Adaptation
from torch_offload.budget import AUTO, budget_on
from torch_offload.calls import unwrap, wrap_ancestor, wrap_unit
from torch_offload.config import Config
from torch_offload.debugging import LOGGER
from torch_offload.devices import make_device
from torch_offload.execution_device import answer_device, give_class_back
from torch_offload.file_masters import FileMasters
from torch_offload.gathering import gather_rows, stop_gathering
from torch_offload.guards import Probes, guard, guard_resident, unguard
from torch_offload.handle import HANDLE_KEY, Handle
from torch_offload.host_memory import HOST_RESERVE_BYTES, added_bytes
from torch_offload.idle import IdleUnits
from torch_offload.kept_cut import KeptCut
from torch_offload.leaves import LeafCut
from torch_offload.measured_times import MeasuredTimes
from torch_offload.memory import Memory
from torch_offload.mismatch import MismatchExplainer
from torch_offload.module_tree import modules_above, parameter_slots
from torch_offload.packed_parameter import packed_class_of
from torch_offload.packing import Packing
from torch_offload.placed import Placed
from torch_offload.planning import Cut, Planned, least_budget, plan_cut, plan_in_window
from torch_offload.progress import Progress
from torch_offload.recording import Recorder
from torch_offload.storage import ResidentMove
from torch_offload.units import UnitSpec
from torch_offload.user_warning import warn_user

# transformers compiles the forward by itself for static caches; it asks this method before.
_AUTO_COMPILE = "_valid_auto_compile_criteria"
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
        installation.wrap(model, planned)
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
        self._config = config
        self._memory = memory
        self._packing = packing
        self._times: MeasuredTimes | None = None  # of the last profile
        self._cut = KeptCut.of(cut)
        self._placed = Placed.of(planned)
        self._residents = ResidentMove(device)
        self._gathered = ResidentMove(torch.device("cpu"))
        self._bytes_resident = 0
        self._former_devices: list[tuple[weakref.ref[torch.Tensor], torch.device]] = []
        self._wrapped: list[weakref.ref[nn.Module]] = []
        self._guarded: list[weakref.ref[nn.Module]] = []
        slots = [slot for spec in planned.specs for slot in parameter_slots(spec, files)]
        self._positions = {name: index for index, (name, *_) in enumerate(slots)}
        try:
            lock_limit_bytes = files.lock_limit_bytes([spec for _, spec in _streamed(planned)])
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
            ranges=self._ranges(planned.specs),
            wait_for_each=config.debug,
            lock_limit_bytes=lock_limit_bytes,
            residents=list(files.views.values()),
            packed_class_of=packed_class_of if config.masters == "packed" else None,
            tensors_of_model=partial(_tensors_of, weakref.ref(model)),
        )
        self._recorder = Recorder(self._engine)
        self._has_files = bool(files.views)
        self._table_views = {
            table.name: view
            for table in cut.outsiders.tables
            if (view := files.view_of(table.weight)) is not None
        }
        self._save_hook: RemovableHandle | None = None
        self._idle_units = IdleUnits()
        self._leaf_cut = LeafCut(model, cut.specs, self._cut_anew) if wants_leaves else None
        self._adaptation = Adaptation(
            model, memory, config, self._weights_bytes, self._shrink, self._grow
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

        streamed = _streamed(planned)
        tables = {id(table.weight) for table in planned.tables}
        elsewhere = _parameter_ids(streamed) | tables
        residents = [
            tensor
            for tensor in (*model.parameters(), *model.buffers())
            if id(tensor) not in elsewhere
        ]
        total_bytes = sum(tensor.nbytes for tensor in residents)
        total_bytes += sum(spec.num_bytes for _, spec in streamed)
        with Progress("moving weights", total_bytes) as progress:
            self._residents.move(residents, from_file, progress.advance)
            self._bytes_resident = self._residents.size_bytes
            self._move_streamed(planned, progress)
        for index, _ in streamed[:1]:
            try:
                self._engine.lock_files(index)
            except MemoryError as error:
                raise FilesNotLockedError(str(error)) from error
        self._engine.unlock_residents()
        self._pack(planned, self._packing.take_counts(self._positions))

    def _move_streamed(self, planned: Planned, progress: Progress) -> None:
        """Tables to the host, streamed weights into their masters."""
        # A table that is on the host stays where it is: its rows are aligned as they are gathered.
        self._gathered.move(
            table.weight
            for table in planned.tables
            if not table.head and table.weight.device.type != "cpu"
        )
        for index, spec in _streamed(planned):
            self._engine.move_in(index)
            progress.advance(spec.num_bytes)

    def _pack(self, planned: Planned | Placed, counts: Sequence[torch.Tensor | None] = ()) -> None:
        """Packs what this plan, which the engine has, wants packed.

        Args:
            planned: It.
            counts: Of parameters that have not changed since, by position.
        """
        is_raw = all(way == "raw" for way in planned.plan.transports)
        if is_raw and self._config.masters == "plain":
            return
        most_bytes = planned.packable.packed_bytes
        if self._config.packed_cache is None:
            self._engine.pack(most_bytes, counts)
        else:
            # Imported here, as only the cache needs safetensors.
            from torch_offload.packed_cache import PackedCache

            PackedCache(self._config.packed_cache).pack(self._engine, most_bytes, counts)

    def wrap(self, model: nn.Module, planned: Planned) -> None:
        """Wraps the call of each streamed unit, of each table, and of all that is above one."""
        streamed = _streamed(planned)
        explainer = MismatchExplainer(
            self._device,
            ((*named, spec.module) for _, spec in streamed for named in spec.parameters),
            self._leaf_cut.distrust if self._leaf_cut else lambda names: None,
        )
        self._answer_device(model, planned)
        for index, spec in streamed:
            # Noted before it is done: an interrupt in between must not leave it behind.
            self._wrapped.append(weakref.ref(spec.module))
            wrap_unit(spec.module, self._engine, index, spec.name if self._config.nvtx else None)
        embeddings = []
        for table in planned.tables:
            for _, embedding in table.modules:
                embeddings.append(embedding)
                self._wrapped.append(weakref.ref(embedding))
                view = self._table_views.get(table.name)
                gather_rows(embedding, table.name, self._device, view)
        # Above a unit that stays as well: it may be given back when memory runs out.
        inner = {id(spec.module) for spec in planned.specs} | set(map(id, embeddings))
        for module in modules_above(model, inner):
            self._wrapped.append(weakref.ref(module))
            idle_units = self._idle_units if module is model else None
            wrap_ancestor(
                module, self._engine, explainer, self._leaf_cut, idle_units, self._adaptation
            )
        self._guard(model, planned)

    def _answer_device(self, model: nn.Module, planned: Planned) -> None:
        """Keeps ``model.device`` what it is without us, where a table is the first parameter."""
        tables = {id(table.weight) for table in planned.tables}
        for module in model.modules():
            first = next(module.parameters(), None)
            if first is not None and id(first) in tables:
                self._wrapped.append(weakref.ref(module))
                answer_device(module, self._device)

    def _guard(self, model: nn.Module, planned: Planned) -> None:
        """Guards every module with weights or buffers below it.

        Where weights are, or may come to be, elsewhere, against more than where all of them stay.
        """
        away = _parameter_ids(list(enumerate(planned.specs)))
        away |= {id(table.weight) for table in planned.tables}
        probes = Probes(self._device)
        holders = {
            id(module)
            for module in model.modules()
            if any(id(parameter) in away for parameter in module._parameters.values())
        }
        for module in model.modules():
            self._guarded.append(weakref.ref(module))
            if any(id(inner) in holders for inner in module.modules()):
                guard(module, probes.of(module))
            elif kinds := probes.of(module):
                guard_resident(module, kinds)
        if hasattr(model, _AUTO_COMPILE):
            vars(model)[_AUTO_COMPILE] = _never
        if self._has_files:
            self._save_hook = model.register_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                self._before_saving
            )

    def commit(self, model: nn.Module) -> Handle:
        """Lets go of the former weights and returns the handle, which the model keeps."""
        self._former_devices = [
            (weakref.ref(tensor), device)
            for move in (self._residents, self._gathered)
            for tensor, device in move.former_devices()
        ]
        self._residents.forget()
        self._gathered.forget()
        handle = Handle(
            model,
            self._engine,
            self._device,
            self._config,
            lambda: self._bytes_resident,
            self.undo,
            self._recorder,
            self.replan,
            lambda: self._placed,
            self.note_times,
        )
        if self._config.debug:
            self._recorder.keep()
        LOGGER.info("offloaded: %r", handle)
        vars(model)[HANDLE_KEY] = handle  # the last thing that can be interrupted
        return handle

    @_at_rest("remove()")
    def undo(self, model: nn.Module) -> None:
        """Gives the plain model back, from whatever point was reached. Blocks while copying."""
        elsewhere = self._engine.move_out()
        self._unwrap()
        vars(model).pop(_AUTO_COMPILE, None)
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

    def _before_saving(self, *args: object) -> None:
        """What is saved is what the next forward computes with: no edit has been missed."""
        if not self._engine.is_closed and not self._engine.in_pass:
            self._engine.find_edits()

    def _unwrap(self) -> None:
        for reference in self._wrapped:
            if (module := reference()) is not None:
                unwrap(module)
                stop_gathering(module)
                give_class_back(module)
        self._wrapped.clear()
        if self._save_hook is not None:
            self._save_hook.remove()
            self._save_hook = None
        for reference in self._guarded:
            if (module := reference()) is not None:
                unguard(module)
        self._guarded.clear()

    def _ranges(self, specs: Sequence[UnitSpec]) -> list[tuple[int, int]]:
        """Each unit's run of consecutive positions in the engine's list of parameters."""
        ranges = []
        for spec in specs:
            first = self._positions[spec.parameters[0][0]]
            ranges.append((first, first + len(spec.parameters)))
        return ranges

    # --- other plans -------------------------------------------------------------------------

    def replan(self, model: nn.Module, config: Config, times: MeasuredTimes | None) -> None:
        """Goes on with other options for budget and depth; see `Handle.replan`."""
        cut = self._cut.find(model)
        planned = plan_cut(cut, config, self._budget(config), self._packing, times)
        self._apply(model, planned)
        self._config = config
        self._times = times
        self._adaptation.configure(config)

    def note_times(self, times: MeasuredTimes) -> None:
        """Lets later plans go by what forwards were measured to take."""
        self._times = times

    def _plan(self, cut: Cut, budget: int | None, packing: Packing | None = None) -> Planned:
        """By the options that there are."""
        knows = self._times is not None and self._times.knows(cut.units)
        times = self._times if knows else None
        return plan_cut(cut, self._config, budget, packing or self._packing, times)

    def _budget(self, config: Config) -> int | None:
        """What weights may take by these options; None where every unit is to stream."""
        if config.gpu_budget == AUTO:
            return self._adaptation.budget()
        return budget_on(config.gpu_budget, self._memory)

    def _weights_bytes(self) -> int:
        engine = self._engine
        packed_bytes = engine.staging_bytes + engine.packed_resident_bytes
        return self._bytes_resident + engine.window_bytes + packed_bytes

    def _grow(self, model: nn.Module, budget: int) -> None:
        """Takes what has turned out to be free, or gives back what is not; at the least the window.

        What does not work out leaves all as it is.
        """
        try:
            cut = self._cut.find(model)
            budget = max(budget, least_budget(cut, self._packing))
            planned = self._plan(cut, budget)
            if not Placed.of(planned).is_like(self._placed):  # else nothing would move
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
    def _apply(self, model: nn.Module, planned: Planned, *, may_be_raw: bool = False) -> None:
        """Moves what changes its home, and nothing else. Blocks until that is done.

        Args:
            model: The model.
            planned: How it is to lie.
            may_be_raw: Whether units may travel raw, with a warning, where the memory to pack them
                is missing.

        Raises:
            MemoryError: If host or device memory is missing; all is then as it was.
        """
        LOGGER.info("planning anew: %d units", len(planned.specs))
        streamed = [spec for _, spec in _streamed(planned)]
        leaving: list[list[torch.Tensor]] = [
            [parameter for _, parameter in spec.parameters if parameter.device.type != "cpu"]
            for spec in streamed
        ]
        if any(leaving):
            _C.check_host_memory(added_bytes(leaving), HOST_RESERVE_BYTES)
        names = {table.name for table in planned.tables}
        free = [table for table in self._cut.find(model).outsiders.tables if not table.head]
        now = {table.name for table in free if table.name in self._placed.tables}
        to_host = [t for t in free if t.name in names - now]
        to_device = [t for t in free if t.name in now - names]
        moves = [ResidentMove(torch.device("cpu")), ResidentMove(self._device)]
        former, placed = self._placed, Placed.of(planned)
        try:
            for table in to_host:
                moves[0].move(
                    [table.weight], partial(_shown_again, self._table_views.get(table.name))
                )
            moved = self._engine.recut(planned.plan, self._ranges(planned.specs))
            moves[1].move(table.weight for table in to_device)
            self._pack_again(planned, *_MEMORY_ERRORS if may_be_raw else ())
            bytes_resident = self._bytes_resident + moved
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
                    self._engine.recut(former.plan, self._ranges_of(former.parameters))
                    self._pack_again(former, Exception)
            finally:
                for move in moves:
                    move.undo()
            raise

        def adopt() -> None:
            self._bytes_resident, self._former_devices = bytes_resident, former_devices
            self._placed = placed
            self._unwrap()
            self.wrap(model, planned)

        try:
            adopt()
        except BaseException:
            adopt()  # half wrapped is neither plan: the weights lie by the new one
            raise
        if self._config.debug:
            self._recorder.keep()  # the former log tells of another plan

    def _lies_as(self, plan: _C.Plan) -> bool:
        """Whether the engine has this plan."""
        now = self._engine.plan
        names, former_names = ([unit.name for unit in one.units] for one in (now, plan))
        return (now.places, now.transports, names) == (plan.places, plan.transports, former_names)

    def _pack_again(self, planned: Planned | Placed, *bearable: type[Exception]) -> None:
        """Packs the units of another plan. After an error that can be borne a warning says so."""
        try:
            self._pack(planned)
        except bearable as error:
            what_follows = (
                "the units travel raw"
                if self._config.masters == "plain"
                else "the next forward packs the units"
            )
            warn_user(f"{what_follows}, as they could not be packed anew: {error}")

    def _ranges_of(self, parameters: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
        firsts = [self._positions[names[0]] for names in parameters]
        return [
            (first, first + len(names)) for first, names in zip(firsts, parameters, strict=True)
        ]

    def _cut_anew(self, model: nn.Module, specs: list[UnitSpec]) -> None:
        """Goes on with other units. Blocks until nothing is in flight.

        Where there is no room for what becomes resident, a warning says so and the units stay as
        they are.

        Raises:
            StateError: If another thread's forward has begun.
        """
        LOGGER.info("cutting the units anew: %d leaves and sublayers", len(specs))
        cut = replace(self._cut.find(model), specs=tuple(specs), granularity="module")
        budget = self._budget(self._config)
        try:
            if budget is None and self._packing.transport != "packed_resident":
                window_bytes = self._engine.window_bytes
                planned = plan_in_window(cut, self._config, window_bytes, self._packing)
            else:
                planned = self._plan(cut, budget)
            self._apply(model, planned, may_be_raw=True)
        except (ValueError, *_MEMORY_ERRORS) as error:
            warn_user(
                "the units stay as they are, as there is no room for the small "
                "weights that would stay on the device beside leaves; change gpu_budget or free "
                f"memory ({error})"
            )
            return
        self._cut = KeptCut.of(cut)


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


def _never(*args: object, **kwargs: object) -> bool:
    return False


def _streamed(planned: Planned) -> list[tuple[int, UnitSpec]]:
    places = planned.plan.places
    return [(i, spec) for i, spec in enumerate(planned.specs) if places[i] is not None]


def _parameter_ids(streamed: Sequence[tuple[int, UnitSpec]]) -> set[int]:
    return {id(parameter) for _, spec in streamed for _, parameter in spec.parameters}
