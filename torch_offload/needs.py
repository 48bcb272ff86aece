"""What a forward needs on the device beside the weights, reckoned from a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch_offload.workload import Workload, attention_width, first_number

# Driver, kernels and the allocator's own: what a process takes before the first tensor.
CONTEXT_BYTES = 768 * 2**20
# So many tensors of the width of the model are alive at once in a layer, its inputs included.
_WIDTHS_ALIVE = 8


@dataclass(frozen=True)
class Needs:
    """Bytes on the device beside the weights.

    Attributes:
        cache: Keys and values of all sequences.
        activations: Alive at once, at the most.
        context: Of the process.
    """

    cache: int
    activations: int
    context: int = CONTEXT_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache + self.activations + self.context


def needs_of(config: Any, work: Workload, element_bytes: int) -> Needs:
    """Reckons them. An estimate: kernels that keep more, or attention that keeps less, differ.

    The cache: two per layer, key-value head, head dimension and token of context. Activations: of
    all tokens of a forward, eight times the width of the model and three times that of the FFN, and
    the logits of one position in the model's type and in fp32.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = first_number(text, "num_hidden_layers", "n_layer", "num_layers")
    heads = first_number(text, "num_attention_heads", "n_head", "num_heads")
    kv_heads = first_number(text, "num_key_value_heads") or heads
    width = first_number(text, "hidden_size", "n_embd", "d_model")
    head_dim = attention_width(text) // heads if heads else 0
    inner = first_number(text, "intermediate_size", "n_inner", "d_ff") or 4 * width
    vocabulary = first_number(text, "vocab_size")
    cache = 2 * layers * kv_heads * head_dim * element_bytes * work.batch * work.context
    activations = work.total_tokens * (_WIDTHS_ALIVE * width + 3 * inner) * element_bytes
    logits = work.batch * vocabulary * (element_bytes + 4)
    return Needs(cache, activations + logits)
