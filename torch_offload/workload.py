"""How long the units of a model compute, reckoned from its config and a device's peaks.

Of a unit: two operations per weight and token; attention adds four per pair of tokens and head
dimension, not halved for causality. The bytes are its weights, read once. Of fused or listed
experts, only those chosen count: all tokens' choices, at most all of them. What no unit holds is
the head, for the last position of each sequence; norms and embeddings are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_offload.hardware import Peak
from torch_offload.units import UnitSpec


@dataclass(frozen=True)
class Workload:
    """What one forward works on.

    Attributes:
        batch: Sequences.
        tokens: Of each sequence in this forward: 1 while decoding.
        context: Tokens that each attends to, those of this forward included.
    """

    batch: int
    tokens: int
    context: int

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "context"):
            value = getattr(self, name)
            if not 1 <= value <= 10**9:
                raise ValueError(f"expected --{name} between 1 and 1e9, got {value}")
        if self.context < self.tokens:
            raise ValueError(
                f"expected --context of at least the {self.tokens} tokens of one forward, got "
                f"{self.context}"
            )

    @property
    def total_tokens(self) -> int:
        """Of all sequences."""
        return self.batch * self.tokens


def compute_times(
    model: nn.Module, config: Any, specs: Sequence[UnitSpec], work: Workload, peak: Peak
) -> list[int]:
    """Returns how long each unit computes, in ns; the last one's has the head's added to it.

    A head that is a unit of its own computes for the last position of each sequence as well.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    head = getattr(_head_of(model), "weight", None)
    last_positions = Workload(batch=work.batch, tokens=1, context=work.context)
    times = [
        _unit_ns(spec, text, last_positions if _is_of(spec, head) else work, peak) for spec in specs
    ]
    times[-1] += _head_ns(model, specs, work, peak)
    return times


def _unit_ns(spec: UnitSpec, config: Any, work: Workload, peak: Peak) -> int:
    flop = memory_bytes = 0.0
    for name, parameter in spec.parameters:
        flop_share, byte_share = _shares_used(name, config, work)
        flop += 2.0 * parameter.numel() * work.total_tokens * flop_share
        memory_bytes += parameter.nbytes * byte_share
    if spec.kind == "mha":
        width = attention_width(config)
        flop += 4.0 * work.total_tokens * work.context * width
    return peak.compute_ns(flop, memory_bytes)


def _shares_used(name: str, config: Any, work: Workload) -> tuple[float, float]:
    """Of a parameter: the part of it that a token meets, and the part that all tokens meet."""
    if ".experts." not in f".{name}.":
        return 1.0, 1.0
    experts = first_number(config, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = first_number(config, "num_experts_per_tok", "moe_topk", "top_k_experts")
    if not experts or not chosen:
        return 1.0, 1.0
    share = min(1.0, chosen / experts)
    return share, min(1.0, share * work.total_tokens)


def attention_width(config: Any) -> int:
    """Of all heads together."""
    heads = first_number(config, "num_attention_heads", "n_head")
    head_dim = first_number(config, "head_dim")
    if heads and head_dim:
        return heads * head_dim
    return first_number(config, "hidden_size", "n_embd", "d_model")


def first_number(config: Any, *names: str) -> int:
    """The first of these fields that is a positive number; 0 if none is."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _head_of(model: nn.Module) -> Any:
    find: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
    return find()


def _is_of(spec: UnitSpec, weight: Any) -> bool:
    return weight is not None and all(parameter is weight for _, parameter in spec.parameters)


def _head_ns(model: nn.Module, specs: Sequence[UnitSpec], work: Workload, peak: Peak) -> int:
    weight = getattr(_head_of(model), "weight", None)
    in_units = {id(parameter) for spec in specs for _, parameter in spec.parameters}
    if weight is None or id(weight) in in_units:
        return 0
    return peak.compute_ns(2.0 * weight.numel() * work.batch, weight.nbytes)
