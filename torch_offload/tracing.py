"""What records a call of an offloaded module, to be replayed or differentiated later.

A record names memory, and what lies there changes: the window's bytes with every unit. Autograd is
the exception, as long as it checks the versions of what it saved: a backward then raises by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._C import _is_tracing, is_grad_enabled
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.compiler import is_dynamo_compiling
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_iter

from torch_offload.guards import refusal

# Untyped in some versions of torch.
_is_fx_tracing: Callable[[], bool] = is_fx_symbolic_tracing


def refuse_tracing(module: nn.Module | None, expected_type: type[nn.Module]) -> None:
    """Raises if a call of an offloaded module is being traced rather than run. About 0.2 us.

    A traced call would replay with whatever the weights' memory holds by then. To call an
    offloaded model from compiled code, call it through ``torch.compiler.disable``.

    Raises:
        StateError: Under torch.compile, jit.trace, torch.export or fx, or if the module's class
            was changed since `offload`, as parametrizations and FSDP's ``fully_shard`` do.
    """
    # Asked first: dynamo answers it itself, and so shows our words where it cannot go on.
    if is_dynamo_compiling() or get_eval_frame_callback() or torch.compiler._is_compiling_flag:
        refusal(
            "torch.compile or torch.export",
            "a recorded call would read weights from where they are no more (a function around "
            "the model may be compiled if it calls it through torch.compiler.disable)",
        )()
    if _is_tracing() or _is_fx_tracing():
        refusal("jit.trace or fx", "a recorded call would read weights where they are no more")()
    if type(module) is expected_type:
        return
    if module is not None and parametrize.is_parametrized(module):
        refusal(
            f"a parametrization (torch.nn.utils.parametrize) of a {expected_type.__name__}",
            "it has moved what is parametrized to modules of its own, in which no unit knows it; "
            "parametrize before offload()",
        )()
    else:
        refusal(
            f"changing its class from {expected_type.__name__} to {type(module).__name__}",
            "FSDP's fully_shard does this, and moves the same weights itself",
        )()


def refuse_unchecked_gradients(
    module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raises if a backward through this call would not notice that weights were overwritten.

    Autograd compares versions of what it saved, which `release` moves on; but it does not where
    hooks take the saved tensors (gradient checkpointing, ``save_on_cpu``), nor do the transforms of
    ``torch.func`` that differentiate: their gradients would be wrong without an error. About 0.2 us
    in grad mode, less outside.

    Raises:
        StateError: If so, and if there is anything to differentiate.
    """
    if peek_interpreter_stack() is not None and any(
        level.key() == TransformType.Grad for level in get_interpreter_stack()
    ):
        refusal(
            "torch.func.grad, vjp, jacrev or hessian",
            "a backward through streamed weights is not supported",
        )()
    if not is_grad_enabled() or _top_saved_tensors_default_hooks(True) is None:
        return
    parameters = () if module is None else module.parameters()
    if any(
        isinstance(leaf, torch.Tensor) and leaf.requires_grad
        for leaf in (*parameters, *tree_iter((args, kwargs)))
    ):
        refusal(
            "gradient checkpointing and other hooks on saved tensors",
            "a backward through streamed weights is not supported; use torch.no_grad() or "
            "torch.inference_mode() for a forward alone",
        )()
