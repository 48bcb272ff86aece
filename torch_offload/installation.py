"""Everything that `offload` changes in a model, in an order in which it can be undone."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from torch_offload import _C
from torch_offload.calls import unwrap, wrap_ancestor, wrap_unit
from torch_offload.config import Config
from torch_offload.debugging import LOGGER
from torch_offload.file_masters import FileMasters
from torch_offload.guards import Probes, guard, unguard
from torch_offload.handle import HANDLE_KEY, Handle
from torch_offload.idle import IdleUnits
from torch_offload.leaves import LeafCut
from torch_offload.mismatch import MismatchExplainer
from torch_offload.planning import budget_for_units, planned_units
from torch_offload.progress import Progress
from torch_offload.recording import Recorder
from torch_offload.storage import ResidentMove
from torch_offload.units import UnitSpec

# transformers compiles the forward by itself for static caches; it asks this method before.
_AUTO_COMPILE = "_valid_auto_compile_criteria"


_ParameterSlot = tuple[
    str,
    torch.Tensor,
    list[tuple[dict[str, nn.Parameter | None], str]],
    _C.FileView | None,
]


class FilesNotLockedError(MemoryError):
    """The system refuses to page-lock the pages of checkpoint files."""


def install(
    model: nn.Module,
    device: torch.device,
    config: Config,
    specs: Sequence[UnitSpec],
    plan: _C.Plan,
    files: FileMasters,
) -> Handle:
    """Moves the weights, wraps the calls and guards the model. Blocks while copying.

    Raises:
        MemoryError: If host or device memory is missing. As after any other exception, the model
            is exactly what it was.
        FilesNotLockedError: A MemoryError as well, if it is the pages of checkpoint files.
    """
    installation = _Installation(model, device, config, specs, plan, files)
    try:
        installation.move_weights(model, specs, plan)
        installation.wrap(model, specs, plan)
        installation.guard(model, specs, plan)
        return installation.commit(model)
    except BaseException:
        installation.undo(model)
        raise


class _Installation:
    """Owned by the handle; holds modules and parameters by name or weakly."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        config: Config,
        specs: Sequence[UnitSpec],
        plan: _C.Plan,
        files: FileMasters,
    ) -> None:
        self._device = device
        self._config = config
        self._residents = ResidentMove(device)
        self._bytes_resident = 0
        self._former_devices: list[tuple[weakref.ref[torch.Tensor], torch.device]] = []
        self._wrapped: list[weakref.ref[nn.Module]] = []
        self._guarded: list[weakref.ref[nn.Module]] = []
        slots = [slot for spec in specs for slot in _parameter_slots(spec, files)]
        self._positions = {name: index for index, (name, *_) in enumerate(slots)}
        self._budget = budget_for_units(model, device, specs, config)
        self._engine = _C.Engine(
            device=_C.Device(device),
            torch_device=device,
            mode=config.mode,
            streams=config.streams,
            poison_on_release=config.poison or config.debug,
            parameters=slots,
            plan=plan,
            ranges=self._ranges(specs),
            wait_for_each=config.debug,
            lock_limit_bytes=files.lock_limit_bytes() if files.views else None,
        )
        self._recorder = Recorder(self._engine)
        self._idle_units = IdleUnits()
        self._leaf_cut: LeafCut | None = None
        if config.granularity == "module":
            self._leaf_cut = LeafCut(model, specs, self._cut_anew)

    def move_weights(self, model: nn.Module, specs: Sequence[UnitSpec], plan: _C.Plan) -> None:
        """Streamed weights to the arena, everything else to the device."""
        streamed = _streamed(specs, plan)
        moving = _parameter_ids(streamed)
        self._residents.move(
            tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in moving
        )
        self._bytes_resident = self._residents.size_bytes
        with Progress("moving weights", sum(spec.num_bytes for _, spec in streamed)) as progress:
            for index, spec in streamed:
                self._engine.move_in(index)
                progress.advance(spec.num_bytes)
        for index, _ in streamed[:1]:
            try:
                self._engine.lock_files(index)
            except MemoryError as error:
                raise FilesNotLockedError(str(error)) from error

    def wrap(self, model: nn.Module, specs: Sequence[UnitSpec], plan: _C.Plan) -> None:
        """Wraps the call of each streamed unit and of all that is above one."""
        streamed = _streamed(specs, plan)
        explainer = MismatchExplainer(
            self._device,
            ((*named, spec.module) for _, spec in streamed for named in spec.parameters),
            self._leaf_cut.distrust if self._leaf_cut else lambda names: None,
        )
        for index, spec in streamed:
            # Noted before it is done: an interrupt in between must not leave it behind.
            self._wrapped.append(weakref.ref(spec.module))
            wrap_unit(spec.module, self._engine, index, spec.name if self._config.nvtx else None)
        for module in _above(model, {id(spec.module) for _, spec in streamed}):
            self._wrapped.append(weakref.ref(module))
            idle_units = self._idle_units if module is model else None
            wrap_ancestor(module, self._engine, explainer, self._leaf_cut, idle_units)

    def guard(self, model: nn.Module, specs: Sequence[UnitSpec], plan: _C.Plan) -> None:
        """Guards every module with streamed weights below it."""
        moving = _parameter_ids(_streamed(specs, plan))
        probes = Probes(self._device)
        for module in model.modules():
            if any(id(parameter) in moving for parameter in module.parameters()):
                self._guarded.append(weakref.ref(module))
                guard(module, probes.of(module))
        if hasattr(model, _AUTO_COMPILE):
            vars(model)[_AUTO_COMPILE] = _never

    def commit(self, model: nn.Module) -> Handle:
        """Lets go of the former weights and returns the handle, which the model keeps."""
        self._former_devices = [
            (weakref.ref(tensor), device) for tensor, device in self._residents.former_devices()
        ]
        self._residents.forget()
        handle = Handle(
            model,
            self._engine,
            self._device,
            self._config,
            lambda: self._bytes_resident,
            self.undo,
            self._recorder,
        )
        if self._config.debug:
            self._recorder.keep()
        vars(model)[HANDLE_KEY] = handle
        return handle

    def undo(self, model: nn.Module) -> None:
        """Gives the plain model back, from whatever point was reached. Blocks while copying."""
        elsewhere = self._engine.move_out()
        self._unwrap()
        for reference in self._guarded:
            if (module := reference()) is not None:
                unguard(module)
        vars(model).pop(_AUTO_COMPILE, None)
        vars(model).pop(HANDLE_KEY, None)
        self._residents.undo()
        with torch.inference_mode(False), torch.no_grad():
            for tensor_reference, device in self._former_devices:
                tensor = tensor_reference()
                if tensor is not None and tensor.device != device:
                    tensor.data = tensor.data.to(device)
        self._engine.close()
        LOGGER.info("removed: the plain model is back")
        if elsewhere:
            warnings.warn(
                f"torch_offload: no room on their former device for {', '.join(elsewhere)}; they "
                "are on the CPU now",
                stacklevel=4,
            )

    def _unwrap(self) -> None:
        for reference in self._wrapped:
            if (module := reference()) is not None:
                unwrap(module)
        self._wrapped.clear()

    def _ranges(self, specs: Sequence[UnitSpec]) -> list[tuple[int, int]]:
        """Each unit's run of consecutive positions in the engine's list of parameters."""
        ranges = []
        for spec in specs:
            first = self._positions[spec.parameters[0][0]]
            ranges.append((first, first + len(spec.parameters)))
        return ranges

    def _cut_anew(self, model: nn.Module, specs: list[UnitSpec]) -> None:
        """Goes on with other units, in the same window. Blocks until nothing is in flight.

        Where the device has no room for what becomes resident, a warning says so and the units
        stay as they are.
        """
        LOGGER.info("cutting the units anew: %d leaves and sublayers", len(specs))
        plan = _C.make_plan(
            planned_units(specs), self._config.depth_bytes, self._budget, self._engine.window_bytes
        )
        try:
            self._bytes_resident += self._engine.recut(plan, self._ranges(specs))
        except torch.OutOfMemoryError:
            warnings.warn(
                "torch_offload: the units stay sublayers, as the device has no room for the small "
                "weights that would stay there beside leaves; lower gpu_budget or free memory",
                stacklevel=2,
            )
            return
        self._unwrap()
        self.wrap(model, specs, plan)
        if self._config.debug:
            self._recorder.keep()  # the former log tells of units that are no more


def _never(*args: object, **kwargs: object) -> bool:
    return False


def _streamed(specs: Sequence[UnitSpec], plan: _C.Plan) -> list[tuple[int, UnitSpec]]:
    return [(i, spec) for i, spec in enumerate(specs) if plan.places[i] is not None]


def _parameter_ids(streamed: Sequence[tuple[int, UnitSpec]]) -> set[int]:
    return {id(parameter) for _, spec in streamed for _, parameter in spec.parameters}


def _parameter_slots(spec: UnitSpec, files: FileMasters) -> list[_ParameterSlot]:
    """Where each parameter of a unit is looked up: every `_parameters` entry that holds it."""
    entries = [
        (module._parameters, key, parameter)
        for module in spec.module.modules()
        for key, parameter in module._parameters.items()
    ]
    return [
        (
            name,
            parameter,
            [(owner, key) for owner, key, found in entries if found is parameter],
            files.view_of(parameter),
        )
        for name, parameter in spec.parameters
    ]


def _above(model: nn.Module, units: set[int]) -> Iterator[nn.Module]:
    """Modules that are called and have a unit somewhere below them, the model itself included."""
    for module in model.modules():
        below = module.modules()
        next(below)
        is_called = type(module).forward is not nn.Module.forward
        if id(module) not in units and is_called and any(id(child) in units for child in below):
            yield module
