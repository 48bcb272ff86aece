"""A published fault that lives in Python, seen from inside a forward.

All others: csrc/check/published_races.cpp and torch_offload/selfcheck/plants.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.python.dropin import assert_equal, rows, streamed, tiny_stack
from tests.python.streamed_master_guard import StreamedMasterGuard, StreamedMasterReadError

HOST = torch.device("cpu")


@torch.no_grad()
def test_h12_weight_used_without_its_module_is_its_master(
    master_guard: StreamedMasterGuard,
) -> None:
    # https://github.com/huggingface/transformers/issues/46978
    model = tiny_stack()
    weight = model.blocks[0].attn.weight
    truth = weight.clone()
    with streamed(model, HOST) as handle:
        model(rows(HOST))
        begin, end = handle._engine.window
        assert not begin <= weight.data_ptr() < end
        assert_equal(nn.functional.linear(rows(HOST), weight), rows(HOST) @ truth.T)
        # Inside a forward, but outside its module: nobody has brought it, and that is no secret.
        model.blocks[1].mlp.register_forward_pre_hook(lambda *_: weight.sum())
        with master_guard.expect_reads() as reads, pytest.raises(StreamedMasterReadError):
            model(rows(HOST))
        assert reads == ["blocks.0.attn.weight"]
