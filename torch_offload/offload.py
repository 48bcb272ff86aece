"""The drop-in call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from torch_offload import _C
from torch_offload.checks import check_model
from torch_offload.config import Config, Granularity, Mode, Streams
from torch_offload.debugging import LOGGER, debug_is_asked_for, report_environment
from torch_offload.devices import resolve_device
from torch_offload.file_masters import FileMasters
from torch_offload.handle import Handle
from torch_offload.host_memory import added_bytes
from torch_offload.installation import FilesNotLockedError, install
from torch_offload.planning import plan_units
from torch_offload.units import find_units

# Kept free on the host: for the process's own activations, and for everybody else.
_HOST_RESERVE_BYTES = 256 * 2**20


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
    debug: bool = False,
    nvtx: bool = False,
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
        depth: Bytes that copies may run ahead: a number, ``"2GiB"``, or None for the largest
            layer, or 2.5 times the largest unit where that is less.
        gpu_budget: Bytes that weights may take on the device, resident ones and window together;
            None streams every unit through the default window.
        units: Names, patterns or modules to stream, for models that no rule fits.
        resident: Names or patterns of modules and parameters that stay on the device.
        debug: Hunt a bug: wait for every copy and use, poison places, keep the op log. Slow. Also
            by ``TORCH_OFFLOAD_DEBUG=1`` in the environment.
        nvtx: NVTX ranges for each unit, for Nsight.

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
        debug=debug,
        nvtx=nvtx,
    )
    return offload_with(model, device, config)


def offload_with(
    model: nn.Module,
    device: torch.device | str | int | None,
    config: Config,
    files: FileMasters | None = None,
) -> Handle:
    """As `offload`, with the options in a `Config`.

    Parameters that show views of checkpoint files, as `files` says, are streamed from there.
    """
    files = FileMasters() if files is None else files
    check_model(model)
    target = resolve_device(device)
    config = replace(config, debug=debug_is_asked_for(config.debug))
    report_environment(target, debug=config.debug)
    specs = find_units(model, config.granularity, config.units, config.resident)
    if files.views and config.granularity != "module":  # leaves are cut from them in module order
        specs = files.in_file_order(specs)
    plan = plan_units(model, target, specs, config)
    streamed = [spec for spec, place in zip(specs, plan.places, strict=True) if place is not None]
    _C.check_host_memory(
        added_bytes(
            [parameter for _, parameter in spec.parameters if files.view_of(parameter) is None]
            for spec in streamed
        ),
        _HOST_RESERVE_BYTES,
    )
    if config.units is not None:  # by name, so that the handle holds no module
        config = replace(config, units=tuple(spec.name for spec in specs))
    try:
        handle = install(model, target, config, specs, plan, files)
    except FilesNotLockedError as error:
        if files.masters != "auto":
            raise
        warnings.warn(
            "torch_offload: weights are copied into page-locked memory, as the checkpoint's pages "
            f"cannot be locked: {error}",
            stacklevel=3,
        )
        return offload_with(model, target, config, FileMasters(masters="arena"))
    LOGGER.info("offloaded: %r", handle)
    return handle
