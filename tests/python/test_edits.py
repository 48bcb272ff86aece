"""Weights that change between two forwards: every edit is seen by the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import (
    Stack,
    assert_streams_like_plain,
    plain_on,
    rows,
    streamed,
    tiny_llama,
    tiny_stack,
    tokens,
)

# In a window with room for every unit nothing is copied twice, so that each edit of a unit must
# show as one copy of that unit.
_ROOMY = {"depth": "1GiB"}
_UNIT = "blocks.2.mlp"


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.blocks[2].mlp.up.weight.mul_(1.5)


def _by_data(model: Any) -> None:
    model.blocks[2].mlp.up.weight.data += 0.25


def _by_data_replaced(model: Any) -> None:
    weight = model.blocks[2].mlp.up.weight
    weight.data = weight.data.flip(0).contiguous()


def _replaced_parameter(model: Any) -> None:
    old = model.blocks[2].mlp.up.weight
    model.blocks[2].mlp.up.weight = nn.Parameter(old.detach().clone() * 0.5)


def _replaced_parameter_of_other_strides(model: Any) -> None:
    old = model.blocks[2].mlp.up.weight
    model.blocks[2].mlp.up.weight = nn.Parameter((old.detach() * 0.5).t().contiguous().t())


def _by_numpy(model: Any) -> None:
    with torch.no_grad():
        array = model.blocks[2].mlp.up.weight.detach().cpu().numpy()
        array *= 0.75  # on the CPU this is the weight's own memory


def _by_storage(model: Any) -> None:
    weight = model.blocks[2].mlp.up.weight
    alias = torch.empty(0, device=weight.device).set_(weight.untyped_storage())
    begin = weight.storage_offset()
    alias[begin : begin + weight.numel()] *= 2.0


def _by_load(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["blocks.2.mlp.up.weight"] += 1.0
    model.load_state_dict({"blocks.2.mlp.up.weight": state["blocks.2.mlp.up.weight"]}, strict=False)


def _by_init(model: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    values = torch.randn(32, 16, generator=generator)
    nn.init.zeros_(model.blocks[2].mlp.up.weight)
    with torch.no_grad():
        model.blocks[2].mlp.up.weight.copy_(values)


_EDITS = [
    _in_place,
    _by_data,
    _by_data_replaced,
    _replaced_parameter,
    _replaced_parameter_of_other_strides,
    _by_storage,
    _by_load,
    _by_init,
]


@pytest.mark.parametrize("edit", _EDITS)
@pytest.mark.parametrize("mode", ["sync", "events", "pipeline"])
@pytest.mark.parametrize("options", [_ROOMY, {"depth": 0}], ids=["roomy", "tight"])
def test_edit_between_forwards_is_seen(
    device: torch.device, edit: Callable[[Any], None], mode: str, options: dict[str, Any]
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, mode=mode, **options) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)
        for _ in range(2):
            edit(model)
            edit(plain)
            # Exactly the edited unit is copied once more than the places ask for.
            how = "replaced" if "replaced" in edit.__name__ else "stale"
            assert_streams_like_plain(model, plain, handle, lambda m: m(x), **{how: (_UNIT,)})
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.cpu()), name


def test_edit_of_the_prefetched_first_unit_is_seen(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)
        assert handle._engine.is_whole(0)  # copied ahead, for the next forward
        model.blocks[0].attn.weight.data += 1.0
        plain.blocks[0].attn.weight.data += 1.0
        with expect.watch(handle, stale=("blocks.0.attn",)) as calls, torch.no_grad():
            assert torch.equal(model(x), plain(x))
        assert calls.passes[0].misses == 1
        assert calls.passes[0].onloads == calls.expected[0].onloads == len(handle.units) + 1


def test_replaced_parameter_former_object_keeps_its_values(device: torch.device) -> None:
    model = tiny_stack()
    x = rows(device)
    with streamed(model, device, **_ROOMY), torch.no_grad():
        model(x)
        old = model.blocks[1].attn.weight
        values = old.clone()
        new = nn.Parameter(torch.full_like(old, 0.5))
        model.blocks[1].attn.weight = new
        model(x)
        assert torch.equal(old, values)
        assert model.blocks[1].attn.weight is new
        assert torch.equal(new, torch.full_like(values, 0.5))
    assert model.blocks[1].attn.weight is new


class _Wrapper(torch.Tensor):
    """A wrapper subclass, as DTensor is: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0])
        raise NotImplementedError(str(func))


@pytest.mark.parametrize(
    "replacement",
    [
        pytest.param(lambda old: nn.Parameter(torch.zeros(3, 3)), id="shape"),
        pytest.param(lambda old: nn.Parameter(old.detach().double()), id="dtype"),
        pytest.param(lambda old: nn.Parameter(_Wrapper(old.detach())), id="subclass"),
    ],
)
def test_replaced_parameter_of_another_kind_fails(
    device: torch.device, replacement: Callable[[torch.Tensor], nn.Parameter]
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle, torch.no_grad():
        model(x)
        old = model.blocks[1].attn.weight
        model.blocks[1].attn.weight = replacement(old)
        with pytest.raises(torch_offload.StateError, match=r"blocks\.1\.attn\.weight"):
            model(x)
        model.blocks[1].attn.weight = old
        expect.assert_at_rest(handle)
        assert torch.equal(model(x), plain(x))


def test_replacement_beside_one_that_fails_is_seen_by_the_next_forward(
    device: torch.device,
) -> None:
    """Seen by the object alone: neither counters of versions nor samples of bytes tell of it."""
    model = tiny_stack(width=32)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))  # all of version 0
    plain = plain_on(model, device)
    x = rows(device, width=32)
    mlp = model.blocks[2].mlp
    with streamed(model, device, **_ROOMY) as handle:
        with torch.inference_mode():
            for _ in range(2):
                model(x)
        change = torch.zeros(mlp.up.weight.shape)
        change[2, :4] = 5.0  # no line of these is sampled
        former_bias = mlp.down.bias
        mlp.up.weight = nn.Parameter(mlp.up.weight.detach() + change)
        mlp.down.bias = nn.Parameter(torch.zeros(3))
        with torch.inference_mode():
            with pytest.raises(torch_offload.StateError, match=r"of shape \(32\)"):
                model(x)
            mlp.down.bias = former_bias
            with torch.no_grad():
                plain.blocks[2].mlp.up.weight += change.to(device)
            assert torch.equal(model(x), plain(x))
            assert handle.stats.misses > 0


@pytest.mark.parametrize("size_bytes", [0, 64])
def test_weight_whose_memory_was_freed_fails(device: torch.device, size_bytes: int) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle, torch.no_grad():
        model(x)
        weight = model.blocks[1].attn.weight
        values = weight.clone()
        weight.data = weight.data.clone()
        weight.untyped_storage().resize_(size_bytes)
        for call in (lambda: model(x), lambda: handle.replan(gpu_budget=None)):
            with pytest.raises(
                torch_offload.StateError, match=r"blocks\.1\.attn\.weight.* whose memory was freed"
            ):
                call()
        weight.data = values
        assert torch.equal(model(x), plain(x))
        expect.assert_at_rest(handle)


def test_parameter_taken_away_fails(device: torch.device) -> None:
    model = tiny_stack()
    x = rows(device)
    with streamed(model, device), torch.no_grad():
        old = model.blocks[1].attn.weight
        del model.blocks[1].attn.weight
        with pytest.raises(torch_offload.StateError, match=r"blocks\.1\.attn\.weight"):
            model(x)
        model.blocks[1].attn.register_parameter("weight", old)
        model(x)


def test_refresh_shows_an_edit_of_few_elements_by_numpy(device: torch.device) -> None:
    # Wide enough that the second row lies in none of the sampled lines.
    model = tiny_stack(width=64)
    plain = plain_on(model, device)
    x = rows(device, width=64)
    with streamed(model, device, **_ROOMY) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        weight = model.blocks[2].mlp.up.weight
        weight.detach().numpy()[1, 1:3] += 1.0
        plain.blocks[2].mlp.up.weight[1, 1:3] += 1.0
        handle.refresh()
        everything = [unit.name for unit in handle.units if unit.place]
        with expect.watch(handle, stale=everything) as calls:
            assert torch.equal(model(x), plain(x))
        expect.assert_streams_exactly(calls, exact_passes=1)
        assert calls.passes[0].onloads >= len(handle.units)


def test_edit_of_all_elements_by_numpy_is_seen(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, **_ROOMY) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        model.blocks[2].mlp.up.weight.detach().numpy()[...] *= 0.5
        plain.blocks[2].mlp.up.weight *= 0.5
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), stale=(_UNIT,))


@pytest.mark.parametrize("fused", [False, True])
def test_adam_step_between_forwards_is_seen(device: torch.device, fused: bool) -> None:
    model = tiny_stack()
    plain = plain_on(model, torch.device("cpu"))  # where the masters are stepped
    x = rows(device)
    with streamed(model, device, **_ROOMY) as handle:
        assert_streams_like_plain(model, plain_on(plain, device), handle, lambda m: m(x))
        names = [name for unit in handle.units for name in unit.parameters]
        steppers = []
        for one in (model, plain):
            parameters = [one.get_parameter(name) for name in names]
            for index, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            steppers.append(torch.optim.Adam(parameters, lr=0.1, fused=fused))
        everything = tuple(unit.name for unit in handle.units if unit.place)
        for _ in range(2):
            for stepper in steppers:
                stepper.step()
            must = plain_on(plain, device)
            assert_streams_like_plain(model, must, handle, lambda m: m(x), stale=everything)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_between_forwards_is_seen(device: torch.device, assign: bool) -> None:
    model = tiny_llama()
    ids = tokens(device)
    with streamed(model, device, **_ROOMY) as handle:
        assert_streams_like_plain(
            model, plain_on_reloaded(model, device), handle, lambda m: m(ids).logits
        )
        state = {
            name: (value * 0.5 + 0.01).to(value.device)
            for name, value in model.state_dict().items()
        }
        model.load_state_dict(state, assign=assign)
        plain = tiny_llama()
        plain.load_state_dict(state)
        plain = plain_on(plain, device)
        everything = tuple(unit.name for unit in handle.units if unit.place)
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids).logits, stale=everything)


def plain_on_reloaded(model: nn.Module, device: torch.device) -> Any:
    """A plain twin of an offloaded Llama, made through its state dict."""
    plain = tiny_llama()
    plain.load_state_dict(model.state_dict())
    return plain_on(plain, device)


def test_functional_call_uses_its_own_weights_and_restores(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device) as handle, torch.no_grad():
        other = {"blocks.2.mlp.up.weight": torch.full((32, 16), 0.125)}
        must = torch.func.functional_call(plain, {k: v.to(device) for k, v in other.items()}, (x,))
        assert torch.equal(torch.func.functional_call(model, other, (x,)), must)
        expect.assert_at_rest(handle)
        assert torch.equal(model(x), plain(x))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_merge_and_unmerge_between_forwards_are_seen(device: torch.device) -> None:
    peft = pytest.importorskip("peft")

    def with_adapter() -> Any:
        torch.manual_seed(21)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        return peft.get_peft_model(tiny_llama(), config).eval()

    model, plain = with_adapter(), with_adapter()
    plain = torch_offload.align(plain).to(device)
    ids = tokens(device)
    with streamed(torch_offload.align(model), device, **_ROOMY) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(ids).logits)
        everything = tuple(unit.name for unit in handle.units if unit.place)
        for step in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
            # Merged where the weights are: the host's arithmetic, not the device's.
            for one in (model, plain.cpu()):
                getattr(one, step)()
            plain.to(device)
            if device.type == "cpu":
                assert_streams_like_plain(
                    model, plain, handle, lambda m: m(ids).logits, stale=everything
                )
            else:
                state = {name: value.cpu() for name, value in plain.state_dict().items()}
                for name, value in model.state_dict().items():
                    assert torch.allclose(value.cpu(), state[name], atol=1e-6), name
                before = handle.stats.onloads
                with torch.no_grad():
                    got, must = model(ids).logits, plain(ids).logits
                assert torch.allclose(got, must, atol=1e-4)
                assert handle.stats.onloads > before


def test_adapter_added_after_offload_runs(device: torch.device) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)

    def add(one: Stack) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            extra = nn.Linear(16, 16).to(device)
        one.blocks[1].mlp.add_module("extra", extra)
        one.blocks[1].mlp.register_forward_hook(lambda m, args, out: out + m.extra(args[0]))

    with streamed(model, device) as handle:
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        add(model)
        add(plain)
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
