"""Weights that a forward edits, returns, shows to hooks, or reads outside their module's call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    IDLE_WARNING,
    Stack,
    assert_equal,
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_stack,
)
from tests.python.streamed_master_guard import StreamedMasterGuard
from torch_offload import StateError
from torch_offload.selfcheck.subjects import Block, Mlp


class _EditsItself(nn.Module):
    """An EMA code book, or RWKV: a forward that writes into its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.how: Callable[[nn.Module], None] = lambda module: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.up(x))
        self.how(self)
        return x


def _in_place(module: Any) -> None:
    module.up.weight.mul_(0.5)


def _by_data(module: Any) -> None:
    module.up.weight.data = module.up.weight.data * 0.5


@pytest.mark.parametrize("edit", [_in_place, _by_data])
def test_forward_that_edits_its_own_weight_raises(
    device: torch.device, edit: Callable[[Any], None]
) -> None:
    model: Any = nn.Sequential(nn.Linear(16, 16), *(_EditsItself() for _ in range(3)))
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, units=["1", "2", "3"]) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model[2].how = edit
        with pytest.raises(StateError, match=r"resident=\['2\.up\.weight'\]"):
            model(x)
        expect.assert_at_rest(handle)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), f"{name} was changed"
        model[2].how = lambda module: None
        assert torch.equal(model(x), plain(x))
    with streamed(model, device, units=["1", "2", "3"], resident=["2.up.weight"]):
        model[2].how = plain[2].how = edit
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(x), plain(x))


def _past_all_counters(module: Any) -> None:
    module.up.weight.data.mul_(0.5)


@pytest.mark.parametrize("options", [{}, {"depth": "1GiB"}, {"debug": True}], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_forward_that_edits_its_own_weight_past_all_counters_raises(
    device: torch.device, options: dict[str, Any], fails: bool
) -> None:
    if device.type != "cpu" and "debug" not in options:
        pytest.skip("the host would have to wait: only debug=True finds it")
    model: Any = nn.Sequential(nn.Linear(16, 16), *(_EditsItself() for _ in range(3)))
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = rows(device)

    def edits_and_fails(module: Any) -> None:
        _past_all_counters(module)
        raise ValueError("planted")

    with streamed(model, device, units=["1", "2", "3"], **options) as handle, torch.no_grad():
        assert torch.equal(model(x), plain(x))
        model[2].how = edits_and_fails if fails else _past_all_counters
        kind, words = (
            (ValueError, "planted") if fails else (StateError, r"resident=\['2\.up\.weight'\]")
        )
        with pytest.raises(kind, match=words):
            model(x)
        model[2].how = lambda module: None
        expect.assert_at_rest(handle)
        for _ in range(2):
            assert torch.equal(model(x), plain(x))


class _Stashes(Mlp):
    """Keeps a view of its weight, which the block reads after the call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stash = self.down.weight.t()
        return super().forward(x)


@dataclass
class _Output:
    x: torch.Tensor
    row: torch.Tensor


class _ReturnsAnObject(Mlp):
    """Returns a view of its weight in an object that nobody else can look into."""

    def forward(self, x: torch.Tensor) -> Any:
        return _Output(super().forward(x), self.down.weight[:, 0])


class _ReadsView(Block):
    def __init__(self, mlp: type[Mlp], width: int = 16) -> None:
        super().__init__(width)
        self.mlp = mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: Any = self.mlp(x)
        if isinstance(output, _Output):
            return self.attn(output.x) + output.row
        return self.attn(output) + self.mlp.stash.sum(0)  # type: ignore[operator]


@pytest.mark.parametrize("kind", [_Stashes, _ReturnsAnObject])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_view_that_outlives_its_unit_raises(
    device: torch.device, kind: type[Mlp], context: Callable[[], Any]
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 16), *(_ReadsView(kind) for _ in range(3))).eval()
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle, context():
        with pytest.raises(StateError, match=r"view.*resident=\['1\.mlp\.down\.weight'\]"):
            model(x)
        expect.assert_at_rest(handle)
    cure = ["*.mlp.down.weight"]
    with streamed(model, device, resident=cure) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))


def test_view_that_a_hook_keeps_raises_and_a_cycle_does_not(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    kept: list[torch.Tensor] = []

    def keeps(module: Any, args: Any) -> None:
        kept.append(module.weight.data)

    def makes_a_cycle(module: Any, args: Any) -> None:
        cycle: list[Any] = [module.weight.detach()]
        cycle.append(cycle)

    with streamed(model, device) as handle, torch.no_grad():
        hook = model.blocks[2].attn.register_forward_pre_hook(keeps)
        with pytest.raises(StateError, match=r"by a hook.*'blocks\.2\.attn\.weight'"):
            model(x)
        hook.remove()
        kept.clear()
        hook = model.blocks[2].attn.register_forward_pre_hook(makes_a_cycle)
        assert torch.equal(model(x), plain(x))
        hook.remove()
        expect.assert_at_rest(handle)
        assert torch.equal(model(x), plain(x))


def test_user_hooks_see_weights_on_the_device(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    sums: list[torch.Tensor] = []
    with streamed(model, device) as handle, torch.no_grad():
        begin, end = handle._engine.window

        def hook(module: Any, args: Any, output: Any = None) -> None:
            assert begin <= module.weight.data_ptr() < end
            sums.append(module.weight.sum())

        model.blocks[2].attn.register_forward_pre_hook(hook)
        model.blocks[2].attn.register_forward_hook(hook)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        assert len(sums) == 4
        assert all(torch.equal(one, plain.blocks[2].attn.weight.sum()) for one in sums)


class _ReadsOutside(Stack):
    """gemma3n, gpt_neox_japanese: a weight is read by another module than its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.blocks[1].mlp.down.weight.sum(1)


class _CallsForward(Stack):
    """SqueezeBERT: ``layer.forward(...)`` instead of a call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block.mlp.forward(x)  # type: ignore[operator]
        return x


@pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")
@pytest.mark.parametrize("kind", [_ReadsOutside, _CallsForward])
def test_weight_read_outside_its_call_is_never_silent(
    device: torch.device, kind: type[Stack], master_guard: StreamedMasterGuard
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        model = kind()
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = rows(device)
    with torch.no_grad():
        with streamed(model, device) as handle:
            if device.type == "cpu":
                with master_guard.expect_reads() as reads, pytest.raises(AssertionError):
                    model(x)
                assert len(reads) == 1
            else:
                with pytest.raises(RuntimeError, match=r"resident=\["):
                    model(x)
            expect.assert_at_rest(handle)
        cure = ["blocks.1.mlp.down.weight"] if kind is _ReadsOutside else ["blocks.*.mlp"]
        with streamed(model, device, resident=cure) as handle:
            run = (lambda m: m(x)) if kind is _ReadsOutside else (lambda m: m.blocks[0].attn(m(x)))
            assert_streams_like_plain(model, plain, handle, run)


_RECOMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm-hook": nn.utils.weight_norm,
    "spectral_norm-hook": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("what", _RECOMPUTED)
@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
def test_weight_that_is_computed_anew_at_each_use_equals_plain(
    device: torch.device, what: str, granularity: str
) -> None:
    def make() -> Stack:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = Stack()
            for block in model.blocks:
                _RECOMPUTED[what](block.attn)
                _RECOMPUTED[what](block.mlp.up)
        return torch_offload.align(model.train())

    model, plain = make(), make().to(device)
    x = rows(device)
    with streamed(model, device, granularity=granularity) as handle, torch.no_grad():
        # In training mode a spectral norm changes its buffers, in both models alike.
        for forwards in range(1, 5):
            assert torch.equal(model(x), plain(x))
            assert handle.stats.onloads >= forwards * len(model.blocks)


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:torch_offload. this forward runs in grad mode:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_fast_path_of_encoder_layers_equals_plain(
    device: torch.device, granularity: str, grad: bool
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model = nn.TransformerEncoder(layer, num_layers=5).eval()
    torch_offload.align(model)
    plain = plain_on(model, device)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).to(device)
    is_padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2], device=device)
    with streamed(model, device, granularity=granularity) as handle, torch.set_grad_enabled(grad):
        must = plain(x, src_key_padding_mask=is_padding)
        with expect.watch(handle) as calls:
            for _ in range(3):
                assert_equal(model(x, src_key_padding_mask=is_padding), must)
        expect.assert_streams_exactly(calls)
        assert [unit.name for unit in handle.units] == [f"layers.{index}" for index in range(5)]
