"""``state_dict()`` and ``load_state_dict()`` of an offloaded model while a forward runs.

During a unit's call its parameters show its place, to every thread that looks. Another thread would
save what the next units overwrite, and lose what it loads: it is refused for as long as the forward
lasts. The forward's own thread, in a hook say, may do both; of a unit whose call it is inside of it
saves a copy, and loads nothing.

The hooks lie in each module's own dictionaries under a key of ours, so that they are found again
whatever interrupts us, and cost a forward nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from torch_offload import _C
from torch_offload._C import StateError
from torch_offload.packed_parameter import is_packed

_KEY = "torch_offload"
# Which method goes into which dictionary of a module.
_HOOKS = {
    "_state_dict_pre_hooks": "before_saving",
    "_state_dict_hooks": "after_saving",
    "_load_state_dict_pre_hooks": "before_loading",
    "_load_state_dict_post_hooks": "after_loading",
}


class _Watch:
    """The hooks of one module."""

    def __init__(self, module: nn.Module, engine: _C.Engine) -> None:
        self._module = weakref.ref(module)
        self._engine = engine

    def before_saving(self, *args: Any) -> None:
        """Raises during another thread's forward."""
        self._refuse_during_anothers_pass("state_dict()")

    def after_saving(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Copies what has been found in the window; raises if that was another thread's doing."""
        window = self._engine.window
        for key in module._parameters:
            value = state.get(prefix + key)
            # A Parameter itself (`keep_vars`) shows its master again by and by.
            if value is None or isinstance(value, nn.Parameter) or not _lies_in(value, window):
                continue
            if not self._is_own_pass():
                raise self._refusal("state_dict()", "has begun while it ran")
            with torch.inference_mode(False), torch.no_grad():
                state[prefix + key] = value.to("cpu", copy=True)

    def before_loading(self, *args: Any) -> None:
        """Raises during another thread's forward, and inside the call of a unit below."""
        self._refuse_during_anothers_pass("load_state_dict()")
        module = self._module()
        if module is None or not self._engine.in_pass:
            return
        window = self._engine.window
        for name, parameter in module.named_parameters():
            if not is_packed(parameter) and _lies_in(parameter, window):
                raise StateError(
                    "expected load_state_dict() outside the calls of units, got it inside that of "
                    f"the unit with '{name}', which would lose what is loaded; call it after the "
                    "forward"
                )

    def after_loading(self, *args: Any) -> None:
        """Raises if another thread's forward has begun meanwhile: something may be lost."""
        self._refuse_during_anothers_pass("load_state_dict()", "has begun while it ran")

    def _refuse_during_anothers_pass(self, call: str, state: str = "is running") -> None:
        engine = self._engine
        if not engine.is_closed and engine.in_pass and not self._is_own_pass():
            raise self._refusal(call, state)

    def _is_own_pass(self) -> bool:
        try:
            _ = self._engine.plan  # which only the pass's own thread may read
        except StateError:
            return False
        return self._engine.in_pass

    @staticmethod
    def _refusal(call: str, state: str) -> StateError:
        return StateError(
            f"expected {call} between forwards, got it while another thread's forward {state}, in "
            "which weights are not at rest; call it (again) afterwards, or guard the model with a "
            "lock"
        )


def watch_state(module: nn.Module, engine: _C.Engine) -> None:
    """Installs the hooks on one module with streamed weights below it."""
    watch = _Watch(module, engine)
    for attribute, method in _HOOKS.items():
        vars(module)[attribute][_KEY] = getattr(watch, method)


def unwatch_state(module: nn.Module) -> None:
    """Takes them away, if they are there."""
    for attribute in _HOOKS:
        vars(module).get(attribute, {}).pop(_KEY, None)


def _lies_in(tensor: torch.Tensor, window: tuple[int, int]) -> bool:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return False
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a wrapper subclass: it has no memory of its own
        return False
    return window[0] <= address < window[1]
