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
from torch_offload.adapting import Adaptation
from torch_offload.debugging import in_ranges
from torch_offload.idle import IdleUnits
from torch_offload.leaves import LeafCut
from torch_offload.mismatch import MismatchExplainer
from torch_offload.tracing import refuse_tracing, refuse_unchecked_gradients

_ATTRIBUTE = "_call_impl"


def wrap_unit(
    unit_module: nn.Module, engine: _C.Engine, unit: int, range_name: str | None = None
) -> None:
    """Makes every call of a module acquire the unit before and release it after.

    With a `range_name`, NVTX ranges of that name surround the steps.
    """
    call_unit = engine.call_unit if range_name is None else in_ranges(range_name, engine.call_unit)
    reference = weakref.ref(unit_module)
    module_type = type(unit_module)
    call_plain: Callable[..., Any] = module_type._call_impl

    def _call_impl(*args: Any, **kwargs: Any) -> Any:
        module = reference()
        refuse_tracing(module, module_type)
        refuse_unchecked_gradients(module, args, kwargs)
        return call_unit(unit, call_plain, module, args, kwargs)

    vars(unit_module)[_ATTRIBUTE] = _call_impl


def wrap_ancestor(
    module: nn.Module,
    engine: _C.Engine,
    explainer: MismatchExplainer,
    leaf_cut: LeafCut | None,
    idle_units: IdleUnits | None = None,
    between: Adaptation | None = None,
) -> None:
    """Makes every call of `module` count, so that the outermost one begins and ends a pass.

    Args:
        module: Something with units below it.
        engine: Of the model.
        explainer: Told of errors.
        leaf_cut: With ``granularity="module"``, what observes passes until leaves are cut.
        idle_units: For the whole model, what looks at the first forward afterwards.
        between: Told of the outermost calls.
    """
    reference = weakref.ref(module)
    module_type = type(module)
    call_plain: Callable[..., Any] = module_type._call_impl

    def _call_impl(*args: Any, **kwargs: Any) -> Any:
        module = reference()
        refuse_tracing(module, module_type)
        outermost = None if engine.in_pass else between
        if outermost is not None:
            outermost.before(args, kwargs)
        try:
            if leaf_cut is None or not leaf_cut.is_to_be_traced:
                output = engine.call_ancestor(call_plain, module, args, kwargs)
            else:
                with leaf_cut.traced_pass():
                    output = engine.call_ancestor(call_plain, module, args, kwargs)
        except BaseException as error:
            if isinstance(error, RuntimeError):
                explainer.explain(error, args, kwargs)
            if outermost is not None:
                outermost.failed(error)
            raise
        if idle_units is not None:
            idle_units.tell(engine)
        if outermost is not None:
            outermost.after()
        return output

    def _call_impl_observed(*args: Any, **kwargs: Any) -> Any:
        if leaf_cut is None or leaf_cut.is_settled:
            return _call_impl(*args, **kwargs)
        with leaf_cut.observed_pass():
            return _call_impl(*args, **kwargs)

    vars(module)[_ATTRIBUTE] = _call_impl if leaf_cut is None else _call_impl_observed


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
    call_plain: Callable[..., Any] = nn.Identity._call_impl

    def _call_impl(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return call_plain(module, *args, **kwargs)

    vars(module)[_ATTRIBUTE] = _call_impl
    module(torch.empty(0, device="cpu"))
    unwrap(module)
    if not called:
        raise ImportError(
            f"torch_offload wraps nn.Module._call_impl, which torch {torch.__version__} does not "
            "call any more; use a torch version that the README lists"
        )
