"""The two trained models as fixtures: loaded once, skipped loudly where their packages are missing.

With ``TORCH_OFFLOAD_REQUIRE_ALL_MODELS=1`` a missing package is a failure, not a skip.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from examples.real_models import DataPackageMissingError, RealModel, load_gemma, load_minilm

REQUIRE_ALL_MODELS = os.environ.get("TORCH_OFFLOAD_REQUIRE_ALL_MODELS") == "1"


def _loaded(load: Callable[[], RealModel]) -> RealModel:
    try:
        loaded = load()
    except DataPackageMissingError as missing:
        if REQUIRE_ALL_MODELS:
            pytest.fail(f"TORCH_OFFLOAD_REQUIRE_ALL_MODELS=1, but {missing}")
        pytest.skip(f"NOT TESTED with trained weights: {missing} (requirements/models.txt)")
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    return loaded


@pytest.fixture(scope="session")
def minilm() -> RealModel:
    """all-MiniLM-L6-v2 on the device that tests run on."""
    return _loaded(load_minilm)


@pytest.fixture(scope="session")
def gemma() -> RealModel:
    """Gemma 3 270M on the device that tests run on; the first load ever takes minutes."""
    return _loaded(load_gemma)
