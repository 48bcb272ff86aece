"""What an offloaded model refuses, and what it answers instead.

Every module with streamed weights below it is guarded, not the root alone: ``model.model.to()`` and
``deepcopy(model.model)`` must not get through. A guard is an instance attribute that shadows the
method of the class; `unguard` takes it away again. Modules that stay on the device as a whole are
guarded against less: converted alone, they would not fit the rest, but they may be copied.

What has no method of the module to shadow is refused where it must pass by: wrappers of whole
models when they register the model as their child, torch.distributed's when they look up what was
applied before, and what records a call at the next call (see tracing.py).
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from torch_offload import _C
from torch_offload._C import StateError
from torch_offload.state_dicts import unwatch_state, watch_state

try:
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
except ImportError:  # a torch without them: `fully_shard` is then refused at the next call
    REGISTRY_KEY = STATE_KEY = "__torch_offload_no_composition__"

_CURE = "call handle.remove() (torch_offload.handle_of(model).remove()) first"
# From around the model; filled in with its class.
_CURE_AROUND = (
    "call handle.remove() first, the handle being that of the {kind} inside, which "
    "torch_offload.handle_of() finds from outside as well"
)
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


def refusal(call: str, reason: str, cure: str = _CURE) -> Callable[..., NoReturn]:
    """Returns a function that raises: what was expected, what came, what to do."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise StateError(
            f"expected a plain model for {call}, got one whose weights are streamed: {reason}; "
            f"{cure}"
        )

    return refuse


class _NoComposition(dict[Any, Any]):
    """Where torch.distributed notes which of its APIs were applied to a module: here, none can be.

    Note [Refusing FSDP before it has changed anything]: ``FullyShardedDataParallel`` registers the
    module as its child only when the parameters are gone already, and ``fully_shard`` never does.
    But the first thing that either does is to look up these notes in every module.
    """

    def __contains__(self, key: object) -> bool:
        # The same question is asked by whoever collects a state dict, and that changes nothing.
        if sys._getframe(2).f_code.co_name != "_get_fsdp_states_with_modules":
            refusal(
                "FSDP, fully_shard and other APIs of torch.distributed that are applied to modules",
                _WRAPPERS["FullyShardedDataParallel"],
            )()
        return False


def _guarded_apply(
    reference: weakref.ref[nn.Module], probes: Sequence[torch.Tensor], reason: str
) -> Callable[..., nn.Module | None]:
    """Refuses conversions; one that would change nothing is no conversion.

    ``pipeline()``, Trainer and every script call ``.to(device)`` on a model that is there already.
    """
    what = "a conversion such as .to(), .cuda() or .half()"
    refuse = refusal(what, reason)
    kind = type(reference()).__name__
    refuse_from_outside = refusal(
        what,
        f"{reason}; what lies before it in the module around it has been converted by now",
        _CURE_AROUND.format(kind=kind),
    )

    def _apply(
        fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module | None:
        for probe in probes:
            if fn(probe) is not probe:
                # A module around the model converts its parts one by one, in its own `_apply`.
                is_from_outside = sys._getframe(1).f_code.co_name == "_apply"
                (refuse_from_outside if is_from_outside else refuse)()
        return reference()

    return _apply


class Probes:
    """What a conversion is tried on: a tiny tensor of each kind that a module holds.

    A kind is a dtype and, as ``.to(memory_format=...)`` asks for it, an order of strides.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_kind: dict[tuple[torch.dtype, int, bool], torch.Tensor] = {}

    def of(self, module: nn.Module) -> list[torch.Tensor]:
        """Returns one probe for each kind of parameter and buffer in a module, where it runs."""
        kinds = {
            _kind(tensor)
            for inner in module.modules()
            for tensor in (*inner._parameters.values(), *inner._buffers.values())
            if tensor is not None
        }
        for kind in kinds - self._by_kind.keys():
            self._by_kind[kind] = self._make(*kind)
        return [self._by_kind[kind] for kind in sorted(kinds, key=str)]

    def _make(self, dtype: torch.dtype, dim: int, is_channels_last: bool) -> torch.Tensor:
        probe = torch.empty((2,) * dim, dtype=dtype, device=self._device)
        return probe.to(memory_format=_CHANNELS_LAST[dim]) if is_channels_last else probe


# The dimensions that have formats of memory, and the one that is not the default.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _kind(tensor: torch.Tensor) -> tuple[torch.dtype, int, bool]:
    if tensor.dim() not in _CHANNELS_LAST:
        return tensor.dtype, 0, False
    is_default = tensor.is_contiguous() or not tensor.is_contiguous(
        memory_format=_CHANNELS_LAST[tensor.dim()]
    )
    return tensor.dtype, tensor.dim(), not is_default


def guard(module: nn.Module, probes: Sequence[torch.Tensor], engine: _C.Engine) -> None:
    """Installs the guards on one module with streamed weights below it."""
    _watch_registrations()
    watch_state(module, engine)
    vars(module).setdefault(REGISTRY_KEY, _NoComposition())
    vars(module).setdefault(STATE_KEY, _NoComposition())
    vars(module).update(
        {
            "__deepcopy__": refusal("deepcopy", "a copy would run the original's units"),
            "__reduce_ex__": refusal(
                "pickling or torch.save(model)",
                "save model.state_dict() or model.save_pretrained(), which work as they are (a "
                "file that was opened for this save has been emptied by now)",
            ),
            "__prepare_scriptable__": refusal("torch.jit.script", "its calls would not be seen"),
            "_apply": _guarded_apply(
                weakref.ref(module), probes, "they have no single place to convert"
            ),
            "_replicate_for_data_parallel": refusal("DataParallel", _WRAPPERS["DataParallel"]),
            "compile": refusal("module.compile()", _WRAPPERS["OptimizedModule"]),
            "share_memory": refusal("share_memory()", "masters are page-locked memory"),
            "to_empty": refusal("to_empty()", "it would lose the masters"),
        }
    )


def guard_resident(module: nn.Module, probes: Sequence[torch.Tensor]) -> None:
    """Installs the guards on one module of an offloaded model that streams nothing itself."""
    reason = "a part alone would not fit the rest any more, which stays as it is"
    vars(module).update(
        {
            "__deepcopy__": _copy_without_guards(weakref.ref(module)),
            "__reduce_ex__": refusal(
                "pickling or torch.save(module)",
                "save the state_dict() of the module, which works as it is",
            ),
            "_apply": _guarded_apply(weakref.ref(module), probes, reason),
            "share_memory": refusal("share_memory()", reason),
            "to_empty": refusal("to_empty()", reason),
        }
    )


def _copy_without_guards(reference: weakref.ref[nn.Module]) -> Callable[[dict[int, Any]], Any]:
    def deepcopy(memo: dict[int, Any]) -> Any:
        module = reference()
        guards = {name: vars(module).pop(name) for name in GUARDED if name in vars(module)}
        try:
            return copy.deepcopy(module, memo)
        finally:
            vars(module).update(guards)

    return deepcopy


def unguard(module: nn.Module) -> None:
    """Takes the guards of one module away."""
    unwatch_state(module)
    for name in GUARDED:
        vars(module).pop(name, None)
    for name in (REGISTRY_KEY, STATE_KEY):
        if isinstance(vars(module).get(name), _NoComposition):
            del vars(module)[name]


def is_guarded(module: nn.Module) -> bool:
    """Whether this module is part of an offloaded model, and holds weights."""
    return "_apply" in vars(module) and "to_empty" in vars(module)


def has_streamed(module: nn.Module) -> bool:
    """Whether streamed weights lie below this module."""
    return is_guarded(module) and "__prepare_scriptable__" in vars(module)


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
    if inner is not None and wrapper in _WRAPPERS and any(map(has_streamed, inner.modules())):
        call = "torch.compile" if wrapper == "OptimizedModule" else wrapper
        refusal(call, _WRAPPERS[wrapper])()
