"""Budgets of every kind, and plans that change between forwards."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import Stack, planned_bytes, tiny_llama
from tests.python.fake_memory import FakeMemory
from torch_offload import _C
from torch_offload.adapting import tokens_in
from torch_offload.choice import choose
from torch_offload.config import Config
from torch_offload.offload import offload_with

MIB = 2**20
HOST = torch.device("cpu")


def blocks_of(num_blocks: int = 8, width: int = 64) -> Stack:
    torch.manual_seed(3)
    model = Stack(num_blocks, width).eval()
    torch_offload.align(model)
    return model


def rows(batch: int = 2, tokens: int = 3, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + tokens)
    return torch.randn(batch, tokens, width, generator=generator)


def auto(model: nn.Module, memory: FakeMemory, **options: Any) -> torch_offload.Handle:
    config = Config(**({"gpu_budget": "auto", "headroom": 0} | options))
    handle = offload_with(model, HOST, config, memory)
    memory.weights = lambda: handle.stats.bytes_resident + handle.stats.window_bytes
    return handle


def on_device(handle: torch_offload.Handle) -> int:
    return handle.stats.bytes_resident + handle.stats.window_bytes


class TestReplan:
    """What `handle.replan` moves."""

    @torch.no_grad()
    def test_replan_between_forwards_keeps_the_bits_and_the_budget(self) -> None:
        model = blocks_of()
        x = rows()
        before = expect.snapshot(model)
        must = model(x)
        whole = planned_bytes(model)
        with torch_offload.offload(model, HOST, gpu_budget=None) as handle:
            parameters = list(model.parameters())
            for share in (0.9, 0.4, 0.6, 0.3, 1.1, 0.5):
                handle.replan(gpu_budget=int(share * whole) + 1)
                assert on_device(handle) <= int(share * whole) + 1
                assert handle.config.gpu_budget == int(share * whole) + 1
                copied = handle.stats.bytes_onloaded
                for _ in range(2):
                    assert torch.equal(model(x), must)
                streamed = [unit for unit in handle.units if unit.place is not None]
                assert (share > 1) == (not streamed)
                assert (handle.stats.bytes_onloaded > copied) == bool(streamed)
                expect.assert_at_rest(handle)
            handle.replan(gpu_budget=None)
            assert all(unit.place is not None for unit in handle.units)
            assert torch.equal(model(x), must)
            assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
        expect.assert_unchanged(model, before, same_memory=False)
        assert torch.equal(model(x), must)

    @torch.no_grad()
    def test_replan_that_changes_little_moves_only_what_changes(self) -> None:
        model = blocks_of()
        whole = planned_bytes(model)
        with torch_offload.offload(model, HOST, gpu_budget=int(0.5 * whole)) as handle:
            model(rows())
            homes = {u.name: u.place is None for u in handle.units}
            addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
            handle.replan(gpu_budget=int(0.6 * whole))
            for unit in handle.units:
                same = all(
                    model.get_parameter(name).data_ptr() == addresses[name]
                    for name in unit.parameters
                )
                assert same == (homes[unit.name] == (unit.place is None)), unit.name

    @pytest.mark.parametrize("transport", ["raw", "auto", "packed"])
    @torch.no_grad()
    def test_resident_weight_of_other_strides_streams_as_it_is(self, transport: Any) -> None:
        model, plain = blocks_of().bfloat16(), blocks_of().bfloat16()
        x = rows().bfloat16()
        roomy = 2 * planned_bytes(model)
        with torch_offload.offload(model, HOST, gpu_budget=roomy, transport=transport) as handle:
            for one in (model, plain):
                mlp, attn = one.blocks[1].mlp, one.blocks[2].attn
                mlp.up.weight.data = mlp.up.weight.data.t().contiguous().t()
                attn.weight = nn.Parameter((attn.weight * 2).t().contiguous().t())
            assert torch.equal(model(x), plain(x))
            handle.replan(gpu_budget=None)
            assert torch.equal(model(x), plain(x))
            expect.assert_at_rest(handle)
        for name, value in plain.named_parameters():
            assert torch.equal(model.get_parameter(name), value), name
            assert model.get_parameter(name).stride() == value.stride(), name

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda data: data.half(), id="same size"),
            pytest.param(lambda data: data.double(), id="larger"),
            pytest.param(lambda data: data[:9].clone(), id="shape"),
        ],
    )
    @pytest.mark.parametrize("masters", ["plain", "packed"])
    @torch.no_grad()
    def test_resident_weight_of_another_kind_is_refused_by_name_and_stays(
        self, change: Callable[[torch.Tensor], torch.Tensor], masters: Any
    ) -> None:
        model = blocks_of().bfloat16()
        x = rows().bfloat16()
        must = model(x)
        roomy = 16 * planned_bytes(model)
        transport: Any = "raw" if masters == "plain" else "packed"
        with torch_offload.offload(
            model, HOST, gpu_budget=roomy, transport=transport, masters=masters
        ) as handle:
            weight = model.blocks[1].mlp.up.weight
            former = weight.data
            weight.data = given = change(former)
            with pytest.raises(torch_offload.StateError, match=r"'blocks\.1\.mlp\.up\.weight'"):
                handle.replan(gpu_budget=None)
            handle.replan(gpu_budget=roomy + 1)  # what stays where it is may be of any kind
            assert all(unit.place is None for unit in handle.units)
            assert weight.data_ptr() == given.data_ptr()
            assert (weight.dtype, weight.shape) == (given.dtype, given.shape)
            weight.data = former
            handle.replan(gpu_budget=None)
            assert all(unit.place is not None for unit in handle.units)
            assert torch.equal(model(x), must)
        assert torch.equal(model(x), must)

    @torch.no_grad()
    def test_streamed_weight_of_another_size_is_refused_by_name(self) -> None:
        model = blocks_of()
        with torch_offload.offload(model, HOST, gpu_budget=None) as handle:
            weight = model.blocks[1].mlp.up.weight
            former = weight.data
            weight.data = former.double()
            with pytest.raises(torch_offload.StateError, match=r"'blocks\.1\.mlp\.up\.weight'"):
                handle.replan(gpu_budget=None)
            weight.data = former
            handle.replan(gpu_budget=None)

    @torch.no_grad()
    def test_edits_at_rest_survive_a_replan(self) -> None:
        model = blocks_of()
        x = rows()
        whole = planned_bytes(model)
        with torch_offload.offload(model, HOST, gpu_budget=None) as handle:
            model(x)
            model.blocks[1].mlp.up.weight.data += 1.0
            model.blocks[2].attn.weight = nn.Parameter(torch.ones(64, 64))
            must = {k: v.clone() for k, v in model.state_dict().items()}
            handle.replan(gpu_budget=whole)
            streamed_again = model(x)
            handle.replan(gpu_budget=None)
            assert torch.equal(model(x), streamed_again)
            for name, value in model.state_dict().items():
                assert torch.equal(value, must[name]), name
            plain = blocks_of()
            plain.load_state_dict(must)
            assert torch.equal(torch_offload.align(plain)(x), streamed_again)

    @torch.no_grad()
    def test_window_for_which_there_is_no_room_leaves_all_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = blocks_of()
        x = rows()
        must = model(x)
        whole = planned_bytes(model)
        with torch_offload.offload(model, HOST, gpu_budget=int(0.5 * whole)) as handle:
            model(x)
            before = handle.units

            def fail(*_: Any) -> int:
                raise torch.OutOfMemoryError("planted")

            with monkeypatch.context() as patch:
                patch.setattr(handle._installed, "_engine", _FailingEngine(handle, fail))
                with pytest.raises(torch.OutOfMemoryError, match="planted"):
                    handle.replan(gpu_budget=whole)
            assert [u.place for u in handle.units] == [u.place for u in before]
            assert torch.equal(model(x), must)
            expect.assert_at_rest(handle)

    def test_replan_during_a_forward_or_after_remove_fails(self) -> None:
        model = blocks_of()
        handle = torch_offload.offload(model, HOST, gpu_budget=None)
        caught: list[BaseException] = []

        class Meddler(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                try:
                    handle.replan(gpu_budget="1GiB")
                except torch_offload.StateError as error:
                    caught.append(error)
                return x

        model.blocks[0].attn.register_forward_hook(lambda *_: Meddler()(torch.zeros(1)) and None)
        with torch.no_grad():
            model(rows())
        assert "while one is running" in str(caught[0])
        handle.remove()
        with pytest.raises(torch_offload.StateError, match=r"after remove\(\); call offload"):
            handle.replan(gpu_budget=None)

    def test_budget_below_the_least_fails_and_changes_nothing(self) -> None:
        model = blocks_of()
        with torch_offload.offload(model, HOST, gpu_budget=None) as handle:
            with pytest.raises(ValueError, match=r"gpu_budget of at least (\d+) bytes") as caught:
                handle.replan(gpu_budget=10)
            assert handle.config.gpu_budget is None
            least = re.search(r"at least (\d+) bytes", str(caught.value))
            assert least is not None
            handle.replan(gpu_budget=int(least[1]))
            assert on_device(handle) <= int(least[1])
            with torch.no_grad():
                model(rows())

    @torch.no_grad()
    def test_model_and_handle_are_freed_without_a_collection_after_a_replan(self) -> None:
        model = blocks_of()
        handle = torch_offload.offload(model, HOST, gpu_budget=None)
        handle.replan(gpu_budget=planned_bytes(model) // 2)
        model(rows())
        gone = weakref.ref(model)
        gc.collect()
        gc.disable()
        try:
            del model, handle
            assert gone() is None
        finally:
            gc.enable()


class _FailingEngine:
    """The engine, whose next recut fails before it has changed anything."""

    def __init__(self, handle: torch_offload.Handle, fail: Any) -> None:
        self._engine = handle._engine
        self.recut = fail

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((2, 3), 6), ((2, 3, 64), 6), ((2, 4, 8, 16), 256), ((2, 4, 5, 8, 16), 1280), ((7,), 1)],
)
def test_tokens_of_a_call(shape: tuple[int, ...], tokens: int) -> None:
    assert tokens_in([None, torch.ones(1)], {"x": torch.empty(shape)}) == tokens


class TestAuto:
    """``gpu_budget="auto"`` with a device whose memory the test makes up."""

    @torch.no_grad()
    def test_units_become_resident_once_a_forward_has_shown_what_it_needs(self) -> None:
        model = blocks_of()
        x = rows()
        must = model(x)
        whole = planned_bytes(model)
        memory = FakeMemory(2 * whole)
        memory.activations = whole
        with auto(model, memory) as handle:
            assert all(unit.place is not None for unit in handle.units)
            assert torch.equal(model(x), must)
            assert 0.9 * whole <= on_device(handle) <= whole
            assert memory.resets == 1
            assert torch.equal(model(x), must)
            assert memory.resets == 1, "a class of forwards is measured once"

    @torch.no_grad()
    def test_memory_of_others_and_headroom_are_left_alone(self) -> None:
        model = blocks_of()
        whole = planned_bytes(model)
        memory = FakeMemory(2 * whole)
        memory.held_by_others = whole
        memory.activations = whole // 4
        with auto(model, memory, headroom=whole // 8) as handle:
            model(rows())
            assert on_device(handle) <= whole - whole // 4 - whole // 8
            assert on_device(handle) >= 0.5 * whole

    @torch.no_grad()
    def test_larger_shape_class_gets_room_before_it_runs(self) -> None:
        model = blocks_of()
        whole = planned_bytes(model)
        memory = FakeMemory(2 * whole)
        memory.activations = whole // 8
        with auto(model, memory) as handle:
            model(rows(1, 1))
            small = on_device(handle)
            assert small == pytest.approx(whole, rel=0.02), "all of it stays"
            seen: list[int] = []
            memory.activations = whole * 3 // 2
            hook = model.blocks[0].register_forward_pre_hook(
                lambda *_: seen.append(on_device(handle))
            )
            must_fit = rows(4, 4)
            model(must_fit)
            hook.remove()
            assert seen[0] < small, "expected more of the larger forward before it ran"
            assert on_device(handle) <= whole // 2 + 1

    @torch.no_grad()
    def test_larger_latents_are_a_class_of_their_own(self) -> None:
        model = blocks_of()
        memory = FakeMemory(2 * planned_bytes(model))
        with auto(model, memory):
            for height, measured in ((1, 1), (16, 2), (16, 2)):
                model(torch.ones(1, 4, height, 64))
                assert memory.resets == measured

    @torch.no_grad()
    def test_pressure_from_others_gives_units_back(self) -> None:
        model = blocks_of()
        whole = planned_bytes(model)
        memory = FakeMemory(2 * whole)
        with auto(model, memory) as handle:
            model(rows())
            assert on_device(handle) == pytest.approx(whole, rel=0.02)
            memory.held_by_others = whole * 3 // 2
            for _ in range(64):
                model(rows())
            assert on_device(handle) <= whole // 2

    def test_host_device_streams_every_unit(self) -> None:
        with torch_offload.offload(blocks_of(), HOST) as handle:
            assert handle.config.gpu_budget == "auto"
            assert all(unit.place is not None for unit in handle.units)

    def test_device_too_small_for_the_window_is_refused_with_the_least(self) -> None:
        model = blocks_of()
        with pytest.raises(ValueError, match="gpu_budget of at least"):
            auto(model, FakeMemory(100))

    def test_fraction_is_of_the_whole_device(self) -> None:
        model = blocks_of()
        whole = planned_bytes(model)
        with auto(model, FakeMemory(2 * whole), gpu_budget=0.25) as handle:
            assert 0.3 * whole < on_device(handle) <= 0.5 * whole
            handle.replan(gpu_budget=1.0)
            assert all(unit.place is None for unit in handle.units)

    @pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
    def test_fraction_that_cannot_be_fails(self, fraction: float) -> None:
        with pytest.raises(ValueError, match="a fraction above 0"):
            torch_offload.offload(blocks_of(), HOST, gpu_budget=fraction)

    def test_fraction_of_the_host_device_fails(self) -> None:
        with pytest.raises(ValueError, match="got the fraction 0"):
            torch_offload.offload(blocks_of(), HOST, gpu_budget=0.5)


class _RunsOut:
    """Raises device memory's end in the next calls of a module, as torch does."""

    def __init__(self, module: nn.Module, times: int = 1) -> None:
        self.times = times
        self.calls = 0
        module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.times > 0:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class TestOutOfMemory:
    """What `on_oom` does."""

    @torch.no_grad()
    def test_shrink_gives_back_residents_and_the_next_forward_is_right(self) -> None:
        model = blocks_of()
        x = rows()
        must = model(x)
        whole = planned_bytes(model)
        with torch_offload.offload(model, HOST, gpu_budget=int(0.8 * whole)) as handle:
            assert torch.equal(model(x), must)
            before = on_device(handle)
            runs_out = _RunsOut(model.blocks[3].mlp)
            with pytest.raises(
                torch.OutOfMemoryError, match=r"(?s)Tried to.*torch_offload: gave back"
            ):
                model(x)
            assert runs_out.calls == 1, "the failed forward is never repeated"
            assert on_device(handle) < before
            assert all(unit.place is not None for unit in handle.units)
            expect.assert_at_rest(handle)
            assert torch.equal(model(x), must)

    @torch.no_grad()
    def test_auto_learns_anew_after_it_ran_out(self) -> None:
        model = blocks_of()
        x = rows()
        whole = planned_bytes(model)
        memory = FakeMemory(2 * whole)
        with auto(model, memory) as handle:
            model(x)
            assert on_device(handle) == pytest.approx(whole, rel=0.02)
            _RunsOut(model.blocks[3].mlp)
            with pytest.raises(torch.OutOfMemoryError, match="gave back"):
                model(x)
            assert on_device(handle) < whole
            memory.activations = whole * 3 // 2
            model(x)
            assert on_device(handle) <= whole // 2 + 1

    @torch.no_grad()
    def test_raise_says_what_to_set_and_changes_nothing(self) -> None:
        model = blocks_of()
        whole = planned_bytes(model)
        with torch_offload.offload(
            model, HOST, gpu_budget=int(0.8 * whole), on_oom="raise"
        ) as handle:
            before = on_device(handle)
            _RunsOut(model.blocks[3].mlp)
            with pytest.raises(torch.OutOfMemoryError, match="set a smaller gpu_budget"):
                model(rows())
            assert on_device(handle) == before

    @torch.no_grad()
    def test_nothing_to_give_back_says_so(self) -> None:
        model = blocks_of()
        with torch_offload.offload(model, HOST, gpu_budget=None) as handle:
            least = handle.explain().device_bytes
            _RunsOut(model.blocks[3].mlp, times=2)
            with pytest.raises(torch.OutOfMemoryError, match="torch_offload"):
                model(rows())
            assert on_device(handle) < least, "the window is made as small as it can be"
            with pytest.raises(torch.OutOfMemoryError, match="no unit is resident"):
                model(rows())
            model(rows())

    @torch.no_grad()
    def test_other_errors_change_nothing(self) -> None:
        model = blocks_of()
        with torch_offload.offload(model, HOST, gpu_budget=planned_bytes(model)) as handle:
            before = [unit.place for unit in handle.units]
            with pytest.raises(RuntimeError):
                model(torch.zeros(1, 1, 3))
            assert [unit.place for unit in handle.units] == before

    def test_wrong_choice_fails(self) -> None:
        with pytest.raises(ValueError, match="expected on_oom to be one of"):
            torch_offload.offload(blocks_of(), HOST, on_oom="panic")  # type: ignore[arg-type]


@torch.no_grad()
def test_generate_is_the_same_under_every_budget() -> None:
    model = tiny_llama()
    ids = torch.tensor([[3, 5, 7]])
    must = model.generate(ids, max_new_tokens=6, do_sample=False)
    whole = planned_bytes(model)
    with torch_offload.offload(model, HOST, gpu_budget=whole) as handle:
        for share in (1.0, 0.7, 0.4):
            handle.replan(gpu_budget=int(share * whole) + 1)
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), must)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, share=st.floats(0, 1), kinds=st.randoms(use_true_random=False))
def test_no_plan_exceeds_its_budget_and_more_is_never_slower(
    sizes: list[int], share: float, kinds: Any
) -> None:
    units = [
        _C.Unit(f"u{i}", size * MIB, i // 2, kinds.choice(["mha", "ffn"]))
        for i, size in enumerate(sizes)
    ]
    least = _C.least_budget_bytes(units)
    whole = sum(unit.size_bytes for unit in units)
    budget = least + int(share * (whole - least))
    choice = choose(units, budget_bytes=budget)
    plan = choice.plan
    assert plan.window_bytes + plan.resident_bytes <= budget
    assert all(
        place is None or place[1] - place[0] == unit.size_bytes
        for unit, place in zip(units, plan.places, strict=True)
    )
    homes = sum(
        unit.size_bytes for unit, place in zip(units, plan.places, strict=True) if not place
    )
    assert homes == plan.resident_bytes
    more = choose(units, budget_bytes=budget + (whole - budget) // 2)
    assert more.score_ns <= choice.score_ns * 1.002
