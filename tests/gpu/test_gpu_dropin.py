"""The drop-in rules that only a GPU can show."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_offload
from tests.gpu import models
from tests.gpu.harness import assert_all_equal, offloaded
from tests.gpu.streams import Gate
from tests.python import expect
from tests.python.dropin import Stack, plain_on, rows, tiny_stack
from tests.python.zoo.text import CASES
from torch_offload import StateError

pytestmark = pytest.mark.needs_cuda


@torch.no_grad()
def test_model_is_on_the_device_with_its_index_and_stays_there(device: torch.device) -> None:
    model, kwargs = models.fresh("llama", device), models.inputs("llama", device)
    must = models.must_give("llama", device)
    for asked in ("cuda", None, device, device.index):
        with torch_offload.offload(model, asked) as handle:  # type: ignore[arg-type]
            assert model.device == device
            assert model.device.index is not None
            assert handle.device == device
            for there in (model.to("cuda"), model.to(device), model.cuda(), model.model.to("cuda")):
                assert isinstance(there, nn.Module)
            assert model.to("cuda") is model
            with pytest.raises(StateError, match="remove"):
                model.to("cpu")
            with pytest.raises(StateError, match="remove"):
                model.half()
            assert_all_equal([models.run(model, kwargs)], must)


@torch.no_grad()
def test_transformers_pipeline_moves_nothing(device: torch.device) -> None:
    """``pipeline`` calls ``model.to(device)`` by itself, as a ``DiffusionPipeline`` does."""
    transformers = pytest.importorskip("transformers")
    model, plain = models.fresh("llama", device), models.resident("llama", device)
    x = models.inputs("llama", device)["input_ids"]

    class Pipe(transformers.Pipeline):  # type: ignore[misc]  # untyped
        """Takes and gives token ids: there is no tokenizer without a network."""

        def _sanitize_parameters(self, **kwargs: Any) -> Any:
            return {}, {}, {}

        def preprocess(self, ids: Any) -> Any:
            return {"input_ids": ids}

        def _forward(self, tensors: Any) -> Any:
            return {"logits": self.model(**tensors, use_cache=False).logits}

        def postprocess(self, outputs: Any) -> Any:
            return outputs["logits"]

    with offloaded(model, device) as handle:
        pipe = Pipe(model=model, device=device)
        assert pipe.device == device
        got = pipe(x[:1])
        assert torch.equal(got, Pipe(model=plain, device=device)(x[:1]))
        assert handle.stats.onloads >= expect.num_streamed(handle)


# --- weights read outside their unit's call ------------------------------------------------------


class _ReadsOutside(Stack):
    """Reads a streamed weight without calling its module, when told to."""

    is_reading = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        if self.is_reading:
            leaf = self.blocks[1].attn
            x = F.linear(x, leaf.weight, leaf.bias)
        return x


def _reader(kind: type[Stack]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return torch_offload.align(kind(4, 64).eval())


@torch.no_grad()
def test_weight_read_outside_its_call_is_named_with_the_cure(device: torch.device) -> None:
    model = _reader(_ReadsOutside)
    x = rows(device, width=64)
    must = plain_on(model, device)(x)
    with offloaded(model, device, depth=0) as handle:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"resident=\[.*'blocks\.1\.attn\.weight'"):
                model(x)
            expect.assert_at_rest(handle)
        model.is_reading = False
        assert model(x).isfinite().all()
    model.is_reading = True
    with offloaded(model, device, depth=0, resident=["blocks.1.attn.*"]) as handle:
        with expect.watch(handle) as calls:
            outputs = [model(x) for _ in range(2)]
        assert_all_equal(outputs, must)
        expect.assert_streams_exactly(calls)


_READER, _LENDER = (
    next(case for case in CASES if case.name == name) for name in ("gemma3n", "gpt_neox_japanese")
)


@torch.no_grad()
def test_model_known_to_read_outside_is_named_and_cured(device: torch.device) -> None:
    case = _READER
    model = torch_offload.align(case.build())
    kwargs = {key: value.to(device) for key, value in case.inputs().items()}
    must = plain_on(model, device)(**kwargs, use_cache=False).logits
    with offloaded(model, device, depth=0) as handle:
        with pytest.raises(RuntimeError, match=r"torch_offload: .*resident=\['") as caught:
            model(**kwargs, use_cache=False)
        part = case.cure[0].rpartition(".")[2]
        assert part in str(caught.value), f"expected {part} among the weights that are named"
        expect.assert_at_rest(handle)
    with offloaded(model, device, depth=0, resident=list(case.cure)) as handle:
        with expect.watch(handle) as calls:
            outputs = [model(**kwargs, use_cache=False).logits for _ in range(2)]
        assert_all_equal(outputs, must)
        expect.assert_streams_exactly(calls)


@torch.no_grad()
def test_weight_that_a_unit_returns_is_read_right_by_its_layer(device: torch.device) -> None:
    model = torch_offload.align(_LENDER.build())
    kwargs = {key: value.to(device) for key, value in _LENDER.inputs().items()}
    must = plain_on(model, device)(**kwargs, use_cache=False).logits
    with offloaded(model, device, depth=0) as handle:
        with expect.watch(handle) as calls:
            outputs = [model(**kwargs, use_cache=False).logits for _ in range(2)]
        assert_all_equal(outputs, must)
        expect.assert_streams_exactly(calls)


class _ReadsLeafOutside(nn.Module):
    """An MLP that reads one leaf's weight without calling it, when told to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.is_reading = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, self.up.weight, self.up.bias) if self.is_reading else self.up(x)
        return self.down(F.gelu(hidden))


class _StackOfReaders(Stack):
    def __init__(self, num_blocks: int = 4, width: int = 64) -> None:
        super().__init__(num_blocks, width)
        for block in self.blocks:
            block.mlp = _ReadsLeafOutside(width)


@torch.no_grad()
def test_leaf_read_outside_in_a_later_pass_raises_and_joins_its_sublayer(
    device: torch.device,
) -> None:
    model = _reader(_StackOfReaders)
    x = rows(device, width=64)
    must = plain_on(model, device)(x)
    with offloaded(model, device, granularity="module") as handle:
        outputs = [model(x) for _ in range(2)]
        assert "blocks.2.mlp.up" in {unit.name for unit in handle.units}
        model.blocks[2].mlp.is_reading = True
        with pytest.raises(RuntimeError, match=r"resident=\[.*'blocks\.2\.mlp\.up\.weight'"):
            model(x)
        expect.assert_at_rest(handle)
        outputs += [model(x) for _ in range(2)]
        names = {unit.name for unit in handle.units}
        assert "blocks.2.mlp" in names
        assert "blocks.2.mlp.up" not in names
        assert "blocks.1.mlp.up" in names
        assert_all_equal(outputs, must)


# --- other devices and processes -----------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
@torch.no_grad()
def test_second_gpu_while_the_first_is_current_equals_resident(mode: str) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    model, kwargs = models.fresh("llama", second), models.inputs("llama", second)
    must = models.must_give("llama", second)
    with torch.cuda.device(first):
        gc.collect()  # of other tests
        before = torch.cuda.memory_allocated(first)
        with offloaded(model, second, mode=mode) as handle:
            with expect.watch(handle) as calls:
                outputs = [models.run(model, kwargs) for _ in range(3)]

                @torch.no_grad()
                def run_in_a_thread_that_knows_no_gpu() -> None:
                    outputs.append(models.run(model, kwargs))

                thread = threading.Thread(target=run_in_a_thread_that_knows_no_gpu)
                thread.start()
                thread.join()
            assert len(outputs) == 4
            assert model.device == second
            assert {stream.device_index for stream in handle.streams.values()} <= {1}
            expect.assert_streams_exactly(calls)
        assert torch.cuda.current_device() == 0
        assert torch.cuda.memory_allocated(first) <= before
        assert_all_equal(outputs, must)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_two_models_on_two_gpus_interleaved_equal_resident() -> None:
    devices = [torch.device("cuda", index) for index in range(2)]
    pairs = [(models.fresh("llama", device), models.inputs("llama", device)) for device in devices]
    musts = [models.must_give("llama", device) for device in devices]
    with offloaded(pairs[0][0], devices[0]), offloaded(pairs[1][0], devices[1]):
        for _ in range(3):
            for (model, kwargs), must in zip(pairs, musts, strict=True):
                assert_all_equal([models.run(model, kwargs)], must)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@torch.no_grad()
def test_forked_child_raises_while_the_parent_has_a_forward_in_flight(
    device: torch.device,
) -> None:
    model = tiny_stack(4, width=64)
    plain = plain_on(model, device)
    x, x_host = rows(device, width=64), rows(torch.device("cpu"), width=64)
    must = plain(x)
    with offloaded(model, device, depth=0) as handle:
        outputs = [model(x) for _ in range(2)]
        torch.cuda.synchronize(device)
        gate = Gate(torch.cuda.current_stream())
        outputs.append(model(x))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # every way out is os._exit: nothing of pytest may run twice
            try:
                try:
                    model(x_host)
                    answer = b"no error"
                except StateError as error:
                    answer = str(error).encode()
                os.write(write, answer)
            finally:
                os._exit(7)
        was_in_flight = gate.is_closed
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert was_in_flight, "the forward had ended before the fork"
        assert b"forked child" in answer
        outputs += [model(x) for _ in range(2)]
        assert_all_equal(outputs, must)
        assert handle.stats.onloads >= 5 * expect.num_streamed(handle)
