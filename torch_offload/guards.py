"""What an offloaded model refuses, and what it answers instead.

Every module with streamed weights below it is guarded, not the root alone: ``model.model.to()`` and
``deepcopy(model.model)`` must not get through. A guard is an instance attribute that shadows the
method of the class; `unguard` takes it away again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from torch_offload._C import StateError

_CURE = "call handle.remove() (torch_offload.handle_of(model).remove()) first"


def _refusal(call: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise StateError(
            f"expected a plain model for {call}, got one whose weights are streamed: {reason}; "
            f"{_CURE}"
        )

    return refuse


def _guarded_apply(
    reference: weakref.ref[nn.Module], probes: list[torch.Tensor]
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


def guard(module: nn.Module, device: torch.device, dtypes: set[torch.dtype]) -> None:
    """Installs the guards on one module with streamed weights below it."""
    probes = [torch.empty(1, dtype=dtype, device=device) for dtype in sorted(dtypes, key=str)]
    vars(module).update(
        {
            "__deepcopy__": _refusal("deepcopy", "a copy would run the original's units"),
            "__reduce_ex__": _refusal(
                "pickling or torch.save(model)",
                "save model.state_dict() or model.save_pretrained(), which work as they are (a "
                "file that was opened for this save has been emptied by now)",
            ),
            "share_memory": _refusal("share_memory()", "masters are page-locked memory"),
            "to_empty": _refusal("to_empty()", "it would lose the masters"),
        }
    )
    vars(module)["_apply"] = _guarded_apply(weakref.ref(module), probes)


GUARDED = ("__deepcopy__", "__reduce_ex__", "share_memory", "to_empty", "_apply")


def unguard(module: nn.Module) -> None:
    """Takes the guards of one module away."""
    for name in GUARDED:
        vars(module).pop(name, None)
