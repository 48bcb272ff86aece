"""What a parameter is at rest whose master is packed: shape, strides, dtype, and no memory.

The Parameter object stays the same for good; while it is at rest its class is a subclass of its own
one, and it unpacks itself for whoever needs its values:

- an operator that only reads it gets a copy, which is dropped afterwards;
- whatever gives an alias of it or writes to it (views, ``.data``, ``numpy()``, pickling,
  operators in place) unpacks it: it is an ordinary parameter until its unit is used again. Then it
  is packed again, with what was written to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from torch_offload import _C

# They give an alias, or keep one, and their schemas do not say so.
_ALIASING = frozenset({torch.ops.aten._unsafe_view.default, torch.ops.aten.set_.source_Tensor})


class PackedParameter:
    """Mixed into the class of a parameter at rest."""

    __slots__ = ()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        convert: Callable[[Any], torch.Tensor] = unpack if _may_alias(func) else unpacked
        args, kwargs = tree_map_only(PackedParameter, convert, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self: Any) -> str:
        """As of the plain parameter."""
        shown = unpacked(self).requires_grad_(self.requires_grad)
        shown.__class__ = type(self).__mro__[2]  # beside this one, see packed_class_of
        return repr(shown)

    def detach(self: Any) -> torch.Tensor:
        """As of any tensor: an alias, so that the parameter is unpacked.

        ``nn.Parameter(weight)`` takes what is of another class than Parameter for a tensor of a
        kind of its own, and wants this to be of the same kind: it gets a Parameter, as it would
        have made of the plain one.
        """
        plain = unpack(self)
        asker = sys._getframe(1)
        if asker.f_code is not nn.Parameter.__new__.__code__:
            return plain.detach()
        wanted = asker.f_locals["cls"]
        if wanted is not type(plain):
            raise TypeError(
                f"expected {type(plain).__name__} to be made of a weight whose master is packed, "
                f"got {wanted.__name__}; write {wanted.__name__}(weight.data)"
            )
        alias: torch.Tensor = torch.Tensor._make_subclass(wanted, plain)
        return alias

    @property
    def data(self) -> torch.Tensor:
        """As of any tensor: an alias, so that the parameter is unpacked."""
        return unpack(self).data

    @data.setter
    def data(self: Any, value: torch.Tensor) -> None:
        if is_packed(value):  # it is to be an alias of memory
            value = unpack(value)
        if is_packed(self):  # else it was the value
            unpack(self)
        self.data = value


def _unpacking(name: str) -> Callable[..., Any]:
    """A method that goes by memory, and not by operators: done once there is some."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(unpack(self), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    "__array__",
    "__deepcopy__",
    "__dlpack__",
    "__reduce_ex__",
    "_typed_storage",
    "apply_",
    "data_ptr",
    "map_",
    "map2_",
    "numpy",
    "share_memory_",
    "storage",
    "tolist",
    "untyped_storage",
):
    setattr(PackedParameter, _name, _unpacking(_name))


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter at rest that has no memory."""
    return isinstance(tensor, PackedParameter)


def unpack(parameter: Any) -> torch.Tensor:
    """Makes a parameter at rest an ordinary one, in place. Blocks until it is unpacked."""
    parameter._torch_offload_packed.unpack(parameter)
    unpacked: torch.Tensor = parameter
    return unpacked


def unpacked(parameter: Any) -> torch.Tensor:
    """A copy of what a parameter at rest holds, laid out in memory as it was."""
    packed: _C.PackedMaster = parameter._torch_offload_packed
    return packed.unpacked()


@lru_cache(maxsize=4096)
def _may_alias(func: Any) -> bool:
    """Whether what an operator returns or keeps may share memory with what it got."""
    schema = getattr(func, "_schema", None)
    if schema is None or func in _ALIASING:
        return True
    return any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))


@lru_cache(maxsize=256)
def packed_class_of(plain: type) -> type:
    """The class that parameters of a class have at rest."""
    return type(plain)(f"Packed{plain.__name__}", (PackedParameter, plain), {})
