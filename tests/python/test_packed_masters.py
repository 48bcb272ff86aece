"""Masters that are packed: the plain model's bits, in 0.7 of its page-locked memory."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.lanes.failures import Operator
from tests.lanes.fault_trials import Case, Trial
from tests.python import expect
from tests.python.checkpoints import load, load_plain
from tests.python.dropin import assert_equal, plain_on, raising, tiny_llama, tokens
from tests.python.dropin import logits as run
from tests.python.dropin import packable_llama as llama
from torch_offload import _C, Config, Handle, StateError, offload
from torch_offload.devices import devices_made_by
from torch_offload.packed_parameter import PackedParameter
from torch_offload.selfcheck.failing_operator import FailingOperator
from torch_offload.transport import packing_for

HOST = torch.device("cpu")
LAYOUTS = [
    ("sync", "shared"),
    ("streams", "split"),
    ("events", "shared"),
    ("events", "split"),
    ("pipeline", "shared"),
    ("pipeline", "split"),
]
_ROOT = Path(torch_offload.__file__).parents[1]


@contextmanager
def packed(model: nn.Module, **options: Any) -> Iterator[Handle]:
    options = {"transport": "packed", "masters": "packed", "depth": 0} | options
    with offload(model, HOST, **options) as handle:
        yield handle


def streamed_parameters(handle: Handle) -> dict[str, nn.Parameter]:
    model = handle.model
    assert model is not None
    return {
        name: model.get_parameter(name)
        for unit in handle.units
        if unit.place is not None
        for name in unit.parameters
    }


def assert_packed(handle: Handle) -> None:
    """Every streamed parameter has no memory, and looks as it is."""
    for name, parameter in streamed_parameters(handle).items():
        assert isinstance(parameter, PackedParameter), f"{name} is not packed"
    for unit in handle.units:
        assert unit.place is None or unit.copied_bytes < unit.size_bytes


def unpacked_names(handle: Handle) -> list[str]:
    return [
        name
        for name, parameter in streamed_parameters(handle).items()
        if not isinstance(parameter, PackedParameter)
    ]


def expected_now(model: nn.Module) -> torch.Tensor:
    """By a plain twin that gets the weights as the model's own operators read them."""
    twin = llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            twin.get_parameter(name).copy_(parameter.clone())
    return run(twin)


# --- forwards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
@pytest.mark.parametrize(("mode", "streams"), LAYOUTS)
def test_forward_is_equal_and_leaves_packed_parameters(
    mode: Any, streams: Any, granularity: Any
) -> None:
    model = llama()
    expected = run(model)
    with packed(model, mode=mode, streams=streams, granularity=granularity) as handle:
        assert_packed(handle)
        for _ in range(3):
            assert_equal(run(model), expected)
            assert_packed(handle)
        stats = handle.stats
        assert 0 < stats.bytes_copied < 0.75 * stats.bytes_onloaded
        weights = sum(p.nbytes for p in streamed_parameters(handle).values())
        assert stats.host_bytes <= 0.75 * weights + 4096 * len(handle.units)
    assert_equal(run(model), expected)


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
def test_forwards_plans_and_reports_unpack_nothing(
    granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    expected = run(model)
    with packed(model, granularity=granularity) as handle:
        unpacked = []
        monkeypatch.setattr("torch_offload.packed_parameter.unpack", unpacked.append)
        for _ in range(3):
            assert_equal(run(model), expected)
        handle.refresh()
        handle.report()
        assert handle.explain()
        handle.describe(0)
        assert model.to(HOST) is model
        model.requires_grad_(False).eval()
        handle.replan(gpu_budget="1GiB")
        handle.replan(gpu_budget=None)
        assert_equal(run(model), expected)
        assert unpacked == []


def test_depths_and_auto_transport_are_equal_and_without_hazard() -> None:
    model = llama()
    expected = run(model)
    for options in ({"depth": None}, {"depth": "1GiB"}, {"transport": "auto"}, {"debug": True}):
        with packed(model, **options) as handle:
            run(model)
            with handle.record() as log:
                assert_equal(run(model), expected)
                assert_equal(run(model), expected)
            assert handle.check() == []
            kinds = [op.kind for op in log.ops]
            assert kinds.count("copy") == kinds.count("decode")
            assert_packed(handle)


def test_parameter_at_rest_has_shape_stride_dtype_device_and_its_identity() -> None:
    model = llama()
    before = dict(model.named_parameters())
    looks = {
        name: (p.shape, p.stride(), p.dtype, p.device, p.requires_grad, p.is_contiguous(), p.nbytes)
        for name, p in before.items()
    }
    with packed(model) as handle:
        run(model)
        for name, p in model.named_parameters():
            assert p is before[name]
            assert isinstance(p, nn.Parameter)
            now = (p.shape, p.stride(), p.dtype, p.device, p.requires_grad, p.is_contiguous())
            assert (*now, p.nbytes) == looks[name]
        assert_packed(handle)


def test_locked_bytes_are_072_of_realistic_weights() -> None:
    model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=4).bfloat16()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    expected = run(model)
    with packed(model) as handle:
        weights = sum(unit.size_bytes for unit in handle.units if unit.place is not None)
        assert weights >= 30 * 2**20
        assert handle.stats.host_bytes / weights <= 0.72
        assert_equal(run(model), expected)
        assert handle.stats.host_bytes / weights <= 0.72


_PEAK = """
import threading, time
from pathlib import Path
import torch
from torch import nn
from torch_offload import offload
torch.set_num_threads(1)

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)
    def forward(self, x):
        return self.up(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

with torch.no_grad():
    warm = nn.ModuleList([Block()])
    model = Model()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    x = torch.randn(1, 4096).bfloat16()
    expected = model(x)
    weights = sum(p.nbytes for p in model.parameters())
    unit = weights // 8
    peak = [0]
    stop = threading.Event()
    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.0005)
    begin = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    handle = offload(model, "cpu", transport="packed", masters="packed", depth=0, gpu_budget=None)
    stop.set(); thread.join()
    held = anonymous() - begin
    window = handle.stats.window_bytes + handle.stats.staging_bytes
    assert torch.equal(model(x), expected)
    # The weights that were there are counted in `begin`: what comes on top is one packed unit, and
    # what the device has.
    print((peak[0] - begin - window) / unit, (held - window) / weights)
"""


def test_peak_of_host_memory_is_the_weights_and_a_unit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak_units, held_share = map(float, done.stdout.split())
    assert peak_units < 1.5
    assert held_share < -0.25  # 0.3 of the weights has been given back


# --- reads at rest -------------------------------------------------------------------------------


READS: dict[str, Callable[[nn.Parameter], Any]] = {
    "clone": lambda w: w.clone(),
    "to": lambda w: w.to(torch.float32),
    "sum": lambda w: w.sum(),
    "add": lambda w: w + 1,
    "equal": lambda w: torch.tensor(torch.equal(w, w.clone())),
    "cat": lambda w: torch.cat([w, w]),
    "index_select": lambda w: w.index_select(0, torch.tensor([1, 0])),
    "item": lambda w: torch.tensor(w.max().item()),
}
ALIASES: dict[str, Callable[[nn.Parameter], Any]] = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "view": lambda w: w.view(-1),
    "index": lambda w: w[1:3],
    "transpose": lambda w: w.t(),
    "linear": lambda w: torch.nn.functional.linear(torch.ones(1, w.shape[1]).bfloat16(), w),
    "numpy": lambda w: torch.from_numpy(w.detach().view(torch.int16).numpy()).clone(),
    "data_ptr": lambda w: torch.tensor(w.data_ptr() != 0),
    "storage": lambda w: torch.tensor(w.untyped_storage().nbytes()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "deepcopy": lambda w: copy.deepcopy(w),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "dlpack": lambda w: torch.from_dlpack(w.detach()),
    "parameter": lambda w: nn.Parameter(w),
    "frozen parameter": lambda w: nn.Parameter(w, requires_grad=False),
    "buffer": lambda w: nn.Buffer(w),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("read", READS)
def test_read_gives_the_weights_and_leaves_them_packed(read: str, grad: bool) -> None:
    model = llama()
    plain = llama().model.layers[1].mlp.up_proj.weight
    with packed(model) as handle, torch.set_grad_enabled(grad):
        weight = model.model.layers[1].mlp.up_proj.weight
        got, must = READS[read](weight), READS[read](plain)
        assert type(got) is torch.Tensor
        assert torch.equal(got, must)
        assert got.requires_grad == must.requires_grad
        assert_packed(handle)


@pytest.mark.parametrize("show", [repr, str, "{}".format])
def test_weight_at_rest_is_shown_as_a_plain_one_and_stays_packed(
    show: Callable[[nn.Parameter], str],
) -> None:
    model = llama()
    plain = llama().model.layers[1].mlp.up_proj.weight
    with packed(model) as handle:
        assert show(model.model.layers[1].mlp.up_proj.weight) == show(plain)
        assert_packed(handle)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("read", ["clone", "equal", "detach", "data_ptr", "pickle"])
def test_forked_child_that_reads_gets_an_error(read: str) -> None:
    model = llama()
    with packed(model):
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                (READS | ALIASES)[read](model.model.layers[1].mlp.up_proj.weight)
                os.write(writable, b"no error")
            except BaseException as error:
                os.write(writable, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.close(writable)
        status = os.waitpid(child, 0)[1]
        with os.fdopen(readable) as answer:
            said = answer.read()
        assert status == 0, f"the child ended with {status}"
        assert said.startswith("StateError: expected packed weights to be read in the process")


@pytest.mark.parametrize("read", ALIASES)
def test_alias_gives_the_weights_and_is_packed_again_when_it_is_gone(read: str) -> None:
    model = llama()
    expected = run(model)
    plain = llama().model.layers[1].mlp.up_proj.weight
    with packed(model) as handle, torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        got, must = ALIASES[read](weight), ALIASES[read](plain)
        assert type(got) is type(must)
        assert torch.equal(got, must)
        assert unpacked_names(handle) == ["model.layers.1.mlp.up_proj.weight"]
        assert type(weight) is nn.Parameter
        assert not hasattr(weight, "_torch_offload_packed")
        assert_equal(run(model), expected)
        del got
        assert_equal(run(model), expected)
        assert_packed(handle)


def test_parameter_made_of_a_weight_is_an_alias_of_it() -> None:
    model = llama()
    with packed(model):
        weight = model.model.layers[1].mlp.up_proj.weight
        made = nn.Parameter(weight)
        assert made.is_leaf
        assert made.requires_grad
        assert made.data_ptr() == weight.data_ptr()
        assert type(copy.deepcopy(made)) is nn.Parameter
        with torch.no_grad():
            made.mul_(2)
        assert_equal(run(model), expected_now(model))


class _OwnParameter(nn.Parameter):
    pass


REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception]]] = {
    "make_subclass": (lambda w: torch.Tensor._make_subclass(nn.Parameter, w), RuntimeError),
    "subclass": (lambda w: _OwnParameter(w), TypeError),
}


@pytest.mark.parametrize("make", REFUSED)
def test_parameter_that_cannot_be_made_of_a_weight_is_made_of_its_data(make: str) -> None:
    model = llama()
    expected = run(model)
    plain = llama().model.layers[1].mlp.up_proj.weight
    function, error = REFUSED[make]
    with packed(model) as handle:
        weight = model.model.layers[1].mlp.up_proj.weight
        with pytest.raises(error):
            function(weight)
        handle.refresh()
        assert_packed(handle)
        got = function(weight.data)
        assert type(got) is type(function(plain.data))
        assert torch.equal(got, plain)
        assert_equal(run(model), expected)


def test_data_that_is_a_weight_without_memory_fails_at_its_use() -> None:
    model = llama()
    expected = run(model)
    plain = llama().model.layers[1].mlp.up_proj.weight
    with packed(model) as handle:
        weight = model.model.layers[1].mlp.up_proj.weight
        other = nn.Parameter(torch.zeros_like(plain))
        other.data = weight
        with pytest.raises(RuntimeError, match=r"masters='plain'"):
            other.sum()
        assert_packed(handle)
        other.data = weight.data
        assert torch.equal(other, plain)
        assert_equal(run(model), expected)


def test_tensor_without_memory_gives_no_null_pointer() -> None:
    model = llama()
    with packed(model) as handle:
        weight = model.model.layers[1].mlp.up_proj.weight
        with pytest.raises((RuntimeError, ValueError), match=r"masters='plain'"):
            torch._C.TensorBase.data_ptr(weight)
        assert_packed(handle)


def test_gradient_at_rest_is_right() -> None:
    model = llama()
    plain = llama().model.layers[1].mlp.up_proj.weight
    with packed(model):
        weight = model.model.layers[1].mlp.up_proj.weight
        for one in (weight, plain):
            (one.float().pow(2) * 3).sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, plain.grad)


def test_backward_through_a_forward_raises() -> None:
    model = llama()
    with packed(model):
        with pytest.warns(UserWarning, match="grad mode"):
            output = model(tokens(HOST)).logits
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.float().sum().backward()


def test_state_dict_is_plain_and_is_packed_again_by_refresh() -> None:
    model = llama()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = run(model)
    with packed(model) as handle:
        run(model)
        state = model.state_dict()
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        saved = torch.load(file)
        assert list(state) == list(plain)
        for name, tensor in plain.items():
            assert type(state[name]) is torch.Tensor
            assert torch.equal(state[name], tensor), name
            assert torch.equal(saved[name], tensor), name
            assert state[name].untyped_storage().nbytes() == state[name].nbytes
        assert_equal(run(model), expected)
        del state, tensor
        handle.refresh()
        assert_packed(handle)
        assert_equal(run(model), expected)


def test_save_pretrained_gives_the_same_files(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    with packed(model):
        run(model)
        model.save_pretrained(tmp_path / "packed")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


def test_copies_and_pickles_of_the_model_are_refused_as_ever() -> None:
    model = llama()
    expected = run(model)
    with packed(model) as handle:
        for call in (copy.deepcopy, pickle.dumps, lambda m: m.half(), lambda m: m.share_memory()):
            with pytest.raises(StateError, match=r"handle.remove"):
                call(model)
        assert model.to(HOST) is model
        assert_packed(handle)
        assert_equal(run(model), expected)


# --- edits ---------------------------------------------------------------------------------------


def _in_place(w: nn.Parameter) -> None:
    with torch.no_grad():
        w.mul_(1.5)


def _by_data(w: nn.Parameter) -> None:
    w.data += 0.25


def _by_data_replaced(w: nn.Parameter) -> None:
    w.data = w.data.flip(0).contiguous()


def _by_data_of_other_strides(w: nn.Parameter) -> None:
    w.data = (w.data * 0.5).t().contiguous().t()


def _one_element(w: nn.Parameter) -> None:
    w.data[3, 5] = 7.0  # no counter and no sample tells of it


def _by_numpy(w: nn.Parameter) -> None:
    w.detach().view(torch.int16).numpy()[2, 3] ^= 0x80


def _by_storage(w: nn.Parameter) -> None:
    torch.empty(0, dtype=w.dtype).set_(w.untyped_storage())[:9] *= 2


def _by_set(w: nn.Parameter) -> None:
    with torch.no_grad():
        w.set_(torch.full_like(w, 0.125))


def _by_init(w: nn.Parameter) -> None:
    nn.init.normal_(w, std=0.02)


def _by_copy(w: nn.Parameter) -> None:
    with torch.no_grad():
        w.copy_(torch.full_like(w, 0.5))


def _by_foreach(w: nn.Parameter) -> None:
    with torch.no_grad():
        torch._foreach_add_([w], 1.0)


def _beyond_packing(w: nn.Parameter) -> None:
    """Small numbers, the exponents of which no palette holds."""
    bits = torch.randint(0, 118 << 7, w.shape, dtype=torch.int16)
    with torch.no_grad():
        w.copy_(bits.view(torch.bfloat16))


EDITS = [
    _in_place,
    _by_data,
    _by_data_replaced,
    _by_data_of_other_strides,
    _one_element,
    _by_numpy,
    _by_storage,
    _by_set,
    _by_init,
    _by_copy,
    _by_foreach,
    _beyond_packing,
]


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
@pytest.mark.parametrize("depth", [0, "1GiB"])
@pytest.mark.parametrize("edit", EDITS)
def test_edit_between_forwards_is_seen(edit: Callable[[nn.Parameter], None], depth: Any) -> None:
    model = llama()
    with packed(model, depth=depth) as handle:
        run(model)
        for layer in (1, 0):
            weight = model.model.layers[layer].mlp.up_proj.weight
            before = weight.clone()
            edit(weight)
            assert not torch.equal(weight, before)
            edited = weight.clone()
            with handle.record():
                got = run(model)
            assert handle.check() == []
            assert torch.equal(weight, edited)
            assert_equal(got, expected_now(model))
            assert_equal(run(model), got)
            gc.collect()
            handle.refresh()
            assert_equal(run(model), got)
        if edit is _beyond_packing:
            assert len(unpacked_names(handle)) == 6
            assert type(weight) is nn.Parameter
        else:
            assert_packed(handle)
    assert_equal(run(model), got)
    assert torch.equal(weight, edited)


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
def test_unit_that_came_to_be_plain_is_edited_as_any() -> None:
    model = llama()
    with packed(model) as handle:
        weight = model.model.layers[1].mlp.up_proj.weight
        _beyond_packing(weight)
        run(model)
        raw = [unit.name for unit in handle.units if unit.copied_bytes == unit.size_bytes]
        assert raw == ["model.layers.1.mlp"]
        for edit in (_in_place, _by_data, _by_data_replaced, _by_copy):
            edit(weight)
            assert_equal(run(model), expected_now(model))
        handle.replan(gpu_budget=None)  # packs what can be packed again
        assert_equal(run(model), expected_now(model))
        assert_packed(handle)


def locked_by_a_fresh_one(model: nn.Module) -> int:
    twin = llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            twin.get_parameter(name).copy_(parameter.clone())
    with packed(twin) as handle:
        return handle.stats.host_bytes


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
def test_unit_that_turns_plain_and_back_locks_as_much_as_a_fresh_one() -> None:
    model = llama()
    with packed(model) as handle:
        begin = handle.stats.host_bytes
        weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
        values = [weight.clone() for weight in weights]
        for weight in weights:
            _beyond_packing(weight)
            run(model)
            assert handle.stats.host_bytes == locked_by_a_fresh_one(model)
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
        handle.replan(gpu_budget=None)
        assert_packed(handle)
        assert handle.stats.host_bytes == begin
        assert_equal(run(model), expected_now(model))


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
@pytest.mark.parametrize("turns_plain", [False, True])
def test_units_that_become_resident_lock_nothing(turns_plain: bool) -> None:
    model = llama()
    with packed(model) as handle:
        if turns_plain:
            _beyond_packing(model.model.layers[1].mlp.up_proj.weight)
            run(model)
        expected = expected_now(model)
        begin = handle.stats.host_bytes
        for _ in range(2):
            handle.replan(gpu_budget="1GiB")
            assert handle.stats.host_bytes == 0
            assert_equal(run(model), expected)
            handle.replan(gpu_budget=None)
            assert handle.stats.host_bytes == begin
            assert_equal(run(model), expected)


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
def test_plain_unit_that_is_shown_by_others_is_packed_again_once_they_are_gone() -> None:
    model = llama()
    with packed(model) as handle, torch.no_grad():
        begin = handle.stats.host_bytes
        weight = model.model.layers[1].mlp.up_proj.weight
        values = weight.clone()
        _beyond_packing(weight)
        run(model)
        state = model.state_dict()
        weight.copy_(values)
        handle.replan(gpu_budget=None)
        for factor in (1, 2, 0.5):
            state["model.layers.1.mlp.up_proj.weight"].mul_(factor)
            assert_equal(run(model), expected_now(model))
        del state
        handle.refresh()
        assert_packed(handle)
        assert handle.stats.host_bytes == begin
        assert_equal(run(model), expected_now(model))


def test_weight_whose_memory_was_freed_fails() -> None:
    model = llama()
    expected = run(model)
    with packed(model) as handle:
        weight = model.model.layers[1].mlp.up_proj.weight
        values = weight.clone()
        weight.untyped_storage().resize_(0)
        for call in (handle.refresh, lambda: handle.replan(gpu_budget=None)):
            with pytest.raises(StateError, match=r"layers\.1\.mlp\.up_proj.* memory was freed"):
                call()
        weight.data = values
        del values
        assert_equal(run(model), expected)
        handle.refresh()
        assert_packed(handle)
        weight.untyped_storage().resize_(0)  # remove() does not read it


# --- data of one weight for another, and weights that share memory -------------------------------


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
@pytest.mark.parametrize("left", ["packed", "unpacked", "plain", "packed itself"])
@pytest.mark.parametrize("then", ["run", "refresh", "replan", "remove"])
def test_weight_that_is_given_another_ones_data_holds_it(left: str, then: str) -> None:
    model = llama()
    with packed(model) as handle:
        run(model)
        first, second = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
        values = second.clone()
        if left == "unpacked":
            first.detach()
        elif left == "plain":
            _beyond_packing(first)
            run(model)
        elif left == "packed itself":
            first = second
        first.data = second
        if then == "refresh":
            handle.refresh()
        elif then == "replan":
            handle.replan(gpu_budget="1GiB")
            handle.replan(gpu_budget=None)
        if then != "remove":
            got = run(model)
            assert torch.equal(first, values)
            assert torch.equal(second, values)
            assert_equal(got, expected_now(model))
            assert_equal(run(model), got)
    assert type(first) is nn.Parameter
    assert torch.equal(first, values)
    assert torch.equal(second, values)
    assert_equal(run(model), expected_now(model))


def test_resident_that_is_given_a_packed_ones_data_streams_it() -> None:
    model, other = llama(), llama()
    with packed(other), packed(model, gpu_budget="1GiB") as handle:
        assert all(unit.place is None for unit in handle.units)
        weight = other.model.layers[0].mlp.up_proj.weight
        model.model.layers[1].mlp.up_proj.weight.data = weight
        handle.replan(gpu_budget=None)
        assert_packed(handle)
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, weight)
        assert_equal(run(model), expected_now(model))


def test_weight_of_a_plain_model_that_is_given_a_packed_ones_data_fails() -> None:
    model, plain = llama(), llama()
    with packed(model) as handle:
        weight = plain.model.layers[1].mlp.up_proj.weight
        weight.data = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(RuntimeError, match="whose master is packed"):
            run(plain)
        weight.data = model.model.layers[0].mlp.up_proj.weight.data
        run(plain)
        del weight, plain
        gc.collect()
        run(model)
        assert_packed(handle)


def _one_buffer_by_vector(model: Any, names: list[str]) -> torch.Tensor:
    tensors = [*map(model.get_parameter, names), model.spare]
    with torch.no_grad():
        buffer = nn.utils.parameters_to_vector(tensors) * 1.5
        nn.utils.vector_to_parameters(buffer, tensors)
    return buffer


def _one_buffer_by_state_dict(model: Any, names: list[str]) -> torch.Tensor:
    tensors = {name: model.get_parameter(name) for name in names} | {"spare": model.spare}
    with torch.no_grad():
        buffer = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]) * 1.5
    parts = buffer.split([tensor.numel() for tensor in tensors.values()])
    pairs = zip(tensors.items(), parts, strict=True)
    # Detached, as a view that becomes a buffer holds all of what it was made from.
    state = {name: part.view(tensor.shape).detach() for (name, tensor), part in pairs}
    model.load_state_dict(state, strict=False, assign=True)
    return buffer


@pytest.mark.parametrize("share", [_one_buffer_by_vector, _one_buffer_by_state_dict])
def test_weights_that_share_one_buffer_are_packed_again_once_it_is_theirs_alone(
    share: Callable[[Any, list[str]], torch.Tensor],
) -> None:
    model = llama()
    model.register_buffer("spare", torch.ones(64).bfloat16())  # stays, and is of the buffer, too
    with packed(model) as handle:
        run(model)
        begin = handle.stats.host_bytes
        names = list(streamed_parameters(handle))
        buffer = share(model, names)
        got = run(model)
        assert_equal(got, expected_now(model))
        assert unpacked_names(handle) == names
        with torch.no_grad():
            buffer[7] = 3.0  # one element
        got = run(model)
        assert model.get_parameter(names[0]).view(-1)[7] == 3.0
        assert_equal(got, expected_now(model))
        del buffer
        gc.collect()
        assert_equal(run(model), got)
        assert_packed(handle)
        assert handle.stats.host_bytes <= begin + 4096 * len(handle.units)
        assert_equal(run(model), got)
    assert_equal(run(model), got)


def test_slices_of_one_tensor_are_packed_as_weights_of_their_own() -> None:
    model = llama()
    with packed(model) as handle:
        run(model)
        fused = torch.randn(3, *model.model.layers[0].self_attn.q_proj.weight.shape) * 0.02
        fused = fused.bfloat16()
        attention = model.model.layers[1].self_attn
        attention.q_proj.weight = nn.Parameter(fused[0])
        model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(fused[1])
        model.model.layers[2].self_attn.q_proj.weight = nn.Parameter(fused[2])
        run(model)
        assert len(unpacked_names(handle)) == 3
        del fused
        got = run(model)
        assert_packed(handle)
        assert_equal(got, expected_now(model))


def test_edit_of_one_of_two_weights_with_the_same_memory_is_seen_in_both() -> None:
    model = llama()
    with packed(model) as handle, torch.no_grad():
        first, second = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
        first.data = second.data
        run(model)
        second[1, 2] = 5.0
        got = run(model)
        assert first[1, 2] == 5.0
        assert_equal(got, expected_now(model))
        assert len(unpacked_names(handle)) == 2


def test_edit_through_a_storage_that_outlives_a_forward_is_seen() -> None:
    model = llama()
    with packed(model) as handle:
        weight = model.model.layers[1].mlp.up_proj.weight
        storage = weight.untyped_storage()
        run(model)
        storage.fill_(0)
        assert_equal(run(model), expected_now(model))
        assert not weight.any()
        del storage
        got = run(model)
        assert_packed(handle)
        assert_equal(run(model), got)


def test_edit_through_an_alias_that_outlives_a_forward_is_seen() -> None:
    model = llama()
    with packed(model) as handle, torch.no_grad():
        aliases = [
            model.model.layers[1].mlp.up_proj.weight.detach(),
            model.state_dict()["model.layers.0.self_attn.q_proj.weight"],
        ]
        run(model)
        for alias in aliases:
            alias[1, 2] = 3.0
            assert_equal(run(model), expected_now(model))
        for alias in aliases:
            alias.mul_(2)
        assert_equal(run(model), expected_now(model))
        del alias, aliases
        got = run(model)
        assert_equal(got, expected_now(model))
        handle.refresh()
        assert_packed(handle)
        assert_equal(run(model), got)


def test_edit_through_an_alias_that_outlives_a_plan_is_seen() -> None:
    model = llama()
    with packed(model) as handle, torch.no_grad():
        alias = model.model.layers[1].mlp.up_proj.weight.detach()
        handle.replan(gpu_budget=None)
        alias.mul_(2)
        assert_equal(run(model), expected_now(model))


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_seen(assign: bool) -> None:
    model = llama()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with packed(model) as handle:
        run(model)
        model.load_state_dict({n: t * 0.5 for n, t in plain.items()}, assign=assign)
        got = run(model)
        assert_equal(got, expected_now(model))
        gc.collect()
        handle.refresh()
        assert_packed(handle)
        assert_equal(run(model), got)


def test_optimizer_step_is_seen() -> None:
    model, plain = llama(), llama()
    with packed(model):
        run(model)
        for one in (model, plain):
            weights = [layer.mlp.up_proj.weight for layer in one.model.layers]
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            torch.optim.Adam(weights, lr=0.1).step()
        assert_equal(run(model), run(plain))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_merge_and_unmerge_are_seen() -> None:
    peft = pytest.importorskip("peft")

    def with_adapter() -> Any:
        torch.manual_seed(21)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        return peft.get_peft_model(llama(), config).eval()

    model, plain = torch_offload.align(with_adapter()), torch_offload.align(with_adapter())
    with packed(model):
        assert_equal(run(model), run(plain))
        for step in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
            for one in (model, plain):
                getattr(one, step)()
            assert_equal(run(model), run(plain))
    assert_equal(run(model), run(plain))


def test_replaced_parameter_is_seen_and_the_former_keeps_its_values() -> None:
    model = llama()
    with packed(model) as handle, torch.no_grad():
        run(model)
        up = model.model.layers[1].mlp.up_proj
        old, values = up.weight, up.weight.clone()
        new = nn.Parameter(torch.full_like(old, 0.5), requires_grad=False)
        up.weight = new
        assert_equal(run(model), expected_now(model))
        assert type(old) is nn.Parameter
        assert torch.equal(old, values)
        assert up.weight is new
        assert isinstance(new, PackedParameter)
        assert_packed(handle)
    assert up.weight is new
    assert type(new) is nn.Parameter
    assert torch.equal(new, torch.full_like(values, 0.5))


def test_parameters_swapped_between_units_are_seen() -> None:
    model = llama()
    with packed(model) as handle:
        run(model)
        first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
        values = first.weight.clone(), second.weight.clone()
        first.weight, second.weight = second.weight, first.weight
        got = run(model)
        assert torch.equal(second.weight, values[0])
        assert torch.equal(first.weight, values[1])
        assert_equal(got, expected_now(model))
        assert_equal(run(model), got)
        assert_packed(handle)
    assert_equal(run(model), got)


@pytest.mark.parametrize(
    "replacement",
    [
        pytest.param(lambda old: nn.Parameter(torch.zeros(3, 3)), id="shape"),
        pytest.param(lambda old: nn.Parameter(old.double()), id="dtype"),
    ],
)
def test_replaced_parameter_of_another_kind_fails(
    replacement: Callable[[nn.Parameter], nn.Parameter],
) -> None:
    model = llama()
    expected = run(model)
    with packed(model) as handle, torch.no_grad():
        up = model.model.layers[1].mlp.up_proj
        old = up.weight
        up.weight = replacement(old)
        with pytest.raises(StateError, match=r"layers\.1\.mlp\.up_proj\.weight") as raised:
            run(model)
        assert "a dense torch.bfloat16 of shape (512, 256) as before" in str(raised.value)
        assert f"got {up.weight.dtype} of shape" in str(raised.value)
        up.weight = old
        assert_equal(run(model), expected)
        assert_packed(handle)


# --- kinds of parameters and units ---------------------------------------------------------------


def test_frozen_and_tied_parameters_with_attributes() -> None:
    def make() -> Any:
        model = llama()
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight.note = "kept"
        mlp.gate_proj.weight = mlp.up_proj.weight  # tied within the unit
        model.model.layers[0].mlp.requires_grad_(False)
        return model

    model = make()
    before = expect.snapshot(model)
    expected = run(plain_on(make(), HOST))
    with packed(model) as handle:
        for _ in range(2):
            assert_equal(run(model), expected)
        weight = model.model.layers[1].mlp.up_proj.weight
        assert isinstance(weight, PackedParameter)
        assert weight.note == "kept"
        assert model.model.layers[1].mlp.gate_proj.weight is weight
        assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
        assert_packed(handle)
    assert type(weight) is nn.Parameter
    assert vars(weight) == {"note": "kept"}
    expect.assert_unchanged(model, before, same_memory=False)


class _Own(nn.Parameter):
    """A class of a user's own."""


def test_replacement_of_a_users_own_class_is_of_it_again() -> None:
    model = llama()
    with packed(model) as handle:
        run(model)
        up = model.model.layers[1].mlp.up_proj
        up.weight = _Own(up.weight.clone() * 2, requires_grad=False)
        assert_equal(run(model), expected_now(model))
        assert isinstance(up.weight, PackedParameter)
        assert isinstance(up.weight, _Own)
        assert_packed(handle)
    assert type(up.weight) is _Own


def test_units_that_packing_would_not_shrink_stay_plain() -> None:
    model = llama()
    _beyond_packing(model.model.layers[1].mlp.up_proj.weight)
    _beyond_packing(model.model.layers[1].mlp.gate_proj.weight)
    model.model.layers[2].mlp.float()
    model.model.layers[2].mlp.register_forward_pre_hook(lambda m, args: (args[0].float(),))
    model.model.layers[2].mlp.register_forward_hook(lambda m, args, out: out.bfloat16())
    expected = run(plain_on(model, HOST))
    with packed(model) as handle:
        for _ in range(2):
            assert_equal(run(model), expected)
        raw = [unit.name for unit in handle.units if unit.copied_bytes == unit.size_bytes]
        assert raw == ["model.layers.1.mlp", "model.layers.2.mlp"]
        assert all(name.startswith(tuple(raw)) for name in unpacked_names(handle))
        assert len(unpacked_names(handle)) == 6
    assert_equal(run(model), expected)


def test_nothing_to_pack_streams_as_plain() -> None:
    model = llama().float()
    expected = run(model)
    with packed(model) as handle:
        for _ in range(2):
            assert_equal(run(model), expected)
        assert handle.stats.staging_bytes == 0
        expect.assert_at_rest(handle)


# --- units that stay packed on the device --------------------------------------------------------


def held_on_device(handle: Handle) -> int:
    stats = handle.stats
    return stats.bytes_resident + stats.window_bytes + stats.staging_bytes + stats.packed_bytes


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
@pytest.mark.parametrize(("mode", "streams"), LAYOUTS)
def test_packed_and_resident_forward_is_equal_and_copies_nothing(
    mode: Any, streams: Any, granularity: Any
) -> None:
    model = llama()
    expected = run(model)
    options = {"mode": mode, "streams": streams, "granularity": granularity}
    with packed(model, transport="packed_resident", **options) as handle:
        for _ in range(2):
            assert_equal(run(model), expected)
            assert_packed(handle)
        before = handle.stats
        with handle.record() as log:
            assert_equal(run(model), expected)
        assert handle.check() == []
        assert handle.stats.bytes_copied == before.bytes_copied
        kinds = [op.kind for op in log.ops]
        assert kinds.count("copy") == 0
        assert kinds.count("decode") == handle.stats.onloads - before.onloads
        assert {unit.transport for unit in handle.units if unit.place} == {"packed_resident"}
        weights = sum(p.nbytes for p in streamed_parameters(handle).values())
        # The blobs are the masters: on the host and on the device, once each.
        assert handle.stats.host_bytes <= 0.75 * weights + 4096 * len(handle.units)
        assert 0 < handle.stats.packed_bytes <= 0.75 * weights + 4096 * len(handle.units)
    assert_equal(run(model), expected)


@pytest.mark.filterwarnings("ignore:.*travel raw from now on:UserWarning")
@pytest.mark.parametrize("edit", EDITS)
def test_edit_of_a_unit_that_stays_packed_is_seen(edit: Callable[[nn.Parameter], None]) -> None:
    model = llama()
    with packed(model, transport="packed_resident") as handle:
        run(model)
        weight = model.model.layers[1].mlp.up_proj.weight
        edit(weight)
        with handle.record() as log:
            got = run(model)
        assert handle.check() == []
        assert_equal(got, expected_now(model))
        gc.collect()
        handle.refresh()
        ways = {unit.name: unit.transport for unit in handle.units if unit.place}
        if edit is _beyond_packing:
            assert ways.pop("model.layers.1.mlp") == "raw"
            assert len(unpacked_names(handle)) == 3
        else:
            assert [op.kind for op in log.ops].count("copy") == 1  # brought there once
            assert_packed(handle)
        assert set(ways.values()) == {"packed_resident"}
        assert_equal(run(model), got)
    assert_equal(run(model), got)


def test_units_travel_and_stay_within_every_budget_to_the_byte() -> None:
    model = llama(num_hidden_layers=6)
    expected = run(model)
    total = sum(parameter.nbytes for parameter in model.parameters())
    seen = set()
    with packed(model, gpu_budget=total, depth=None) as handle:
        for percent in (100, 130, 85, 75, 65, 115, 70, 100):
            budget = total * percent // 100
            handle.replan(gpu_budget=budget)
            assert held_on_device(handle) <= budget
            assert_packed(handle)
            assert_equal(run(model), expected)
            with handle.record():
                assert_equal(run(model), expected)
            assert handle.check() == []
            seen |= {unit.transport if unit.place else "resident" for unit in handle.units}
            streamed = sum(p.nbytes for p in streamed_parameters(handle).values())
            assert handle.stats.host_bytes <= 0.75 * streamed + 4096 * len(handle.units)
    assert seen == {"resident", "packed", "packed_resident"}
    assert_equal(run(model), expected)


def test_edit_that_packs_worse_keeps_a_later_plan_within_its_budget() -> None:
    model = llama()
    total = sum(parameter.nbytes for parameter in model.parameters())
    with packed(model, gpu_budget=None) as handle:
        weight = model.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():  # more exponents than before, and still worth packing
            weight.mul_(torch.exp2(torch.randint(-6, 6, weight.shape)))
        expected = expected_now(model)
        for percent in (80, 90, 70):
            handle.replan(gpu_budget=total * percent // 100)
            assert held_on_device(handle) <= total * percent // 100
            assert_equal(run(model), expected)
        assert_equal(run(model), expected)
    assert_equal(run(model), expected)


def test_explanation_counts_the_packed_masters_alone() -> None:
    model = llama()
    for transport in ("packed", "packed_resident"):
        with packed(model, transport=transport) as handle:
            said = handle.explain().prediction.host_bytes
            assert handle.stats.host_bytes <= said <= 1.05 * handle.stats.host_bytes


# --- failures, plans, the way back ---------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ValueError("x")])
def test_interrupted_forward_leaves_packed_parameters(error: BaseException) -> None:
    model = llama()
    expected = run(model)
    with packed(model, depth=None) as handle:
        for layer in range(3):
            for part in ("mlp.down_proj", "self_attn.k_proj"):
                module = model.model.layers[layer].get_submodule(part)
                hook = module.register_forward_pre_hook(raising(error))
                with pytest.raises(type(error)):
                    run(model)
                hook.remove()
                assert_packed(handle)
                assert_equal(run(model), expected)


def test_replan_and_budgets_move_weights_both_ways() -> None:
    model = llama()
    expected = run(model)
    size = sum(parameter.nbytes for parameter in model.parameters())
    roomy = int(1.3 * size)
    with packed(model, gpu_budget=roomy) as handle:
        assert_equal(run(model), expected)
        assert any(unit.place is None for unit in handle.units)
        for budget in (None, roomy, int(0.8 * size), None):
            model.model.layers[0].mlp.up_proj.weight.data *= 2
            expected = expected_now(model)
            handle.replan(gpu_budget=budget)
            assert_packed(handle)
            assert_equal(run(model), expected)
            assert_equal(run(model), expected)
            streamed = sum(p.nbytes for p in streamed_parameters(handle).values())
            assert handle.stats.host_bytes <= 0.75 * streamed + 4096 * len(handle.units)
    assert_equal(run(model), expected)


def test_offload_that_fails_while_packing_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = expect.snapshot(model)
    calls = []
    plain = torch_offload.installation.packed_class_of

    def failing(kind: type) -> type:
        calls.append(kind)
        if len(calls) > 9:
            raise MemoryError("no room")
        return plain(kind)

    monkeypatch.setattr(torch_offload.installation, "packed_class_of", failing)
    with pytest.raises(MemoryError, match="no room"), packed(model):
        pass
    expect.assert_unchanged(model, before, same_memory=False)


def fails_to_pack(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While what is returned holds True, there is no room to pack a master."""
    fails = [False]
    plain = torch_offload.installation.packed_class_of

    def failing(kind: type) -> type:
        if fails[0]:
            raise MemoryError("no room")
        return plain(kind)

    monkeypatch.setattr(torch_offload.installation, "packed_class_of", failing)
    return fails


@pytest.mark.parametrize("transport", ["packed", "packed_resident"])
def test_pack_that_fails_at_an_edit_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    model = llama()
    fails = fails_to_pack(monkeypatch)
    with packed(model, transport=transport) as handle:
        run(model)
        model.model.layers[1].mlp.up_proj.weight.data *= 2
        expected = expected_now(model)
        fails[0] = True
        for _ in range(2):
            with pytest.raises(MemoryError, match="no room"):
                run(model)
        fails[0] = False
        assert_equal(run(model), expected)
        assert_packed(handle)
    assert_equal(run(model), expected)


@pytest.mark.parametrize("transport", ["packed", "packed_resident"])
def test_replan_that_cannot_pack_fails_and_a_later_forward_packs(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    model = llama()
    fails = fails_to_pack(monkeypatch)
    with packed(model, transport=transport) as handle:
        run(model)
        model.model.layers[1].mlp.up_proj.weight.data += 0.5
        expected = expected_now(model)
        fails[0] = True
        with pytest.raises(MemoryError, match="no room"):
            handle.replan(gpu_budget=None)
        with pytest.raises(MemoryError, match="no room"):
            run(model)
        fails[0] = False
        assert_equal(run(model), expected)
        assert_packed(handle)
        assert {unit.transport for unit in handle.units if unit.place} == {transport}
    assert_equal(run(model), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("phase", ["replan", "remove"])
def test_operator_that_fails_comes_out_as_itself(phase: str, error: type[BaseException]) -> None:
    """For every k: what undoes the rest calls Python while the error is on its way."""
    for k in itertools.count(1):
        failure = Operator(error, k)
        Trial(Case(transport="packed", masters="packed"), phase, failure).run()
        if not failure.struck:
            break
    assert k > 20


class FailingForGood(FailingOperator):
    """The k-th operator fails, and all that come after it."""

    def count(self, name: str) -> None:
        self._left = 1 if self.failed else self._left
        super().count(name)


def test_replan_that_cannot_pack_again_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    model = llama()
    roomy = int(1.3 * sum(parameter.nbytes for parameter in model.parameters()))
    with packed(model) as handle:
        run(model)
        model.model.layers[1].mlp.up_proj.weight.data *= 2
        expected = expected_now(model)
        # Behind those that count what the edited unit takes.
        with pytest.raises(RuntimeError, match="planted failure"), FailingForGood(15, RuntimeError):
            handle.replan(gpu_budget=roomy)
        assert "they could not be packed again: RuntimeError: planted" in capfd.readouterr().err
        assert_equal(run(model), expected)
        assert_packed(handle)
    assert_equal(run(model), expected)


def test_remove_gives_the_plain_model_back() -> None:
    model = llama()
    before = expect.snapshot(model)
    with packed(model, granularity="module"):
        run(model)
        run(model)
        model.model.layers[1].mlp.up_proj.weight.detach()  # unpacked
    expect.assert_unchanged(model, before, same_memory=False)
    for parameter in model.parameters():
        assert type(parameter) is nn.Parameter
        assert vars(parameter) == {}
        assert not parameter.is_pinned()
    with packed(model) as handle:
        assert_packed(handle)


def test_del_frees_everything_and_a_kept_weight_outlives_the_model() -> None:
    model = llama()
    values = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    options: dict[str, Any] = {"transport": "packed", "masters": "packed"}
    handle = offload(model, HOST, **options)
    run(model)
    kept = model.model.layers[1].mlp.up_proj.weight
    references = [
        weakref.ref(model),
        weakref.ref(handle._engine),
        weakref.ref(model.model.layers[0].mlp.up_proj.weight),
    ]
    gc.collect()
    gc.disable()
    try:
        del model, handle
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
    assert torch.equal(kept.detach(), values)
    assert type(kept) is nn.Parameter


def test_interpreter_exit_is_clean() -> None:
    script = """
import sys, torch
from tests.python.dropin import tiny_llama, tokens
from torch_offload import offload
model = tiny_llama(hidden_size=256, intermediate_size=512).bfloat16().requires_grad_(False)
handle = offload(model, "cpu", transport="packed", masters="packed")
model(tokens(torch.device("cpu")))
sys.modules["kept"] = [model, model.model.layers[0].mlp.up_proj.weight]
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- with checkpoints, caches, options -----------------------------------------------------------


def test_from_pretrained_packs_the_files_and_keeps_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    expected = run(load_plain(AutoModelForCausalLM, tmp_path, HOST, **options))
    for _ in range(2):
        model = load(
            AutoModelForCausalLM,
            tmp_path,
            HOST,
            transport="packed",
            masters="packed",
            packed_cache=True,
            **options,
        )
        handle = torch_offload.handle_of(model)
        assert handle is not None
        assert_packed(handle)
        assert sum(unit.bytes_in_files for unit in handle.units) == 0
        assert_equal(run(model), expected)
    handle.remove()
    assert_equal(run(model), expected)
    twin = llama()
    expected = run(twin)  # whose buffers are bf16
    handle = torch_offload.offload_from_checkpoint(
        twin, tmp_path, HOST, transport="packed", masters="packed"
    )
    assert_packed(handle)
    assert_equal(run(twin), expected)


def test_cache_serves_packed_masters_and_plain_ones(tmp_path: Path) -> None:
    model = llama()
    expected = run(model)
    for masters in ("packed", "plain", "packed"):
        with offload(
            model, HOST, transport="packed", masters=masters, packed_cache=tmp_path
        ) as handle:
            assert_equal(run(model), expected)
            model.model.layers[0].mlp.up_proj.weight.detach()
            handle.replan(gpu_budget=None)
            assert_equal(run(model), expected)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    with offload(model, HOST, transport="packed", masters="packed", packed_cache=tmp_path):
        pass
    assert file.read_bytes() == before


def test_packed_masters_without_packed_transport_fails() -> None:
    with pytest.raises(ValueError, match=r"transport='packed', masters='packed'") as caught:
        offload(llama(), HOST, masters="packed")
    assert "'packed', 'packed_resident' or 'auto' with masters='packed'" in str(caught.value)
    with pytest.raises(ValueError, match="'plain', 'packed'"):
        offload(llama(), HOST, transport="packed", masters="zip")  # type: ignore[arg-type]


@pytest.mark.parametrize("transport", ["packed", "packed_resident", "auto"])
def test_packed_masters_without_kernels_fail_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch, transport: Any
) -> None:
    monkeypatch.setattr(_C, "has_kernels", False)
    config = Config(transport=transport, masters="packed")
    with pytest.raises(NotImplementedError, match=rf"'{transport}' with masters='packed'"):
        packing_for(config, torch.device("cuda", 0))


@pytest.mark.parametrize("masters", ["plain", "packed"])
def test_model_that_dies_behind_a_device_that_fails_for_good_ends_no_process(
    masters: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """As CUDA does behind a kernel that has died: every call of it fails from then on."""
    failure = _C.DeviceFailure("runtime")
    model = llama()
    with devices_made_by(lambda device: _C.failing_device(device, failure)):
        handle = offload(model, HOST, transport="packed", masters=masters)
    run(model)
    failure.is_sticky = True
    failure.calls_until_failure = 1
    del model, handle
    gc.collect()
    assert failure.failed_call
    assert "could not drain" in capfd.readouterr().err
