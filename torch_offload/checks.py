"""What `offload` refuses at the start, with the reason and the way out."""

from __future__ import annotations

import torch
from torch import nn

from torch_offload._C import StateError
from torch_offload.calls import is_wrapped
from torch_offload.guards import is_guarded
from torch_offload.handle import HANDLE_KEY
from torch_offload.structure import is_table, size_bytes

# Attributes that other tools leave on the modules they hook, with the way out.
_FOREIGN_HOOKS = {
    "_hf_hook": (
        "accelerate",
        "load it without device_map=, or call accelerate.hooks.remove_hook_from_module(model, "
        "recurse=True)",
    ),
    "_diffusers_hook": (
        "diffusers",
        "do not call enable_*_offload, enable_layerwise_casting or enable_group_offload on it",
    ),
    "_is_fsdp_managed_module": ("FSDP", "offload the module before it is sharded"),
    "ds_inflight_param_registry": ("DeepSpeed", "load the model outside zero.Init"),
}
# Classes that wrap or replace a module, with what to offload instead.
_WRAPPERS = {
    "DataParallel": "its .module",
    "DistributedDataParallel": "the module before wrapping it",
    "FullyShardedDataParallel": "the module before wrapping it",
    "FSDPModule": "the module before fully_shard()",
    "OptimizedModule": "the module before torch.compile()",
    "ScriptModule": "the module before jit.script() or jit.trace()",
}


class _Plain:
    """Has what every class has."""


# What a subclass of parameters may have of its own and be an ordinary tensor.
_ORDINARY_OVERRIDES = frozenset(vars(_Plain)) | {
    "__annotations__",
    "__class_getitem__",
    "__copy__",
    "__deepcopy__",
    "__getstate__",
    "__init__",
    "__init_subclass__",
    "__new__",
    "__qualname__",
    "__reduce__",
    "__reduce_ex__",
    "__repr__",
    "__setstate__",
    "__slots__",
    "__str__",
}
_COMPRESSED_LAYOUTS = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
# Beyond this share, what is packed is the weights; below it, masks and tables of indices.
_MOST_PACKED_SHARE = 0.25
_PACKED_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)


def _is_packed_dtype(dtype: torch.dtype) -> bool:
    """Whether quantized weights come in it: packed integers, or floats of eight bits or less."""
    return dtype in _PACKED_INTEGERS or (dtype.is_floating_point and dtype.itemsize == 1)


def check_model(model: nn.Module) -> None:
    """Checks that a model can be offloaded as it is. Changes nothing, does not block.

    Raises:
        TypeError: If it is no module.
        ValueError: If its weights cannot be streamed.
        StateError: If it, a part of it, or what it is part of, is offloaded or hooked already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module, got {type(model).__name__}; of a pipeline, offload its "
            "transformer: offload(pipe.transformer)"
        )
    for name, module in model.named_modules():
        _check_module(name, module)
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)
    _check_quantization(model)
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError(
            f"expected a model with floating-point weights, got {type(model).__name__} with "
            f"{sum(1 for _ in model.parameters())} parameters, none of them floating-point; there "
            "is nothing to stream"
        )


def check_can_stay_on(device: torch.device, model: nn.Module) -> None:
    """Checks that what does not stream can be moved to where it is to stay.

    Raises:
        ValueError: For a compressed sparse tensor elsewhere. Torch gives it no other data in place:
            to set ``.data`` changes its device's name and leaves its values where they are.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout in _COMPRESSED_LAYOUTS and tensor.device.type != device.type:
            raise ValueError(
                f"expected sparse tensors that torch can move in place, got '{name}' as "
                f"{tensor.layout} on {tensor.device.type}; make it tensor.to_sparse_coo(), or have "
                f"it on {device} before offload()"
            )


def _check_module(name: str, module: nn.Module) -> None:
    where = f"'{name}' of it" if name else "it"
    if HANDLE_KEY in vars(module):
        raise StateError(
            f"expected a plain model, got one where {where} is offloaded already; call "
            "torch_offload.handle_of(...).remove() first"
        )
    if is_guarded(module):
        raise StateError(
            f"expected a plain model, got one where {where} is part of a larger model that is "
            "offloaded already; call remove() on the handle of that first"
        )
    for ancestor in type(module).__mro__:
        if ancestor.__name__ in _WRAPPERS and ancestor.__module__.startswith("torch."):
            raise StateError(
                f"expected a plain module, got one where {where} is a {ancestor.__name__}; "
                f"offload {_WRAPPERS[ancestor.__name__]}"
            )
    for attribute, (tool, cure) in _FOREIGN_HOOKS.items():
        if attribute in vars(module):
            raise StateError(
                f"expected a model without hooks of other tools, got one where {where} has "
                f"'{attribute}' of {tool}, which moves the same weights; {cure}"
            )
    if vars(module).get("_compiled_call_impl") is not None:
        raise StateError(
            f"expected a plain model, got one where {where} was compiled by module.compile(); "
            "offload the model before, or build it anew"
        )
    parameters: object = module._parameters
    if not isinstance(parameters, dict):
        kind = type(parameters)
        raise StateError(
            f"expected modules that hold their parameters in a dict, got one where {where} holds "
            f"them in a {kind.__name__} ({kind.__module__}), which moves the same weights; take "
            "that tool away first"
        )
    if is_wrapped(module):
        raise StateError(
            f"expected a plain model, got one where another tool has replaced '_call_impl' of "
            f"{where}; take that away first"
        )


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if hasattr(parameter, "ds_id"):
        raise StateError(
            f"expected parameters of plain torch, got '{name}', which DeepSpeed manages; load the "
            "model outside zero.Init"
        )
    kind = type(parameter)
    if not nn.parameter.is_lazy(parameter) and (own := _own_behaviour(kind)) is not None:
        raise ValueError(
            f"expected plain parameters, got '{name}' of class {kind.__name__} "
            f"({kind.__module__}), whose data cannot be swapped, as {own}; load the model "
            "unquantized and unsharded"
        )
    if parameter.device.type == "meta":
        raise ValueError(
            f"expected loaded weights, got parameter '{name}' on the meta device; load the "
            "checkpoint (or model.to_empty(device='cpu') and initialize) before offload()"
        )
    if parameter.is_inference():
        raise ValueError(
            f"expected parameters made outside inference mode, got '{name}' made inside: it "
            "has no version counter, so edits would go unseen; build or load the model outside "
            "torch.inference_mode()"
        )


def _own_behaviour(kind: type) -> str | None:
    """What makes a class of parameters more than ordinary tensors; None if nothing does.

    A subclass that adds attributes or methods, or builds and copies itself in its own way, is an
    ordinary tensor. One that has operators or conversions of its own may keep its bytes elsewhere.
    """
    if kind is nn.Parameter:
        return None
    if not issubclass(kind, nn.Parameter):
        return "it is no subclass of torch.nn.Parameter"
    for ancestor in kind.__mro__:
        if ancestor in nn.Parameter.__mro__:
            continue
        for name, value in vars(ancestor).items():
            plain = getattr(nn.Parameter, name, None)
            is_new = plain is None and name != "__tensor_flatten__"
            if not (is_new or value is plain or name in _ORDINARY_OVERRIDES):
                return f"it has a '{name}' of its own"
    return None


def _check_quantization(model: nn.Module) -> None:
    """Refuses weights of which a part lies where it would not be streamed.

    Packed weights of GPTQ and AWQ are buffers, states of bitsandbytes and others attributes: they
    would stay on the device, and next to nothing be streamed.
    """
    for name, module in model.named_modules():
        method = _quantization_method(module)
        if method is not None:
            where = f"'{name}' of it" if name else "it"
            raise ValueError(
                f"expected unquantized weights, got a model where {where} is quantized by "
                f"{method}: parts of such weights lie in buffers and attributes that would not be "
                "streamed; load it without quantization, or dequantized"
            )
    packed = {name: size for name, module in model.named_modules() if (size := _packed(module))}
    tables = {id(p) for module in model.modules() if is_table(module) for p in module.parameters()}
    weight_bytes = sum(size_bytes(p) for p in model.parameters() if id(p) not in tables)
    packed_bytes = sum(packed.values())
    if packed_bytes > _MOST_PACKED_SHARE * (packed_bytes + weight_bytes):
        largest = max(packed, key=lambda name: packed[name])
        kind = type(model.get_submodule(largest)).__name__
        raise ValueError(
            f"expected weights in parameters, got {packed_bytes} bytes of packed integers or "
            f"8-bit floats in buffers and attributes, as of '{largest}' ({kind}; GPTQ, AWQ and "
            f"float8 models have such), against {weight_bytes} bytes of parameters outside tables: "
            "they would stay on the device; load the model unquantized"
        )


def _quantization_method(module: nn.Module) -> str | None:
    scheme = type(vars(module).get("quantization_scheme"))
    if scheme.__module__.startswith("compressed_tensors."):
        return "compressed-tensors"
    # Packed objects, no tensors; a FloatFunctional of the same package is no more than a call.
    is_of_torch = type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized."))
    if is_of_torch and any(
        isinstance(value, torch.ScriptObject) for value in vars(module).values()
    ):
        return "torch.ao.quantization"
    quantizer = getattr(module, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    method = getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method) or type(quantizer).__name__)
    # A loader that has dequantized the weights leaves its name behind, and plain parameters.
    is_plain = quantizer is None or name == "gguf" or getattr(config, "dequantize", False)
    return None if is_plain else name


def _packed(module: nn.Module) -> int:
    """Bytes of what looks like packed weights beside a module's parameters, if it is most of it."""
    packed = sum(
        size_bytes(tensor)
        for tensor in (*module._buffers.values(), *vars(module).values())
        if isinstance(tensor, torch.Tensor)
        and not isinstance(tensor, nn.Parameter)
        and _is_packed_dtype(tensor.dtype)
        and tensor.dim() >= 2
    )
    own = sum(size_bytes(parameter) for parameter in module.parameters(recurse=False))
    return packed if packed > own else 0
