"""The wrapper around a module's call.

Note [One wrapper, no hooks]: the wrapper is an instance attribute ``_call_impl``, which
``nn.Module.__call__`` looks up. Hooks would not do: they do not run on KeyboardInterrupt,
SystemExit or CancelledError and then leave parameters on their places; users' own hooks would see
the masters; one hook switches off the fast path of ``nn.TransformerEncoderLayer``; and they cost
four times as much. The attribute is private to torch, so `probe` tests at import that it still
works.

The wrapper holds its module by a weak reference: a bound method would close a cycle through the
module, and model, arena and window would outlive ``del`` until a collection.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch_offload import _C

_ATTRIBUTE = "_call_impl"
_DEVICE_MISMATCH = ("same device", "different devices", "device type")


def wrap_unit(module: nn.Module, engine: _C.Engine, unit: int) -> None:
    """Makes every call of `module` acquire the unit before and release it after."""
    reference = weakref.ref(module)
    call_plain = type(module)._call_impl

    def _call_impl(*args: Any, **kwargs: Any) -> Any:
        token = _C.CallToken()
        # An interrupt may strike between any two steps: the token knows what was acquired by then.
        try:
            engine.acquire(token, unit)
            return engine.finish(token, call_plain(reference(), *args, **kwargs))
        finally:
            engine.release(token)

    vars(module)[_ATTRIBUTE] = _call_impl


def wrap_ancestor(
    module: nn.Module,
    engine: _C.Engine,
    explain_mismatch: Callable[[BaseException], str],
) -> None:
    """Makes every call of `module` count, so that the outermost one begins and ends a pass."""
    reference = weakref.ref(module)
    call_plain = type(module)._call_impl

    def _call_impl(*args: Any, **kwargs: Any) -> Any:
        token = _C.CallToken()
        try:
            engine.enter(token)
            return engine.finish(token, call_plain(reference(), *args, **kwargs))
        except RuntimeError as error:
            add_explanation(error, explain_mismatch)
            raise
        finally:
            engine.release(token)

    vars(module)[_ATTRIBUTE] = _call_impl


def add_explanation(error: RuntimeError, explain_mismatch: Callable[[BaseException], str]) -> None:
    """Says which streamed weight was read outside its unit's call, if that is what happened."""
    text = str(error)
    if any(words in text for words in _DEVICE_MISMATCH) and "torch_offload" not in text:
        error.args = (f"{text}\n{explain_mismatch(error)}", *error.args[1:])


def unwrap(module: nn.Module) -> None:
    """Undoes either of the above."""
    vars(module).pop(_ATTRIBUTE, None)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a call of this instance goes through a wrapper of ours."""
    return _ATTRIBUTE in vars(module)


def probe() -> None:
    """Checks that this torch still calls the attribute that the wrapper is.

    Raises:
        ImportError: If it does not; nothing of ours would run then.
    """
    called = []
    module = nn.Identity()

    def _call_impl(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return type(module)._call_impl(module, *args, **kwargs)

    vars(module)[_ATTRIBUTE] = _call_impl
    module(torch.empty(0))
    unwrap(module)
    if not called:
        raise ImportError(
            f"torch_offload wraps nn.Module._call_impl, which torch {torch.__version__} does not "
            "call any more; use a torch version that the README lists"
        )
