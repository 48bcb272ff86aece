"""The models that are measured, and the stage on which a plain and a streamed one stand together.

Real sizes are the yardstick of 16 layers of Llama-70B's shape (27.4 GB in bf16) and 80 layers of
Llama-8B's shape (34.9 GB): the first for rates, the second for a forward of more launches than the
driver queues. The tiny ones keep the code alive where there is no GPU.
"""

from __future__ import annotations

import copy
import functools
import gc
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from clocks import DEVICE, ON_GPU, Run, synchronize
from torch import nn

import torch_offload
from torch_offload import _C
from torch_offload.devices import devices_made_by

Shape = tuple[int, int]


def shape_id(shape: Shape) -> str:
    """Returns "8x2048" of 8 sequences of 2048 tokens."""
    return f"{shape[0]}x{shape[1]}"


def shapes_of(workload: Workload) -> pytest.MarkDecorator:
    """Runs a bench once for each shape, by position: tiny runs have shapes of their own."""
    return pytest.mark.parametrize(
        "shape_index", range(len(workload.shapes)), ids=[shape_id(s) for s in workload.shapes]
    )


@dataclass(frozen=True)
class Workload:
    """A Llama with random weights, and the (batch, tokens) it is run with."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    shapes: tuple[Shape, ...]

    def config(self) -> Any:
        """The transformers config."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            attn_implementation="sdpa",
            tie_word_embeddings=False,
        )

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's matrices in bf16."""
        attention = self.hidden_size**2 * 2 * (1 + self.num_kv_heads / self.num_heads)
        return 2 * int(attention + 3 * self.hidden_size * self.intermediate_size)

    def tokens(self, shape: Shape) -> torch.Tensor:
        """Random token ids of a shape, the same at every call."""
        generator = torch.Generator().manual_seed(shape[0] * 10007 + shape[1])
        return torch.randint(0, self.vocab_size, shape, generator=generator).to(DEVICE)


_SHAPES = ((1, 1), (8, 512), (1, 2048), (8, 2048))
_TINY_SHAPES = ((1, 1), (2, 8), (1, 16), (2, 16))
assert len(_SHAPES) == len(_TINY_SHAPES)  # benches name them by position
YARDSTICK = Workload("16 layers of Llama-70B", 8192, 28672, 16, 64, 8, 32000, _SHAPES)
DEEP = Workload("80 layers of Llama-8B", 4096, 14336, 80, 32, 8, 32000, ((1, 1), (8, 2048)))
# About 5 ms a forward over PCIe 5, to launch as to copy.
SMALL = Workload("5 layers, 1536 wide", 1536, 5120, 5, 12, 3, 32000, ((1, 1),))
# As many units and launches as the yardstick, in the time that it takes to launch them.
THIN = Workload("16 layers, 1024 wide", 1024, 3584, 16, 16, 4, 32000, ((1, 1),))
# Few layers, as the activations of so many tokens want the room.
HEAVY = Workload("4 layers of Llama-70B", 8192, 28672, 4, 64, 8, 32000, ((44, 2048),))
# For peers that take seconds for what the yardstick weighs, and for the disk: 7.9 GB.
PEER = replace(HEAVY, shapes=_SHAPES)
TINY_YARDSTICK = Workload("4 tiny layers", 64, 224, 4, 8, 2, 320, _TINY_SHAPES)
TINY_SMALL = Workload("5 tiny layers", 32, 112, 5, 4, 1, 320, ((1, 1),))
TINY_THIN = Workload("4 tiny layers, 32 wide", 32, 112, 4, 4, 1, 320, ((1, 1),))
TINY_HEAVY = Workload("4 tiny layers", 32, 112, 4, 4, 1, 320, ((2, 32),))
TINY_PEER = replace(TINY_HEAVY, shapes=_TINY_SHAPES)
TINY_DEEP = Workload("12 tiny layers", 32, 112, 12, 4, 1, 320, ((1, 1), (2, 16)))


def empty_model(workload: Workload, device: torch.device) -> nn.Module:
    """Makes the model in bf16 on `device` with weights that are whatever the memory held."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(workload.config()).to(torch.bfloat16).eval()
    model.to_empty(device=device)
    # Computed, not loaded, so `meta` has lost them: the tables of the rotary embedding.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    return model


def skeleton(workload: Workload) -> Any:
    """The model without weights; what no checkpoint holds is computed."""
    model: Any = empty_model(workload, torch.device("meta"))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)
    return model


def make_model(workload: Workload, device: torch.device) -> nn.Module:
    """Makes the model with random weights, in the time it takes to write them once."""
    model = empty_model(workload, device)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return torch_offload.align(model)


@torch.inference_mode()
def forward(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of the last position, of shape (batch, 1, vocabulary)."""
    return model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits


def require_equal(
    plain: nn.Module, other: nn.Module, tokens: torch.Tensor, attempts: int = 1
) -> None:
    """Fails unless both give the same finite bits, so many times: no figure without that."""
    expected = forward(plain, tokens)
    assert torch.isfinite(expected).all(), "the plain model's logits are not finite"
    for attempt in range(1, attempts + 1):
        got = forward(other, tokens)
        assert torch.equal(expected, got), (
            f"forward {attempt} differs from the plain model's in "
            f"{int((expected != got).sum())} of {got.numel()} logits"
        )


@dataclass
class Streamed:
    """An offloaded model with what `offload` said and took."""

    model: nn.Module
    handle: torch_offload.Handle
    device: _C.Device
    options: dict[str, Any]
    offload_seconds: float
    # Device bytes at rest beyond what the handle says it keeps there; None without a GPU.
    extra_bytes: int | None

    @property
    def num_units(self) -> int:
        """Units that stream."""
        return sum(unit.place is not None for unit in self.handle.units)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that one forward copies."""
        return sum(unit.size_bytes for unit in self.handle.units if unit.place is not None)

    @property
    def masters(self) -> list[torch.Tensor]:
        """The streamed parameters at rest."""
        return [
            self.model.get_parameter(name)
            for unit in self.handle.units
            if unit.place is not None
            for name in unit.parameters
        ]

    def describe(self) -> dict[str, Any]:
        """What every figure of this model is to be read with."""
        stats = self.handle.stats
        return {
            "mode": self.handle.config.mode,
            "streams": self.handle.config.streams,
            "granularity": self.handle.config.granularity,
            "num_units": self.num_units,
            "streamed_bytes": self.streamed_bytes,
            "largest_unit_bytes": max(unit.size_bytes for unit in self.handle.units),
            "window_bytes": stats.window_bytes,
            "bytes_resident": stats.bytes_resident,
            "host_bytes": stats.host_bytes,
            "offload_seconds": self.offload_seconds,
            "extra_bytes_at_rest": self.extra_bytes,
        }


def offload_with_device(model: nn.Module, **options: Any) -> tuple[torch_offload.Handle, _C.Device]:
    """`offload`, and the C++ device it made, whose counters the handle does not show.

    Every unit streams unless a budget is given: that is what is to be measured.
    """
    made: list[_C.Device] = []

    def kept(device: torch.device) -> _C.Device:
        made.append(_C.Device(device))
        return made[-1]

    with devices_made_by(kept):
        handle = torch_offload.offload(model, DEVICE, **{"gpu_budget": None, **options})
    return handle, made[-1]


class Stage:
    """At most one plain model on the device, and beside it at most one copy that streams."""

    def __init__(self) -> None:
        self._workload: Workload | None = None
        self._plain: nn.Module | None = None
        self._streamed: Streamed | None = None

    def plain(self, workload: Workload) -> nn.Module:
        """The resident model; makes room for it first if another one stands here."""
        if self._plain is None or self._workload != workload:
            self.clear()
            self._plain, self._workload = make_model(workload, DEVICE), workload
        return self._plain

    def copy_of_plain(self, workload: Workload) -> nn.Module:
        """A copy on the device with nothing else beside the plain model, for peers."""
        plain = self.plain(workload)
        self.clear_streamed()
        return torch_offload.align(copy.deepcopy(plain))

    def streamed(self, workload: Workload, **options: Any) -> Streamed:
        """The offloaded copy; made anew when the options differ from the last ones'."""
        plain = self.plain(workload)
        if self._streamed is None or self._streamed.options != options:
            self.clear_streamed()
            before = torch.cuda.memory_allocated(DEVICE) if ON_GPU else 0
            model = torch_offload.align(copy.deepcopy(plain))
            synchronize()
            begin = time.perf_counter()
            handle, device = offload_with_device(model, **options)
            seconds = time.perf_counter() - begin
            extra = None
            if ON_GPU:
                extra = torch.cuda.memory_allocated(DEVICE) - before - handle.stats.device_bytes
            self._streamed = Streamed(model, handle, device, options, seconds, extra)
            tokens = workload.tokens(workload.shapes[0])
            for _ in range(2):  # one pass to learn the order and to prove leaves, one in it
                forward(model, tokens)
            if options.get("granularity") == "module":
                linears = sum(isinstance(module, nn.Linear) for module in model.model.modules())
                units = self._streamed.num_units
                assert units == linears, f"expected {linears} leaves to stream, got {units} units"
        return self._streamed

    def clear_streamed(self) -> None:
        """Lets go of the offloaded copy, its page-locked memory included."""
        synchronize()
        self._streamed = None
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()

    def clear(self) -> None:
        """Lets go of everything."""
        self._plain = self._workload = None
        self.clear_streamed()


def bound(model: nn.Module, tokens: torch.Tensor) -> Run:
    """A forward of `model` without arguments."""
    return functools.partial(forward, model, tokens)


@dataclass(frozen=True)
class Pair:
    """The plain model and the offloaded one at one shape, which were seen to give equal bits."""

    plain: nn.Module
    streamed: Streamed
    workload: Workload
    shape_index: int
    tokens: torch.Tensor

    @staticmethod
    def of(
        stage: Stage, workload: Workload, shape_index: int, *, attempts: int = 1, **options: Any
    ) -> Pair:
        """Of what stands on the stage; fails unless so many forwards are equal."""
        plain, streamed = stage.plain(workload), stage.streamed(workload, **options)
        tokens = workload.tokens(workload.shapes[shape_index])
        require_equal(plain, streamed.model, tokens, attempts)
        return Pair(plain, streamed, workload, shape_index, tokens)

    @property
    def shape(self) -> Shape:
        """(batch, tokens)."""
        return self.workload.shapes[self.shape_index]

    @property
    def plain_run(self) -> Run:
        """A forward of the plain model."""
        return bound(self.plain, self.tokens)

    @property
    def streamed_run(self) -> Run:
        """A forward of the offloaded one."""
        return bound(self.streamed.model, self.tokens)

    def header(self, what: str) -> dict[str, Any]:
        """What every part that is measured with this pair holds."""
        return {
            "what": what,
            "shape": shape_id(self.shape),
            **self.streamed.describe(),
            "bit_equal": True,
        }
