"""Which weights a forward reads outside the call of the module that owns them.

Some modules hand a child's weight to a kernel without calling the child (a Mamba's ``conv1d``), or
call a method that is no forward. A trace of one forward tells, before a unit is cut that fine.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from torch_offload.packed_parameter import is_packed

Stack = tuple[int, ...]
_Call: TypeAlias = Callable[..., Any]

# Asked by every assignment of `.data`, our own included, and visible in inference mode: it compares
# the kinds of two tensors and reads no byte of either.
COMPARES_KINDS = torch.ops.aten._has_compatible_shallow_copy_type.default


class ReadTrace:
    """What one or more forwards read, and which modules were in their call at that moment.

    Attributes:
        calls: How often each module was called, by qualified name.
        reads: Per parameter name, the distinct stacks of active modules (``id``s) under which an
            operator took the parameter, or a view of it, as an argument.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: Counter[str] = Counter()
        self.reads: dict[str, set[Stack]] = defaultdict(set)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._modules = dict(model.named_modules())

    def outside(self, owners: Mapping[str, nn.Module]) -> dict[str, str]:
        """Reads of a parameter while its owner was not in its call.

        Args:
            owners: Parameter name to the module whose call must surround every read.

        Returns:
            Parameter name to the name of the innermost module that was active at such a read
            (empty for the model itself or for none).
        """
        found: dict[str, str] = {}
        for name, owner in owners.items():
            for stack in self.reads.get(name, ()):
                if id(owner) not in stack:
                    found[name] = self._names.get(stack[-1], "") if stack else ""
        return found

    def proven_leaves(self) -> set[str]:
        """Names of the leaves that may be units of their own.

        They have parameters of their own, were called, and no parameter was read outside the call.
        """
        proven: set[str] = set()
        for name, module in self._modules.items():
            own = [f"{name}.{p}" if name else p for p, _ in module.named_parameters(recurse=False)]
            if not own or not self.calls[name]:
                continue
            stacks = [stack for parameter in own for stack in self.reads.get(parameter, ())]
            if stacks and all(id(module) in stack for stack in stacks):
                proven.add(name)
        return proven

    def modules(self, names: Iterable[str]) -> list[nn.Module]:
        """The modules that had these names when the trace began."""
        return [self._modules[name] for name in names]


@contextmanager
def trace_reads(model: nn.Module) -> Iterator[ReadTrace]:
    """Traces the forwards that run inside the ``with`` block, on this thread.

    Costs some microseconds of Python per operator, so it is for one pass. Works on a model that is
    being streamed: parameters are followed by identity and through views, and by their address at
    the start. What it cannot follow: ``weight.data`` of a parameter that has moved meanwhile.

    Module calls are seen by a wrapper set as ``_call_impl`` on each instance (forward hooks would
    switch off fused paths of torch); what stood there before is called inside and put back, except
    where it has been replaced or taken away meanwhile: a plan that changed keeps its own wrappers.

    Args:
        model: The model whose parameters and modules are watched.

    Yields:
        The trace, which fills while forwards run and stays readable afterwards.
    """
    trace = ReadTrace(model)
    stack: list[int] = []
    wrappers: list[tuple[dict[str, Any], _Call, _Call | None]] = []
    try:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            traced, before = _traced(module, trace, stack), vars(module).get("_call_impl")
            # Noted before it is done: an interrupt in between must not leave it behind.
            wrappers.append((vars(module), traced, before))
            vars(module)["_call_impl"] = traced
        with _ReadMode(model, trace, stack):
            yield trace
    finally:
        for attributes, traced, before in wrappers:
            if attributes.get("_call_impl") is not traced:
                continue
            if before is None:
                del attributes["_call_impl"]
            else:
                attributes["_call_impl"] = before


def _traced(module: nn.Module, trace: ReadTrace, stack: list[int]) -> _Call:
    inner: _Call = module._call_impl
    name = trace._names[id(module)]
    thread = threading.get_ident()

    def traced_call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return inner(*args, **kwargs)
        stack.append(id(module))
        trace.calls[name] += 1
        try:
            return inner(*args, **kwargs)
        finally:
            stack.pop()

    return traced_call


class _ReadMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes the stack of active modules at every operator that takes a watched parameter."""

    def __init__(self, model: nn.Module, trace: ReadTrace, stack: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._trace = trace
        self._stack = stack
        self._aliases: MutableMapping[torch.Tensor, str] = WeakIdKeyDictionary()
        self._by_address: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            self._aliases[parameter] = name
            if _has_memory(parameter) and parameter.numel():
                self._by_address[parameter.data_ptr()] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is COMPARES_KINDS:
            return func(*args, **kwargs)
        name: str | None = None
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                read = self._name_of(leaf)
                if read is not None:
                    name = read
                    self._trace.reads[read].add(tuple(self._stack))
        result = func(*args, **kwargs)
        if name is not None and _returns_view(func):
            for leaf in tree_iter(result):
                if isinstance(leaf, torch.Tensor):
                    self._aliases[leaf] = name
        return result

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        known = self._aliases.get(tensor)
        if known is None and _has_memory(tensor):
            known = self._by_address.get(tensor.data_ptr())
        return known


def _has_memory(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.layout is torch.strided and not is_packed(tensor)


@lru_cache(maxsize=4096)
def _returns_view(func: Any) -> bool:
    return any(result.alias_info is not None for result in func._schema.returns)
