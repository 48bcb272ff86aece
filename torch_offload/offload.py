"""The drop-in call."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch import nn

from torch_offload import _C
from torch_offload.calls import unwrap, wrap_ancestor, wrap_unit
from torch_offload.checks import check_model
from torch_offload.config import Config, Granularity, Mode, Streams
from torch_offload.devices import resolve_device
from torch_offload.guards import guard, unguard
from torch_offload.handle import HANDLE_KEY, Handle
from torch_offload.host_memory import added_bytes
from torch_offload.sizes import format_size
from torch_offload.storage import ResidentMove
from torch_offload.units import UnitSpec, find_units

# Kept free on the host: for the process's own activations, and for everybody else.
_HOST_RESERVE_BYTES = 256 * 2**20
# A generation of transformers compiles the forward by itself for static caches.
_AUTO_COMPILE = "_valid_auto_compile_criteria"


def offload(
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    mode: Mode = "pipeline",
    granularity: Granularity = "sublayer",
    streams: Streams = "shared",
    depth: int | str | None = None,
    gpu_budget: int | str | None = None,
    units: Sequence[str | nn.Module] | None = None,
    resident: Sequence[str] = (),
) -> Handle:
    """Streams a model's weights from host memory while it computes. In place.

    Attention and FFN weights of every layer move to page-locked host memory and pass through a
    small window on `device` just before they are used; everything else moves to `device`.
    ``model(...)`` and ``model.generate(...)`` are called as before, with inputs on `device`, and
    return the same bits as the resident model.

    Blocks while it moves the weights. A forward afterwards does not block in the modes
    ``"events"`` and ``"pipeline"``. On an exception the model is exactly what it was.

    Args:
        model: Any module that holds its layers in containers; Hugging Face models do.
        device: Where to compute. None is the current CUDA device, or the host device where there
            is none.
        mode: ``"pipeline"`` (default), ``"events"``, ``"streams"`` or ``"sync"``; see `Config`.
        granularity: ``"sublayer"`` (default), ``"layer"`` or ``"module"``.
        streams: ``"shared"`` (default) or ``"split"``.
        depth: Bytes that copies may run ahead: a number, ``"2GiB"``, or None for one layer.
        gpu_budget: Bytes that weights may take on the device, resident ones and window together;
            None streams every unit through the default window.
        units: Names, patterns or modules to stream, for models that no rule fits.
        resident: Names or patterns of modules and parameters that stay on the device.

    Returns:
        The handle: counters, report, `refresh`, `remove`. The model keeps it alive.

    Raises:
        ValueError: For an option or a model that cannot be; says what can.
        TypeError: If `model` is no module, or an option has the wrong type.
        MemoryError: If the host cannot hold or lock the weights. Nothing was touched, or it was
            undone.
        StateError: If the model is offloaded already.

    Example:
        >>> handle = torch_offload.offload(model)  # doctest: +SKIP
        >>> model.generate(**inputs)  # doctest: +SKIP
    """
    config = Config(
        mode=mode,
        granularity=granularity,
        streams=streams,
        depth=depth,
        gpu_budget=gpu_budget,
        units=units,
        resident=resident,
    )
    return offload_with(model, device, config)


def offload_with(
    model: nn.Module, device: torch.device | str | int | None, config: Config
) -> Handle:
    """As `offload`, with the options in a `Config`."""
    check_model(model)
    target = resolve_device(device)
    specs = find_units(model, config.granularity, config.units, config.resident)
    plan = _plan(model, target, specs, config)
    streamed = [
        (index, spec) for index, spec in enumerate(specs) if plan.places[index] is not None
    ]
    _C.check_host_memory(
        added_bytes([parameter for _, parameter in spec.parameters] for _, spec in streamed),
        _HOST_RESERVE_BYTES,
    )
    installation = _Installation(model, target, config, specs, plan)
    try:
        installation.install()
    except BaseException:
        installation.undo(model)
        raise
    return installation.commit()


def _bytes_outside(model: nn.Module, specs: Sequence[UnitSpec]) -> int:
    """Bytes of weights and buffers that no unit holds: they stay on the device whatever happens."""
    in_units = {id(parameter) for spec in specs for _, parameter in spec.parameters}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in in_units
    }
    return sum(storages.values())


def _plan(
    model: nn.Module, device: torch.device, specs: Sequence[UnitSpec], config: Config
) -> _C.Plan:
    planned = [
        _C.Unit(
            name=spec.name,
            size_bytes=sum(_C.aligned_size(parameter.nbytes) for _, parameter in spec.parameters),
            layer_index=spec.layer_index,
            kind=getattr(_C.UnitKind, spec.kind),
        )
        for spec in specs
    ]
    budget = config.budget_bytes
    if budget is None:
        return _C.make_plan(planned, config.depth_bytes, None)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise ValueError(
                f"expected gpu_budget of at most {format_size(total)}, the memory of {device}, "
                f"got {format_size(budget)}"
            )
    outside = _bytes_outside(model, specs)
    least = outside + _C.least_budget_bytes(planned)
    if budget < least:
        raise ValueError(
            f"expected gpu_budget of at least {least} bytes ({format_size(least)}: "
            f"{format_size(outside)} that always stay, and the least window), got {budget} bytes "
            f"({format_size(budget)}); raise it, or use granularity='module' or units=[...] with "
            "smaller units"
        )
    return _C.make_plan(planned, config.depth_bytes, budget - outside)


class _Installation:
    """Everything that `offload` changes, in the order in which it can be undone."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        config: Config,
        specs: Sequence[UnitSpec],
        plan: _C.Plan,
    ) -> None:
        self._model: nn.Module | None = model
        self._device = device
        self._config = config
        self._specs: Sequence[UnitSpec] | None = specs
        self._streamed = [i for i in range(len(specs)) if plan.places[i] is not None]
        self._names = [spec.name for spec in specs]
        self._residents = ResidentMove(device)
        self._wrapped: list[weakref.ref[nn.Module]] = []
        self._guarded: list[weakref.ref[nn.Module]] = []
        self._former_devices: list[tuple[weakref.ref[torch.Tensor], torch.device]] = []
        self._engine = _C.Engine(
            device=_C.Device(device),
            torch_device=device,
            plan=plan,
            mode=config.mode,
            streams=config.streams,
            poison_on_release=config.poison,
            parameters=[_parameter_slots(spec) for spec in specs],
        )

    def install(self) -> None:
        assert self._model is not None and self._specs is not None
        model, specs = self._model, self._specs
        streamed = [specs[index] for index in self._streamed]
        moving = {id(parameter) for spec in streamed for _, parameter in spec.parameters}
        self._residents.move(
            tensor
            for tensor in (*model.parameters(), *model.buffers())
            if id(tensor) not in moving
        )
        for index in self._streamed:
            self._engine.move_in(index)
        explain = _mismatch_explainer({
            id(parameter): (name, spec.name)
            for spec in streamed
            for name, parameter in spec.parameters
        })
        for index in self._streamed:
            wrap_unit(specs[index].module, self._engine, index)
            self._wrapped.append(weakref.ref(specs[index].module))
        units = {id(spec.module) for spec in streamed}
        for module in _above(model, units):
            wrap_ancestor(module, self._engine, explain)
            self._wrapped.append(weakref.ref(module))
        dtypes = {t.dtype for t in model.parameters()}
        for module in _with_streamed_weights(model, moving):
            guard(module, self._device, dtypes)
            self._guarded.append(weakref.ref(module))
        if hasattr(model, _AUTO_COMPILE):
            vars(model)[_AUTO_COMPILE] = _never

    def commit(self) -> Handle:
        assert self._model is not None
        model = self._model
        self._former_devices = [
            (weakref.ref(tensor), device) for tensor, device in self._residents.former_devices()
        ]
        self._residents.forget()
        handle = Handle(
            model, self._engine, self._device, self._config, self._residents.size_bytes, self.undo
        )
        vars(model)[HANDLE_KEY] = handle
        # From here on nothing of ours may keep a module alive.
        self._model = self._specs = None
        return handle

    def undo(self, model: nn.Module) -> list[str]:
        """Gives the plain model back. Returns names of weights that came to lie elsewhere."""
        elsewhere = []
        for index in self._streamed:
            elsewhere += self._engine.move_out(index)
        for reference in self._wrapped:
            if (module := reference()) is not None:
                unwrap(module)
        for reference in self._guarded:
            if (module := reference()) is not None:
                unguard(module)
        vars(model).pop(_AUTO_COMPILE, None)
        vars(model).pop(HANDLE_KEY, None)
        self._residents.undo()
        with torch.no_grad():
            for tensor_reference, device in self._former_devices:
                tensor = tensor_reference()
                if tensor is not None and tensor.device != device:
                    tensor.data = tensor.data.to(device)
        self._engine.close()
        if elsewhere:
            warnings.warn(
                f"torch_offload: no room on their former device for {', '.join(elsewhere)}; they "
                "are on the CPU now",
                stacklevel=3,
            )
        return elsewhere


def _never(*args: object, **kwargs: object) -> bool:
    return False


def _parameter_slots(
    spec: UnitSpec,
) -> list[tuple[str, torch.Tensor, list[tuple[dict[str, torch.Tensor | None], str]]]]:
    """Where each parameter of a unit is looked up: every `_parameters` entry that holds it."""
    entries = [
        (module._parameters, key, parameter)
        for module in spec.module.modules()
        for key, parameter in module._parameters.items()
    ]
    return [
        (name, parameter, [(owner, key) for owner, key, found in entries if found is parameter])
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


def _with_streamed_weights(model: nn.Module, moving: set[int]) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(id(parameter) in moving for parameter in module.parameters()):
            yield module


def _mismatch_explainer(streamed: dict[int, tuple[str, str]]) -> Callable[[BaseException], str]:
    """Returns what a device-mismatch error is explained with: the weights that were read at rest.

    The innermost frame whose ``self`` owns a streamed parameter is where the read happened.
    """

    def explain(error: BaseException) -> str:
        names: list[str] = []
        frames = []
        traceback: TracebackType | None = error.__traceback__
        while traceback is not None:
            frames.append(traceback.tb_frame)
            traceback = traceback.tb_next
        for frame in reversed(frames):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                names = [
                    streamed[id(parameter)][0]
                    for parameter in owner.parameters()
                    if id(parameter) in streamed and parameter.device.type == "cpu"
                ]
                if names:
                    break
        listed = ", ".join(repr(name) for name in names[:6])
        return (
            "torch_offload: a streamed weight was read outside the call of its unit, where it is "
            "in host memory; keep what is read there on the device with "
            + (f"resident=[{listed}]" if names else "resident=[...]")
        )

    return explain
