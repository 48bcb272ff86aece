"""Tools that wrap a whole offloaded model, or put hooks on it: refused before they change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import prune

from tests.python import expect
from tests.python.dropin import (
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_stack,
)
from torch_offload import StateError

HOST = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def _mesh() -> Any:
    return init_device_mesh("cpu", (1,))


_WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DDP": lambda m: nn.parallel.DistributedDataParallel(m),
    "DDP-around": lambda m: nn.parallel.DistributedDataParallel(nn.Sequential(m)),
    "DDP-of-a-block": lambda m: nn.parallel.DistributedDataParallel(m.blocks[1]),
    "FSDP": lambda m: FullyShardedDataParallel(m, device_id=HOST),
    "FSDP-around": lambda m: FullyShardedDataParallel(nn.Sequential(m), device_id=HOST),
    "FSDP-of-a-leaf": lambda m: FullyShardedDataParallel(m.blocks[1].mlp.up, device_id=HOST),
    "FSDP-original": lambda m: FullyShardedDataParallel(m, device_id=HOST, use_orig_params=True),
    "fully_shard": lambda m: fully_shard(m, mesh=_mesh()),
    "fully_shard-around": lambda m: fully_shard(nn.Sequential(m), mesh=_mesh()),
    "fully_shard-a-block": lambda m: fully_shard(m.blocks[1], mesh=_mesh()),
    "fully_shard-a-leaf": lambda m: fully_shard(m.blocks[1].mlp.up, mesh=_mesh()),
    "fully_shard-a-list": lambda m: fully_shard([m.blocks[0], m.blocks[1]], mesh=_mesh()),
}


@pytest.mark.parametrize("what", _WRAPPERS)
def test_wrapper_of_distributed_fails_before_it_changes_anything(what: str) -> None:
    model = tiny_stack()
    plain = plain_on(model, HOST)
    with streamed(model, HOST) as handle:
        before = expect.snapshot(model)
        with pytest.raises(StateError, match=r"(Distributed|FSDP).*handle\.remove\(\)"):
            _WRAPPERS[what](model)
        expect.assert_unchanged(model, before)
        assert_streams_like_plain(model, plain, handle, lambda m: m(rows(HOST)))


def test_model_whose_class_was_changed_fails_at_the_call() -> None:
    model = tiny_stack()
    with streamed(model, HOST), torch.no_grad():
        plain_class = type(model)
        model.__class__ = type("FSDPStack", (plain_class,), {})
        with pytest.raises(StateError, match=r"FSDPStack.*fully_shard.*handle\.remove\(\)"):
            model(rows(HOST))
        model.__class__ = plain_class
        model(rows(HOST))


def test_removed_model_may_be_sharded() -> None:
    model = tiny_stack()
    with streamed(model, HOST):
        pass
    assert not any("composable_api" in key for one in model.modules() for key in vars(one))
    fully_shard(model, mesh=_mesh())


def test_state_dict_as_distributed_collects_it_equals_plain() -> None:
    model = tiny_stack()
    must = {name: value.clone() for name, value in model.state_dict().items()}
    with streamed(model, HOST), torch.no_grad():
        model(rows(HOST))
        state = get_model_state_dict(model)
        assert list(state) == list(must)
        assert all(torch.equal(state[name], value) for name, value in must.items())


def test_hooks_that_put_weights_on_meta_fail_at_the_call() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_stack()
    plain = plain_on(model, HOST)
    x = rows(HOST)
    with streamed(model, HOST) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        accelerate.cpu_offload(model, execution_device=HOST)
        with pytest.raises(StateError, match=r"'blocks\.0\.attn\.weight'.*on meta.*remove\(\)"):
            model(x)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(x), plain(x))
        expect.assert_at_rest(handle)


def test_structure_changed_since_offload_fails_at_the_call() -> None:
    model = tiny_stack()
    plain = plain_on(model, HOST)
    x = rows(HOST)
    with streamed(model, HOST), torch.no_grad():
        prune.l1_unstructured(model.blocks[2].mlp.up, "weight", amount=0.5)
        with pytest.raises(StateError, match=r"'blocks\.2\.mlp\.up\.weight'.*handle\.remove\(\)"):
            model(x)
        prune.remove(model.blocks[2].mlp.up, "weight")
        prune.l1_unstructured(plain.blocks[2].mlp.up, "weight", amount=0.5)
        assert torch.equal(model(x), plain(x))
