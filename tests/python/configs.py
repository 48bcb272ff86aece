"""Configs of models of real shape, which nobody builds but on ``meta``."""

from __future__ import annotations

from typing import Any

# 16 layers of Llama-3.1-70B.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 16,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}
