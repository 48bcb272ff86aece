"""What an offloaded model refuses, and what it answers instead.

Every module with streamed weights below it is guarded, not the root alone: ``model.model.to()`` and
``deepcopy(model.model)`` must not get through. A guard is an instance attribute that shadows the
method of the class; `unguard` takes it away again.

What has no method of the module to shadow is refused where it must pass by: wrappers of whole
models when they register the model as their child, and tracers at the next call (`refuse_tracing`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import compiler, nn
from torch._C import _is_tracing
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.fx import _symbolic_trace
from torch.nn.modules.module import register_module_module_registration_hook

from torch_offload._C import StateError

_CURE = "call handle.remove() (torch_offload.handle_of(model).remove()) first"
# By name, so that nothing of torch.distributed is imported for them.
_WRAPPERS = {
    "DataParallel": "its replicas would share one window",
    "DistributedDataParallel": "it synchronizes gradients of weights that are not on the device",
    "FullyShardedDataParallel": "it moves the same weights itself",
    "OptimizedModule": "torch.compile would capture weights that move between its calls",
}
GUARDED = (
    "__deepcopy__",
    "__reduce_ex__",
    "__prepare_scriptable__",
    "_apply",
    "_replicate_for_data_parallel",
    "compile",
    "share_memory",
    "to_empty",
)


def _refusal(call: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise StateError(
            f"expected a plain model for {call}, got one whose weights are streamed: {reason}; "
            f"{_CURE}"
        )

    return refuse


def _guarded_apply(
    reference: weakref.ref[nn.Module], probes: Sequence[torch.Tensor]
) -> Callable[..., nn.Module | None]:
    """Refuses conversions; one that would change nothing is no conversion.

    ``pipeline()``, Trainer and every script call ``.to(device)`` on a model that is there already.
    """
    refuse = _refusal(
        "a conversion such as .to(), .cuda() or .half()", "they have no single place to convert"
    )

    def _apply(
        fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module | None:
        for probe in probes:
            if fn(probe) is not probe:
                refuse()
        return reference()

    return _apply


def probes_on(device: torch.device, dtypes: set[torch.dtype]) -> list[torch.Tensor]:
    """Returns what a conversion is tried on: one element of each dtype, where the model runs."""
    return [torch.empty(1, dtype=dtype, device=device) for dtype in sorted(dtypes, key=str)]


def guard(module: nn.Module, probes: Sequence[torch.Tensor]) -> None:
    """Installs the guards on one module with streamed weights below it."""
    _watch_registrations()
    vars(module).update(
        {
            "__deepcopy__": _refusal("deepcopy", "a copy would run the original's units"),
            "__reduce_ex__": _refusal(
                "pickling or torch.save(model)",
                "save model.state_dict() or model.save_pretrained(), which work as they are (a "
                "file that was opened for this save has been emptied by now)",
            ),
            "__prepare_scriptable__": _refusal("torch.jit.script", "its calls would not be seen"),
            "_apply": _guarded_apply(weakref.ref(module), probes),
            "_replicate_for_data_parallel": _refusal("DataParallel", _WRAPPERS["DataParallel"]),
            "compile": _refusal("module.compile()", _WRAPPERS["OptimizedModule"]),
            "share_memory": _refusal("share_memory()", "masters are page-locked memory"),
            "to_empty": _refusal("to_empty()", "it would lose the masters"),
        }
    )


def unguard(module: nn.Module) -> None:
    """Takes the guards of one module away."""
    for name in GUARDED:
        vars(module).pop(name, None)


def is_guarded(module: nn.Module) -> bool:
    """Whether streamed weights lie below this module."""
    return "_apply" in vars(module) and "__prepare_scriptable__" in vars(module)


_is_watching = False


def _watch_registrations() -> None:
    """Refuses wrappers of a whole model as they are made, before they have changed anything.

    The hook is torch's global one, installed with the first offloaded model and then for good: it
    looks at the type of who registers a child, and at nothing else unless that is such a wrapper.
    """
    global _is_watching
    if not _is_watching:
        register_module_module_registration_hook(_refuse_wrapping)
        _is_watching = True


def _refuse_wrapping(outer: nn.Module, name: str, inner: nn.Module | None) -> None:
    wrapper = type(outer).__name__
    if inner is not None and wrapper in _WRAPPERS and any(map(is_guarded, inner.modules())):
        call = "torch.compile" if wrapper == "OptimizedModule" else wrapper
        _refusal(call, _WRAPPERS[wrapper])()


def refuse_tracing(module: nn.Module | None, expected_type: type[nn.Module]) -> None:
    """Raises if a call of an offloaded module is being recorded rather than run. About 0.2 us.

    A recorded call would replay with whatever the weights' memory holds by then. To call an
    offloaded model from compiled code, call it through ``torch.compiler.disable``.

    Raises:
        StateError: Under torch.compile, jit.trace, torch.export or fx, or if the module's class
            was changed since `offload`, as FSDP's ``fully_shard`` does.
    """
    if get_eval_frame_callback() or compiler._is_compiling_flag:
        _refusal(
            "torch.compile or torch.export",
            "a recorded call would read weights from where they are no more (a function around "
            "the model may be compiled if it calls it through torch.compiler.disable)",
        )()
    if _is_tracing() or _symbolic_trace._is_fx_tracing_flag:
        _refusal("jit.trace or fx", "a recorded call would read weights where they are no more")()
    if type(module) is not expected_type:
        _refusal(
            f"changing its class from {expected_type.__name__} to {type(module).__name__}",
            "FSDP's fully_shard does this, and moves the same weights itself",
        )()
