"""Models from folders on this machine: built on `meta` from a config, or loaded with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_offload.names import first_line


class ModelFileError(ValueError):
    """A path that holds no model; the message says what was expected there."""


def find_model(name: str) -> Path:
    """Where a model is: a path, or a name of the hub whose config is in the local cache.

    Raises:
        ModelFileError: If it is neither. Nothing is downloaded.
    """
    path = Path(name)
    if path.exists():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        cached = None
    else:
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            cached = None
    if isinstance(cached, str):
        return Path(cached).parent
    raise ModelFileError(
        f"expected a folder with a config.json, that file, or a model of the hub that is in the "
        f"local cache, got {name!r}, which is none of them; nothing is downloaded here"
    )


def read_config(path: Path) -> Any:
    """Reads a transformers config from a folder or a JSON file. Nothing is downloaded.

    Raises:
        ModelFileError: If there is none, or it is of no known kind.
        ModuleNotFoundError: If transformers is missing.
    """
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"models are built by transformers, which is not installed ({error}); run `pip install "
            "transformers`"
        ) from error

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        expected = "a folder with a config.json" if path.is_dir() else "a folder or a config.json"
        raise ModelFileError(f"expected {expected}, got {str(path)!r}, where there is none")
    try:
        fields = json.loads(file.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise ModelFileError(f"expected a config as JSON in {file}, got {error}") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str):
        raise ModelFileError(f"expected a model's config with a model_type in {file}, got none")
    try:
        return AutoConfig.for_model(**fields)
    except Exception as error:  # whatever a config's class thinks of the fields
        raise ModelFileError(
            f"expected a config that transformers knows in {file}, got {kind!r}: "
            f"{first_line(error)}"
        ) from error


def dtype_of(config: Any) -> torch.dtype:
    """The dtype that a config names; bfloat16 if it names none."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16


def _model_class(config: Any) -> Any:
    """The class that the config names first, else the one for text, else any."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise ModelFileError(f"expected a model that transformers builds, got {type(config).__name__}")


def build_on_meta(config: Any) -> nn.Module:
    """Builds the model without any weights.

    Raises:
        ModelFileError: If transformers cannot build it from this config.
    """
    made = _model_class(config)
    build = made.from_config if hasattr(made, "from_config") else made._from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, dtype=dtype_of(config))
    except Exception as error:
        raise ModelFileError(
            f"transformers cannot build a {type(config).__name__} from this config: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return model.eval()


def load_model(path: Path) -> nn.Module:
    """Loads a model with its weights to the CPU. Nothing is downloaded.

    A config without weights gives a model with random ones, in the config's dtype.

    Raises:
        ModelFileError: If there is no model, or its weights are broken.
    """
    config = read_config(path)
    made = _model_class(config)
    if not _has_weights(path):
        build = made.from_config if hasattr(made, "from_config") else made._from_config
        torch.manual_seed(0)
        random_weights: nn.Module = build(config, dtype=dtype_of(config))
        return random_weights.eval()
    try:
        model: nn.Module = made.from_pretrained(path, dtype=dtype_of(config), local_files_only=True)
    except Exception as error:
        raise ModelFileError(
            f"transformers cannot load the model in {path}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    return model.eval()


def _has_weights(path: Path) -> bool:
    patterns = ("*.safetensors", "pytorch_model*.bin")
    return path.is_dir() and any(True for pattern in patterns for _ in path.glob(pattern))
