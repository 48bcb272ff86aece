"""Language models, text encoders and sequence-to-sequence models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tests.python.zoo.case import (
    BOS,
    EOS,
    PAD,
    VOCAB,
    Case,
    ModelKind,
    library,
    text_inputs,
    tokens,
)

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCAB}
# The names most configurations share; a model takes what it knows.
_WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {"num_key_value_heads": 2}
_GPT = {"n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 64}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 4, "num_heads": 4}
_BART = {
    "d_model": 64,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}
_HALVES = {"self_attn": 5, "mlp": 5}
_BERT_HALVES = {"attention": 5, "intermediate": 5, "output": 5}
_BART_HALVES = {"self_attn": 8, "encoder_attn": 4, "fc1": 8, "fc2": 8}


def pretrained(config: str, model: str, **settings: Any) -> nn.Module:
    """A transformers model with random weights, from the names of its two classes."""
    transformers = library("transformers", config, model)
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def _case(
    name: str,
    kind: ModelKind,
    family: str,
    head: str,
    units: Mapping[str, int],
    *settings: Mapping[str, Any],
    **rest: Any,
) -> Case:
    merged: dict[str, Any] = {}
    for some in (_SPECIAL, *settings):
        merged.update(some)
    config = rest.pop("config", f"{family}Config")
    return Case(
        name,
        kind,
        lambda: pretrained(config, f"{family}{head}", **merged),
        rest.pop("inputs", text_inputs),
        units,
        **rest,
    )


def _lm(
    name: str,
    family: str,
    units: Mapping[str, int] = _HALVES,
    *settings: Mapping[str, Any],
    head: str = "ForCausalLM",
    **rest: Any,
) -> Case:
    rest.setdefault("generate", GREEDY)
    return _case(name, "causal-lm", family, head, units, *settings, **rest)


def _encoder(
    name: str,
    family: str,
    units: Mapping[str, int] = _BERT_HALVES,
    *settings: Mapping[str, Any],
    head: str = "Model",
    **rest: Any,
) -> Case:
    return _case(name, "encoder", family, head, units, *settings, **rest)


def _pair_inputs() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=5, seed=9)}


def _seq2seq(
    name: str,
    family: str,
    units: Mapping[str, int],
    *settings: Mapping[str, Any],
    **rest: Any,
) -> Case:
    return _case(
        name,
        "seq2seq",
        family,
        "ForConditionalGeneration",
        units,
        *settings,
        inputs=_pair_inputs,
        generate=GREEDY,
        **rest,
    )


_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_MAMBA = {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 5}
_MAMBA2 = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
_ZAMBA2 = {
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "num_mem_blocks": 1,
    "adapter_rank": 8,
    "chunk_size": 8,
    "use_mem_eff_path": False,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
    "num_key_value_heads": 4,
}
_GEMMA = {"head_dim": 16, "sliding_window": 8}
_GEMMA3N = {
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0] * 4,
    "head_dim": 16,
    "sliding_window": 8,
    "intermediate_size": [128] * 4,
}

CASES: tuple[Case, ...] = (
    _lm("llama", "Llama", _HALVES, _WIDTHS, _GQA),
    _lm("mistral", "Mistral", _HALVES, _WIDTHS, _GQA, {"sliding_window": 8, "head_dim": 16}),
    _lm("qwen2", "Qwen2", _HALVES, _WIDTHS, _GQA),
    _lm("qwen3", "Qwen3", _HALVES, _WIDTHS, _GQA, {"head_dim": 16}),
    _lm("gemma2", "Gemma2", _HALVES, _WIDTHS, _GQA, _GEMMA),
    _lm("gemma3", "Gemma3", _HALVES, _WIDTHS, _GQA, _GEMMA, config="Gemma3TextConfig"),
    _lm("phi", "Phi", _HALVES, _WIDTHS),
    _lm("phi3", "Phi3", _HALVES, _WIDTHS, _GQA),
    _lm("gpt2", "GPT2", {"attn": 5, "mlp": 5}, _GPT, head="LMHeadModel"),
    _lm("gptj", "GPTJ", {"attn": 5, "mlp": 5}, _GPT, {"rotary_dim": 8}),
    _lm("gpt_neox", "GPTNeoX", {"attention": 5, "mlp": 5}, _WIDTHS),
    _lm(
        "opt",
        "OPT",
        {"self_attn": 5, "fc1": 5, "fc2": 5},
        _WIDTHS,
        {"ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    _lm("bloom", "Bloom", {"self_attention": 5, "mlp": 5}, {"hidden_size": 64}, _GPT),
    _lm("falcon", "Falcon", {"self_attention": 5, "mlp": 5}, _WIDTHS),
    _lm("mpt", "Mpt", {"attn": 5, "ffn": 5}, {"d_model": 64, "n_heads": 4, "n_layers": 5}),
    _lm("olmo2", "Olmo2", _HALVES, _WIDTHS, _GQA),
    _lm("smollm3", "SmolLM3", _HALVES, _WIDTHS, _GQA),
    _lm("mixtral", "Mixtral", _HALVES, _WIDTHS, _GQA, {"num_local_experts": 4}),
    _lm(
        "qwen2_moe",
        "Qwen2Moe",
        _HALVES,
        _WIDTHS,
        _MOE,
        _GQA,
        {"num_experts": 4, "shared_expert_intermediate_size": 64},
    ),
    _lm("qwen3_moe", "Qwen3Moe", _HALVES, _WIDTHS, _MOE, _GQA, {"num_experts": 4, "head_dim": 16}),
    _lm("deepseek_v2", "DeepseekV2", _HALVES, _WIDTHS, _MOE, _MLA),
    _lm("deepseek_v3", "DeepseekV3", _HALVES, _WIDTHS, _MOE, _MLA),
    _lm(
        "gpt_oss",
        "GptOss",
        _HALVES,
        _WIDTHS,
        _GQA,
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    _lm("mamba", "Mamba", {"mixer": 5}, _MAMBA),
    _lm("mamba2", "Mamba2", {"mixer": 5}, _MAMBA, _MAMBA2),
    _lm(
        "rwkv",
        "Rwkv",
        {"attention": 5, "feed_forward": 5},
        _MAMBA,
        {"context_length": 64, "attention_hidden_size": 64, "rescale_every": 2},
        # The root rescales these two in place, at the first forward in eval mode.
        cure=("*.attention.output.weight", "*.feed_forward.value.weight"),
        share=0.5,
    ),
    _lm(
        "jamba",
        "Jamba",
        {"mamba": 3, "self_attn": 2, "feed_forward": 5},
        _WIDTHS,
        _GQA,
        _JAMBA,
    ),
    _lm(
        "zamba2",
        "Zamba2",
        {"mamba": 3, "mamba_decoder": 2, "linear": 2},
        _WIDTHS,
        _ZAMBA2,
        # The shared transformer is tied between modules of their own, so it stays resident.
        share=0.5,
    ),
    _lm(
        "gemma3n",
        "Gemma3n",
        {
            "altup": 4,
            "laurel": 4,
            "self_attn": 4,
            "mlp": 4,
            "per_layer_input_gate": 4,
            "per_layer_projection": 4,
        },
        _WIDTHS,
        _GQA,
        _GEMMA3N,
        config="Gemma3nTextConfig",
        cure=("*.altup",),
    ),
    _lm(
        "gpt_neox_japanese",
        "GPTNeoXJapanese",
        {"attention": 4, "mlp": 4},
        _WIDTHS,
        {"num_hidden_layers": 4, "intermediate_multiple_size": 2},
        cure=("*.attention.dense_bias",),
    ),
    _encoder("bert", "Bert", _BERT_HALVES, _WIDTHS),
    _encoder("roberta", "Roberta", _BERT_HALVES, _WIDTHS, head="ForMaskedLM"),
    _encoder("electra", "Electra", _BERT_HALVES, _WIDTHS, {"embedding_size": 64}),
    _encoder("deberta", "Deberta", _BERT_HALVES, _WIDTHS, {"relative_attention": True}),
    _encoder("deberta_v2", "DebertaV2", _BERT_HALVES, _WIDTHS, {"relative_attention": True}),
    _encoder(
        "distilbert",
        "DistilBert",
        {"attention": 5, "ffn": 5},
        {"dim": 64, "hidden_dim": 128, "n_layers": 5, "n_heads": 4, "max_position_embeddings": 64},
    ),
    # One layer, called once per hidden layer.
    _encoder(
        "albert",
        "Albert",
        {"attention": 1, "ffn": 1, "ffn_output": 1},
        _WIDTHS,
        {"embedding_size": 32},
    ),
    _encoder(
        "squeezebert",
        "SqueezeBert",
        {**_BERT_HALVES, "post_attention": 5},
        _WIDTHS,
        {"embedding_size": 64},
    ),
    _encoder("modernbert", "ModernBert", {"attn": 5, "mlp": 5}, _WIDTHS, {"local_attention": 8}),
    _encoder(
        "funnel",
        "Funnel",
        {"attention": 6, "ffn": 6},
        {"block_sizes": [2, 2], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128},
    ),
    _encoder(
        "mobilebert",
        "MobileBert",
        {"attention": 4, "intermediate": 4, "output": 4, "bottleneck": 4, "ffn": 4},
        _WIDTHS,
        {"num_hidden_layers": 4, "embedding_size": 32, "intra_bottleneck_size": 32},
        {"num_feedforward_networks": 2, "true_hidden_size": 32},
    ),
    _encoder(
        "xlm",
        "XLM",
        {"attentions": 4, "ffns": 4},
        {"n_words": VOCAB, "emb_dim": 64, "n_layers": 4, "n_heads": 4, "n_langs": 1},
        {"max_position_embeddings": 64},
    ),
    _seq2seq("t5", "T5", {"layer": 20}, _T5, {"decoder_start_token_id": PAD}),
    _seq2seq(
        "switch_transformers",
        "SwitchTransformers",
        {"layer": 20},
        _T5,
        {"num_experts": 4, "decoder_start_token_id": PAD, "num_sparse_encoder_layers": 2},
        {"num_decoder_layers": 4, "num_sparse_decoder_layers": 2, "expert_capacity": 16},
    ),
    _seq2seq("bart", "Bart", _BART_HALVES, _BART),
)
