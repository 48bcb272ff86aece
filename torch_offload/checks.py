"""What `offload` refuses at the start, with the reason and the way out."""

from __future__ import annotations

from torch import nn

from torch_offload._C import StateError
from torch_offload.handle import handle_of


def check_model(model: nn.Module) -> None:
    """Checks that a model can be offloaded as it is. Changes nothing, does not block.

    Raises:
        TypeError: If it is no module.
        ValueError: If its weights cannot be streamed.
        StateError: If it, or a part of it, is offloaded already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module, got {type(model).__name__}; of a pipeline, offload its "
            "transformer: offload(pipe.transformer)"
        )
    for name, module in model.named_modules():
        if handle_of(module) is not None:
            where = f"'{name}' of it" if name else "it"
            raise StateError(
                f"expected a plain model, got one where {where} is offloaded already; call "
                "torch_offload.handle_of(...).remove() first"
            )
    for name, parameter in model.named_parameters():
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
