"""Small models of plain torch that the lanes stream, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from torch_offload.storage import align


class Mlp(nn.Module):
    """Two linear layers and an activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows to rows."""
        output: torch.Tensor = self.down(nn.functional.gelu(self.up(x)))
        return output


class Block(nn.Module):
    """Attention-like and FFN-like halves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows to rows."""
        x = x + self.attn(x)
        output: torch.Tensor = x + self.mlp(x)
        return output


class Stack(nn.Module):
    """Blocks in a list, called in an order that may be changed between forwards."""

    def __init__(self, num_blocks: int = 4, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.sequence = list(range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows to rows."""
        x = self.embed(x)
        for index in self.sequence:
            x = self.blocks[index](x)
        return x


def _stack(width: int) -> nn.Module:
    return Stack(5, width)


def _repeating(width: int) -> nn.Module:
    """Blocks that are skipped, and others that come again."""
    model = Stack(5, width)
    model.sequence = [0, 1, 1, 3, 0, 4]
    return model


def _encoder(width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
    return nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)


class _Translator(nn.Module):
    """Encoder and decoder: two passes over two kinds of layers in each forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transformer = nn.Transformer(width, 4, 3, 3, 2 * width, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.transformer(x, x)
        return output


@dataclass(frozen=True)
class Subject:
    """One model to stream.

    Attributes:
        name: What to call it.
        make: Makes it from its width.
        shape: Of its input, but for the width.
    """

    name: str
    make: Callable[[int], nn.Module] = field(repr=False)
    shape: tuple[int, ...]

    def model(self, width: int) -> nn.Module:
        """Makes the model, aligned, in eval mode, with the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(17)
            return align(self.make(width).eval())

    def rows(self, width: int, seed: int, device: torch.device) -> torch.Tensor:
        """Makes the input of one forward."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*self.shape, width, generator=generator).to(device)


SUBJECTS = (
    Subject("stack", _stack, (8,)),
    Subject("repeating", _repeating, (8,)),
    Subject("encoder", _encoder, (2, 6)),
    Subject("translator", _Translator, (2, 6)),
)
