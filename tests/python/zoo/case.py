"""What one model of the zoo is, and how a library that lacks it is reported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import pytest
import torch
from torch import nn

ModelKind = Literal[
    "causal-lm", "encoder", "seq2seq", "vision", "vlm", "audio", "diffusion", "plain"
]

VOCAB = 96
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Case:
    """One tiny model of the zoo.

    Attributes:
        name: Name in ``models.CASES``.
        kind: What sort of model it is.
        make: Makes the model; call ``build`` instead.
        inputs: Makes the keyword arguments of one forward, the same ones at every call.
        units: Last part (that is no number) of the names of the sublayer units that must be found,
            mapped to how many there are: ``{"self_attn": 4, "mlp": 4}``.
        generate: Keyword arguments of ``model.generate`` besides the inputs; None where the model
            has no ``generate``.
        cure: ``resident=`` entries without which a forward touches a streamed weight outside its
            unit's call; empty where there is nothing to cure.
        idle: Last parts of the names of units that a forward with these inputs need not call.
        share: Least share of the bytes outside embeddings and heads that is streamed.
    """

    name: str
    kind: ModelKind
    make: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[], dict[str, Any]] = field(repr=False)
    units: Mapping[str, int]
    generate: Mapping[str, Any] | None = None
    cure: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    share: float = 0.8

    def build(self) -> nn.Module:
        """The model in eval mode, with the same weights at every call; global seeds are untouched.

        Skips the running test, or fails it under ``TORCH_OFFLOAD_REQUIRE_ALL_MODELS=1``, where a
        library is missing or does not know the family.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20240)
            model = self.make().eval()
            _fill_zeros(model)
        return model


def library(name: str, *attributes: str) -> Any:
    """Imports a module and checks that it has what a case needs; otherwise skips, or fails."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        unavailable(f"{name} cannot be imported: {error}")
    for attribute in attributes:
        if not hasattr(module, attribute):
            version = getattr(module, "__version__", "of unknown version")
            unavailable(f"{name} {version} has no {attribute}")
    return module


def unavailable(reason: str) -> NoReturn:
    """Skips the running test with the reason, or fails it where every model is required."""
    if os.environ.get("TORCH_OFFLOAD_REQUIRE_ALL_MODELS") == "1":
        pytest.fail(f"TORCH_OFFLOAD_REQUIRE_ALL_MODELS=1, but {reason}")
    pytest.skip(reason)


def tokens(batch: int = 2, length: int = 7, *, seed: int = 7) -> torch.Tensor:
    """Token ids of shape [batch, length], int64, none of them a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(PAD, BOS, EOS) + 1, VOCAB - 8, (batch, length), generator=generator)


def noise(*shape: int, seed: int = 11) -> torch.Tensor:
    """Standard normal values, fp32, the same ones at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_inputs() -> dict[str, Any]:
    """Two prompts of seven tokens with a mask, for language models and text encoders."""
    ids = tokens()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _fill_zeros(model: nn.Module) -> None:
    """Gives zero-initialized weights values.

    Behind a gate of zeros no comparison of outputs would see a wrong weight.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
