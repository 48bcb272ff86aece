"""Transformers and U-Nets of diffusers, and an adapter of peft around a language model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.python.zoo.case import Case, library, noise, text_inputs
from tests.python.zoo.text import CASES as TEXT_CASES
from tests.python.zoo.text import GREEDY

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 4}


def _diffusers(name: str, **settings: Any) -> nn.Module:
    return getattr(library("diffusers", name), name)(**settings)


def _case(
    name: str,
    model: str,
    units: Mapping[str, int],
    inputs: Callable[[], dict[str, Any]],
    settings: Mapping[str, Any],
    **rest: Any,
) -> Case:
    return Case(name, "diffusion", lambda: _diffusers(model, **settings), inputs, units, **rest)


def _flux_inputs() -> dict[str, Any]:
    """A latent of 4 x 4 patches and a prompt of five tokens; positions are (text, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    image_ids = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1)
    return {
        "hidden_states": noise(2, 16, 8),
        "encoder_hidden_states": noise(2, 5, 32, seed=12),
        "pooled_projections": noise(2, 24, seed=13),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 5, 32, seed=12),
        "pooled_projections": noise(2, 24, seed=13),
        "timestep": torch.tensor([500, 500]),
        "return_dict": False,
    }


def _unet_inputs() -> dict[str, Any]:
    return {
        "sample": noise(2, 4, 16, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": noise(2, 5, 32, seed=12),
        "return_dict": False,
    }


def _wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 5, 32, seed=12),
        "return_dict": False,
    }


def _dit_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 3]),
        "return_dict": False,
    }


def _lora_llama() -> nn.Module:
    peft = library("peft", "LoraConfig", "get_peft_model")
    llama = next(case for case in TEXT_CASES if case.name == "llama").make()
    targets = ["q_proj", "v_proj", "down_proj"]
    with warnings.catch_warnings():
        # peft asks transformers for a property by the name that transformers has retired.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(
            llama, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        )


CASES: tuple[Case, ...] = (
    _case(
        "flux",
        "FluxTransformer2DModel",
        # adaLN projections (norm, norm1, norm1_context) are as large as an attention here; the FFN
        # of a single block is split around its attention.
        {
            "norm1": 4,
            "norm1_context": 4,
            "attn": 8,
            "ff": 4,
            "ff_context": 4,
            "norm": 4,
            "proj_mlp": 4,
            "proj_out": 4,
        },
        _flux_inputs,
        {
            **_HEADS,
            "in_channels": 8,
            "num_layers": 4,
            "num_single_layers": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    _case(
        "sd3",
        "SD3Transformer2DModel",
        {"norm1": 4, "norm1_context": 4, "attn": 4, "ff": 4, "ff_context": 3},
        _sd3_inputs,
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 24,
            "pos_embed_max_size": 8,
        },
    ),
    _case(
        "unet",
        "UNet2DConditionModel",
        {
            "resnets": 12,
            "attn1": 6,
            "attn2": 6,
            "ff": 6,
            "proj_in": 6,
            "proj_out": 6,
            "downsamplers": 1,
            "upsamplers": 1,
        },
        _unet_inputs,
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        },
        share=0.7,
    ),
    _case(
        "wan",
        "WanTransformer3DModel",
        {"attn1": 4, "attn2": 4, "ffn": 4},
        _wan_inputs,
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 128,
            "num_layers": 4,
            "rope_max_seq_len": 32,
        },
    ),
    _case(
        "dit",
        "DiTTransformer2DModel",
        {"norm1": 4, "attn1": 4, "ff": 4},
        _dit_inputs,
        {
            **_HEADS,
            "sample_size": 8,
            "num_layers": 4,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 8,
        },
        # The root calls norm1.emb of block 0 itself, before the blocks and after them.
        cure=("transformer_blocks.0.norm1.emb",),
    ),
    Case(
        "llama_lora",
        "causal-lm",
        _lora_llama,
        text_inputs,
        {"self_attn": 5, "mlp": 5},
        generate=GREEDY,
    ),
)
