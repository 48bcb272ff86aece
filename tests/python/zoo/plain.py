"""Models of torch alone: blocks of one's own, and the control flow that offloaders trip on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.python.zoo.case import Case, noise

WIDTH = 32


class Attention(nn.Module):
    """Single-head self-attention with four projections."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        return self.out(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))


class Mlp(nn.Module):
    """Two projections with a GELU between them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same shape."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP. `ffn_first` registers the MLP before the attention."""

    def __init__(self, width: int = WIDTH, *, ffn_first: bool = False) -> None:
        super().__init__()
        if ffn_first:
            self.mlp = Mlp(width)
        self.attention = Attention(width)
        if not ffn_first:
            self.mlp = Mlp(width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BareLinearBlock(nn.Module):
    """An attention, and an FFN of two Linears that belong to the block itself."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.fc1 = nn.Linear(width, 3 * width)
        self.fc2 = nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x = x + self.attention(x)
        return x + self.fc2(F.gelu(self.fc1(x)))


class Stack(nn.Module):
    """Blocks in a list between two projections; `route` says which run, in what order."""

    def __init__(self, blocks: list[nn.Module], route: list[int] | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.route = list(range(len(blocks))) if route is None else route

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x = self.embed(x)
        for index in self.route:
            x = self.blocks[index](x)
        return self.head(x)


class EarlyExit(Stack):
    """Leaves after the first `depth` blocks; the caller chooses per call."""

    def forward(self, x: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """[batch, tokens, width] to the same shape, through `depth` blocks (None: all)."""
        x = self.embed(x)
        for index, block in enumerate(self.blocks):
            if index == depth:
                break
            x = block(x)
        return self.head(x)


class Stage(nn.Module):
    """Blocks of one width, then a projection to the next one."""

    def __init__(self, width: int, depth: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width) for _ in range(depth)])
        self.reduction = nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to [batch, tokens, out]."""
        for layer in self.layers:
            x = layer(x)
        return self.reduction(x)


class Numbered(nn.Module):
    """Blocks as numbered attributes instead of in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        for index in range(4):
            setattr(self, f"block{index}", Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x = self.embed(x)
        for index in range(4):
            x = getattr(self, f"block{index}")(x)
        return x


class FunctionalMixer(nn.Module):
    """Reads the weights of its children without calling them, as a Mamba does with its conv."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        filters = self.conv.weight.squeeze(1)
        x = x * filters.sum(dim=1) + self.conv.bias
        return (x * gate.sigmoid()) @ self.out_proj.weight.t()


class MixerBlock(nn.Module):
    """A mixer that uses its children's weights itself, and an MLP that calls its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = FunctionalMixer()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        return x + self.mlp(x + self.mixer(x))


class Recurrent(nn.Module):
    """A stack of LSTMs, whose weights torch reads in one fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


class SharedInside(nn.Module):
    """One attention object inside every block, as Zamba has; each block keeps its own MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        for block in self.blocks[1:]:
            block.attention = self.blocks[0].attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class WeightNormed(nn.Module):
    """Blocks whose projections are parametrised: the weight is computed anew at each use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        for block in self.blocks:
            parametrizations.weight_norm(block.mlp.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class ResidualLinear(nn.Module):
    """The smallest layer there is: one Linear and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same shape."""
        return x + self.linear(x).relu()


def _blocks(count: int) -> list[nn.Module]:
    return [Block() for _ in range(count)]


def _sequence() -> dict[str, Any]:
    return {"x": noise(2, 6, WIDTH)}


def _sequential_input() -> dict[str, Any]:
    return {"input": noise(2, 6, WIDTH)}


def _transformer_inputs() -> dict[str, Any]:
    return {"src": noise(2, 6, WIDTH), "tgt": noise(2, 5, WIDTH, seed=12)}


def _plain(name: str, make: Any, units: dict[str, int], **rest: Any) -> Case:
    return Case(name, "plain", make, rest.pop("inputs", _sequence), units, **rest)


_HALVES = {"attention": 5, "mlp": 5}

CASES: tuple[Case, ...] = (
    _plain(
        "transformer",
        lambda: nn.Transformer(WIDTH, 2, 4, 4, 64, batch_first=True),
        {"layers": 8},
        inputs=_transformer_inputs,
    ),
    _plain(
        "sequential",
        lambda: nn.Sequential(*_blocks(5)),
        _HALVES,
        inputs=_sequential_input,
    ),
    _plain(
        "mlp",
        lambda: nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))),
        {"": 5},
        inputs=_sequential_input,
    ),
    _plain("stack", lambda: Stack(_blocks(5)), _HALVES),
    _plain("residual_linears", lambda: Stack([ResidualLinear() for _ in range(5)]), {"blocks": 5}),
    _plain(
        "bare_linears",
        lambda: Stack([BareLinearBlock() for _ in range(5)]),
        {"attention": 5, "fc1": 5, "fc2": 5},
    ),
    _plain(
        "stages",
        lambda: nn.Sequential(Stage(16, 2, 32), Stage(32, 2, 64), Stage(64, 3, 16)),
        {"attention": 7, "mlp": 7, "reduction": 2},
        inputs=lambda: {"input": noise(2, 6, 16)},
    ),
    _plain(
        "ffn_registered_first",
        lambda: Stack([Block(ffn_first=True) for _ in range(5)]),
        _HALVES,
    ),
    _plain("numbered", Numbered, {"attention": 4, "mlp": 4}),
    _plain("repeated", lambda: Stack([Block()], [0] * 5), {"attention": 1, "mlp": 1}),
    _plain("revisited", lambda: Stack(_blocks(5), [0, 1, 1, 2, 3, 0, 4]), _HALVES),
    _plain(
        "skipped",
        lambda: Stack(_blocks(5), [0, 1, 3, 4]),
        _HALVES,
        idle=("attention", "mlp"),
    ),
    _plain("early_exit", lambda: EarlyExit(_blocks(5)), _HALVES),
    _plain(
        "functional_mixer",
        lambda: Stack([MixerBlock() for _ in range(5)]),
        {"mixer": 5, "mlp": 5},
    ),
    _plain("lstms", Recurrent, {"layers": 4}),
    _plain("shared_attention", SharedInside, {"attention": 1, "mlp": 4}),
    _plain("weight_norm", WeightNormed, {"attention": 4, "mlp": 4}),
)
