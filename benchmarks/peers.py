"""What the product is measured beside: accelerate, AirLLM, and the least that streams at all."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from clocks import DEVICE, ON_GPU, synchronize
from torch import nn

from torch_offload import _C


class AccelerateOffload:
    """accelerate's `cpu_offload`: every leaf copies its weights when it is called."""

    def __init__(self, model: nn.Module) -> None:
        from accelerate import cpu_offload

        self.model = cpu_offload(model, execution_device=DEVICE)

    def __enter__(self) -> AccelerateOffload:
        return self

    def __exit__(self, *_: object) -> None:
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(self.model)


class AccelerateAuto:
    """accelerate's ``device_map="auto"``: the first layers stay, within so many bytes.

    Without a GPU it has nothing to choose, and all is offloaded.
    """

    def __init__(self, model: nn.Module, budget_bytes: int) -> None:
        from accelerate import cpu_offload, dispatch_model, infer_auto_device_map

        if not ON_GPU:
            self.model = cpu_offload(model, execution_device=DEVICE)
            return
        device_map = infer_auto_device_map(
            model,
            max_memory={DEVICE.index or 0: budget_bytes, "cpu": 10**13},
            no_split_module_classes=["LlamaDecoderLayer"],
        )
        self.model = dispatch_model(model, device_map)

    def __enter__(self) -> AccelerateAuto:
        return self

    def __exit__(self, *_: object) -> None:
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(self.model)


class AirLLM:
    """AirLLM: each module's file is read, moved to the device and dropped again at every call."""

    def __init__(self, folder: Path, shards: Path) -> None:
        from airllm import AutoModel

        with contextlib.redirect_stdout(sys.stderr):
            self._peer = AutoModel.from_pretrained(
                str(folder),
                device=str(DEVICE),
                dtype=torch.bfloat16,
                layer_shards_saving_path=str(shards),
            )
        self.model: nn.Module = self._peer.model

    def __enter__(self) -> AirLLM:
        return self

    def __exit__(self, *_: object) -> None:
        if self._peer._executor is not None:
            self._peer._executor.shutdown()


class BarePipeline:
    """The least event pipeline: a flat page-locked layer per copy, one copy stream, two slots.

    A layer's slot is refilled as soon as its kernels are queued, two layers ahead, so copies and
    kernels of one forward overlap. Nothing runs ahead into the next forward, nothing is checked,
    and the weights cannot be read or edited any more. On the host device the same calls are made
    without streams.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layers = list(model.model.layers)  # type: ignore[union-attr]
        parameters = [list(layer.parameters()) for layer in self._layers]
        offsets, layer_bytes = _flat_layout(parameters[0])
        count = len(self._layers)
        # One registration: torch's own page-locked allocator would round each layer up.
        self._host = torch.empty(count * layer_bytes, dtype=torch.uint8).fill_(0)
        self._page_lock(True)
        self._slots = [torch.empty(layer_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        self._masters = list(self._host.split(layer_bytes))
        for index, layer in enumerate(parameters):
            for parameter, begin in zip(layer, offsets, strict=True):
                flat = parameter.data.reshape(-1).view(torch.uint8)
                end = begin + flat.numel()
                self._masters[index][begin:end].copy_(flat)
                place = self._slots[index % 2][begin:end].view(parameter.dtype)
                parameter.data = place.view(parameter.shape)
        self._copy_stream = torch.cuda.Stream(DEVICE) if ON_GPU else None
        self._ready = [torch.cuda.Event() if ON_GPU else None for _ in range(count)]
        self._free = [torch.cuda.Event() if ON_GPU else None for _ in range(2)]
        self._hooks = []
        for index, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_pre_hook(self._before(index)))
            self._hooks.append(layer.register_forward_hook(self._after(index)))
        for event in self._free:
            self._record(event)

    def _before(self, index: int) -> Any:
        def hook(*_: object) -> None:
            if index == 0:
                self._start(0)
                self._start(1)
            if self._ready[index] is not None:
                torch.cuda.current_stream(DEVICE).wait_event(self._ready[index])

        return hook

    def _after(self, index: int) -> Any:
        def hook(*_: object) -> None:
            self._record(self._free[index % 2])
            self._start(index + 2)

        return hook

    def _start(self, index: int) -> None:
        if index >= len(self._layers):
            return
        with torch.cuda.stream(self._copy_stream) if ON_GPU else contextlib.nullcontext():
            if self._copy_stream is not None:
                self._copy_stream.wait_event(self._free[index % 2])  # its last reader
            self._slots[index % 2].copy_(self._masters[index], non_blocking=True)
            self._record(self._ready[index])

    @staticmethod
    def _record(event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.record()

    def _page_lock(self, lock: bool) -> None:
        if not ON_GPU:
            return
        runtime, address = torch.cuda.cudart(), self._host.data_ptr()
        torch.cuda.check_error(
            runtime.cudaHostRegister(address, self._host.nbytes, 0)
            if lock
            else runtime.cudaHostUnregister(address)
        )

    def __enter__(self) -> BarePipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        synchronize()
        for hook in self._hooks:
            hook.remove()
        self._page_lock(False)


def _flat_layout(parameters: list[nn.Parameter]) -> tuple[list[int], int]:
    """Where each parameter begins in a flat layer, and how long that is: (offsets, bytes)."""
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        end += _C.aligned_size(parameter.nbytes)
    return offsets, end
