"""The drop-in call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from torch_offload import _C
from torch_offload.budget import AUTO, budget_on
from torch_offload.checks import check_can_stay_on, check_model
from torch_offload.config import Config, Granularity, Masters, Mode, OnOom, Streams, Transport
from torch_offload.debugging import debug_is_asked_for, report_environment
from torch_offload.devices import resolve_device
from torch_offload.file_masters import FileMasters
from torch_offload.handle import Handle
from torch_offload.host_memory import HOST_RESERVE_BYTES, added_bytes, taken_on_host_device
from torch_offload.installation import FilesNotLockedError, install
from torch_offload.memory import Memory, memory_of
from torch_offload.packing import Packing, packed_host_bytes
from torch_offload.planning import Cut, Planned, cut_model, plan_best, plan_cut, streamed_units
from torch_offload.transport import packing_for
from torch_offload.user_warning import warn_user


def offload(
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    mode: Mode = "pipeline",
    granularity: Granularity = "sublayer",
    streams: Streams = "shared",
    transport: Transport = "raw",
    packed_cache: str | Path | None = None,
    masters: Masters = "plain",
    depth: int | str | None = None,
    gpu_budget: int | float | str | None = AUTO,
    headroom: int | str = "1GiB",
    on_oom: OnOom = "shrink",
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
        granularity: ``"sublayer"`` (default), ``"layer"``, ``"module"`` or ``"auto"``.
        streams: ``"shared"`` (default) or ``"split"``.
        transport: ``"raw"`` (default), ``"auto"`` (each unit raw or packed, on the device or
            streamed, as is predicted to be fastest; packed copies take more host memory),
            ``"packed"`` or ``"packed_resident"``; see `Config`.
        packed_cache: A folder that keeps the packed weights for the next run; see docs/packing.md.
        masters: ``"plain"`` (default) or ``"packed"``: host memory holds nothing but the packed
            weights, about 0.7 of their bytes; with any `transport` but ``"raw"``. What you keep of
            a weight at rest (a ``detach()``, a view, a numpy array) is unpacked memory, as large as
            the weight, for as long as you keep it, and is compared before each use.
        depth: Bytes that copies may run ahead: a number, ``"2GiB"``, or None for the largest
            layer, or 2.5 times the largest unit where that is less.
        gpu_budget: What weights may take on the device, resident ones and window together:
            ``"auto"`` (default) takes what is free and what forwards leave; bytes, ``"12GiB"``, or
            a fraction of the device's memory such as ``0.5``; None streams every unit through the
            default window. On the host device ``"auto"`` streams every unit.
        headroom: Device memory that ``gpu_budget="auto"`` leaves free, ``"1GiB"``.
        on_oom: When a forward runs out of device memory: ``"shrink"`` (default) gives back all
            resident units for the next one and raises, ``"raise"`` only says what to set.
        units: Names, patterns or modules to stream, for models that no rule fits.
        resident: Names or patterns of modules and parameters that stay on the device.
        debug: Hunt a bug: wait for every copy and use, poison places, keep the op log. Slow. Also
            by ``TORCH_OFFLOAD_DEBUG=1`` in the environment.
        nvtx: NVTX ranges for each unit, for Nsight.

    Returns:
        The handle: counters, report, `refresh`, `remove`. The model keeps it alive.

    Raises:
        ValueError: For an invalid option, an invalid combination of options, or a model that cannot
            be streamed; says what can.
        TypeError: If `model` is no module, or an option has the wrong type.
        MemoryError: If the host cannot hold or lock the weights. Nothing was touched, or it was
            undone.
        StateError: If the model, or one of its modules, is offloaded already, compiled, wrapped for
            several devices, or moved by hooks of another tool.
        NotImplementedError: If packed weights are asked for and nothing decodes them on `device`.
        ImportError: If `packed_cache` is given and safetensors is missing.

    Example:
        >>> handle = torch_offload.offload(model)  # doctest: +SKIP
        >>> model.generate(**inputs)  # doctest: +SKIP
    """
    config = Config(
        mode=mode,
        granularity=granularity,
        streams=streams,
        transport=transport,
        packed_cache=packed_cache,
        masters=masters,
        depth=depth,
        gpu_budget=gpu_budget,
        headroom=headroom,
        on_oom=on_oom,
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
    memory: Memory | None = None,
    files: FileMasters | None = None,
) -> Handle:
    """As `offload`, with the options in a `Config`. Blocks while it moves the weights, in place.

    Args:
        model: As in `offload`.
        device: As in `offload`, but without a default.
        config: The options.
        memory: What tells of the device's memory; None for the device itself.
        files: Parameters that show views of checkpoint files: they are streamed from there.

    Returns:
        The handle, which the model keeps alive.

    Raises:
        ValueError, TypeError, MemoryError, StateError, NotImplementedError, ImportError: As
            `offload`, but for invalid options, which `Config` refuses.

    Example:
        >>> config = torch_offload.Config(gpu_budget="12GiB")  # doctest: +SKIP
        >>> handle = torch_offload.offload_with(model, "cuda", config)  # doctest: +SKIP
    """
    files = FileMasters() if files is None else files
    check_model(model)
    target = resolve_device(device)
    check_can_stay_on(target, model)
    config = replace(config, debug=debug_is_asked_for(config.debug))
    report_environment(target, debug=config.debug)
    memory = memory or memory_of(target)
    cuts = cut_model(model, config)
    packing = packing_for(config, target)
    budget = _first_budget(cuts[0], config, memory, packing)
    wants_leaves = plan_best(cuts, config, budget, packing).granularity == "module"
    cut = cuts[0]  # of leaves only sublayers are known so far
    if files.views and not wants_leaves:  # leaves are cut from them in module order
        cut = replace(cut, specs=tuple(files.in_file_order(cut.specs)))
    planned = plan_cut(cut, config, budget, packing)
    streamed = [spec for _, spec in streamed_units(planned)]
    needed = _beside_masters(planned, config) + added_bytes(
        [parameter for _, parameter in spec.parameters if files.view_of(parameter) is None]
        for spec in streamed
    )
    reserve = HOST_RESERVE_BYTES if needed else 0
    if target.type == "cpu":  # the host's memory is the device's
        needed += taken_on_host_device(model, streamed, planned.plan.window_bytes)
    if needed:
        _C.check_host_memory(needed, reserve)
    files.beside_bytes = needed
    if config.units is not None:  # by name, so that the handle holds no module
        config = replace(config, units=tuple(spec.name for spec in cut.specs))
    try:
        # Nothing may follow it: an interrupt after it would find the model offloaded.
        return install(
            model,
            target,
            config,
            cut,
            planned,
            memory,
            files,
            packing=packing,
            wants_leaves=wants_leaves,
        )
    except FilesNotLockedError as error:
        if files.masters != "auto":
            raise
        warn_user(
            "weights are copied into page-locked memory, as the checkpoint's pages "
            f"cannot be locked: {error}"
        )
        return offload_with(model, target, config, memory, FileMasters(masters="arena"))


def _beside_masters(planned: Planned, config: Config) -> int:
    """Host memory that packed units take beside the masters, at the most."""
    if config.masters == "packed":
        return 0
    beside = packed_host_bytes(planned.plan, planned.packable.packed_bytes)
    if config.packed_cache is not None:  # what stays on the device is read back to be written
        beside += planned.packed_resident_bytes
    return beside


def _first_budget(cut: Cut, config: Config, memory: Memory | None, packing: Packing) -> int | None:
    """What weights may take before a forward has shown what it needs; None streams every unit.

    Raises:
        ValueError: If there is less than the least, and nobody has asked for it.
    """
    budget = budget_on(config.gpu_budget, memory)
    if config.gpu_budget != AUTO or memory is None:
        return budget
    room = memory.available_bytes() - config.headroom_bytes
    if plan_cut(cut, config, None, packing).device_bytes <= room:
        return None
    return max(0, room)
