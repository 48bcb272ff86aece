"""Vision, audio and vision-language models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.python.zoo.case import BOS, EOS, PAD, VOCAB, Case, ModelKind, library, noise, tokens
from tests.python.zoo.text import GREEDY, pretrained

_WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
_IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}
_TEXT = {
    **_WIDTHS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_IMAGE_TOKEN = VOCAB - 2


def _pixels() -> dict[str, Any]:
    return {"pixel_values": noise(2, 3, 32, 32)}


def _case(
    name: str,
    kind: ModelKind,
    family: str,
    head: str,
    units: Mapping[str, int],
    inputs: Callable[[], dict[str, Any]],
    settings: Mapping[str, Any],
    **rest: Any,
) -> Case:
    make = lambda: pretrained(f"{family}Config", f"{family}{head}", **settings)  # noqa: E731
    return Case(name, kind, make, inputs, units, **rest)


def _vision(
    name: str,
    family: str,
    units: Mapping[str, int],
    *settings: Mapping[str, Any],
    head: str = "Model",
    **rest: Any,
) -> Case:
    merged: dict[str, Any] = {}
    for some in settings:
        merged.update(some)
    return _case(name, "vision", family, head, units, _pixels, merged, **rest)


def _image_and_text() -> dict[str, Any]:
    return {"input_ids": tokens(), "pixel_values": noise(2, 3, 32, 32)}


def _towers(family: str) -> Callable[[], nn.Module]:
    text = {**_TEXT, "max_position_embeddings": 16}
    return lambda: pretrained(
        f"{family}Config",
        f"{family}Model",
        text_config=text,
        vision_config={**_WIDTHS, **_IMAGE},
    )


def _llava() -> nn.Module:
    transformers = library("transformers", "LlavaConfig", "LlavaForConditionalGeneration")
    text = transformers.LlamaConfig(**_TEXT, num_key_value_heads=2)
    vision = transformers.CLIPVisionConfig(**_WIDTHS, **_IMAGE)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=_IMAGE_TOKEN
    )
    return transformers.LlavaForConditionalGeneration(config)


def _llava_inputs() -> dict[str, Any]:
    """A picture of 16 patches in front of each of two prompts."""
    pictures = torch.full((2, 16), _IMAGE_TOKEN)
    ids = torch.cat([pictures, tokens()], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": noise(2, 3, 32, 32),
    }


_QWEN_VL_IDS = {
    "image_token_id": _IMAGE_TOKEN,
    "video_token_id": VOCAB - 3,
    "vision_start_token_id": VOCAB - 4,
    "vision_end_token_id": VOCAB - 5,
}


def _qwen_vl(family: str, vision: Mapping[str, Any]) -> Callable[[], nn.Module]:
    text = {
        **_TEXT,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
    }
    return lambda: pretrained(
        f"{family}Config",
        f"{family}ForConditionalGeneration",
        text_config=text,
        vision_config={"depth": 4, "num_heads": 4, "patch_size": 8, **vision},
        **_QWEN_VL_IDS,
    )


def _qwen_vl_inputs() -> dict[str, Any]:
    """One picture of 4 x 4 patches, merged two by two into four tokens, in front of a prompt."""
    start = torch.tensor([[_QWEN_VL_IDS["vision_start_token_id"]]])
    end = torch.tensor([[_QWEN_VL_IDS["vision_end_token_id"]]])
    pictures = torch.full((1, 4), _IMAGE_TOKEN)
    ids = torch.cat([start, pictures, end, tokens(batch=1)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == _IMAGE_TOKEN).int(),
        "pixel_values": noise(16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _whisper_inputs() -> dict[str, Any]:
    return {"input_features": noise(2, 16, 32), "decoder_input_ids": tokens(length=5)}


_WHISPER = {
    "d_model": 64,
    "vocab_size": VOCAB,
    "num_mel_bins": 16,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": EOS,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_WAV2VEC2 = {
    **_WIDTHS,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

CASES: tuple[Case, ...] = (
    _vision("vit", "ViT", {"attention": 5, "mlp": 5}, _WIDTHS, _IMAGE),
    _vision("dinov2", "Dinov2", {"attention": 5, "mlp": 5}, _WIDTHS, _IMAGE, {"mlp_ratio": 2}),
    _vision(
        "swin",
        "Swin",
        {"attention": 6, "mlp": 6, "downsample": 2},
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4},
        {"depths": [2, 2, 2], "num_heads": [2, 4, 4]},
    ),
    _vision(
        "convnext",
        "ConvNext",
        {"layers": 8, "downsampling_layer": 3},
        {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2], "patch_size": 4},
    ),
    _vision(
        "resnet",
        "ResNet",
        {"layers": 8},
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
        {"layer_type": "basic"},
    ),
    _vision(
        "segformer",
        "Segformer",
        {"attention": 8, "mlp": 8, "patch_embeddings": 3},
        {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 4, 4]},
        {"depths": [2, 2, 2, 2], "decoder_hidden_size": 64},
    ),
    Case(
        "clip",
        "vision",
        _towers("CLIP"),
        _image_and_text,
        {"self_attn": 10, "mlp": 10},
    ),
    Case(
        "siglip",
        "vision",
        _towers("Siglip"),
        _image_and_text,
        {"self_attn": 10, "mlp": 10},
    ),
    Case(
        "llava",
        "vlm",
        _llava,
        _llava_inputs,
        {"self_attn": 10, "mlp": 10},
        generate=GREEDY,
        idle=("self_attn", "mlp"),  # the last vision layer: the picture is read one layer before
    ),
    Case(
        "qwen2_vl",
        "vlm",
        _qwen_vl("Qwen2VL", {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}),
        _qwen_vl_inputs,
        {"attn": 4, "self_attn": 5, "mlp": 11},  # two of them the merger's Linears
        generate=GREEDY,
    ),
    Case(
        "qwen2_5_vl",
        "vlm",
        _qwen_vl(
            "Qwen2_5_VL",
            {
                "hidden_size": 64,
                "intermediate_size": 128,
                "out_hidden_size": 64,
                "window_size": 32,
                "fullatt_block_indexes": [1, 3],
            },
        ),
        _qwen_vl_inputs,
        {"attn": 4, "self_attn": 5, "mlp": 11},  # two of them the merger's Linears
        generate=GREEDY,
    ),
    _case(
        "whisper",
        "audio",
        "Whisper",
        "ForConditionalGeneration",
        {"self_attn": 8, "encoder_attn": 4, "fc1": 8, "fc2": 8},
        _whisper_inputs,
        _WHISPER,
        generate=GREEDY,
    ),
    _case(
        "wav2vec2",
        "audio",
        "Wav2Vec2",
        "Model",
        {"attention": 5, "feed_forward": 5},
        lambda: {"input_values": noise(2, 800)},
        _WAV2VEC2,
    ),
    _case(
        "wavlm",
        "audio",
        "WavLM",
        "Model",
        {"attention": 5, "feed_forward": 5},
        lambda: {"input_values": noise(2, 800)},
        _WAV2VEC2,
    ),
)
