"""``granularity="module"``: sublayers in the first pass, proven leaves afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import Mlp, assert_equal, plain_on, rows, tiny_stack
from tests.python.models import CASES


def leaf_cut_of(handle: torch_offload.Handle) -> Any:
    """What decides about leaves; the handle shows it to nobody."""
    leaf_cut = handle._undo.__self__._leaf_cut
    assert leaf_cut is not None, "not offloaded with granularity='module'"
    return leaf_cut


@contextmanager
def observed_uncut(handle: torch_offload.Handle) -> Iterator[list[int]]:
    """Asserts the exact copies of one pass that may end in a cut; yields the units called.

    `expect.watch` cannot: a cut replaces the units and the wrappers that it stands around.
    """
    model = handle.model
    assert model is not None
    units, before = handle.units, handle.stats
    window_begin, window_end = handle._engine.window
    frozen: Any = SimpleNamespace(
        units=units,
        config=handle.config,
        _engine=SimpleNamespace(plan=SimpleNamespace(depth_bytes=handle._engine.plan.depth_bytes)),
    )
    streamed = [index for index, unit in enumerate(units) if unit.place is not None]
    one = expect.Pass(
        units=[],
        whole_before=frozenset(i for i in streamed if handle._engine.is_whole(i)),
        copied_in_vain=frozenset(),
        is_edited=False,
        before=before,
    )

    def noting(forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            one.units.append(index)
            for name in units[index].parameters:
                address = model.get_parameter(name).data_ptr()
                assert window_begin <= address < window_end, f"{name} is outside the window"
            return forward(*args, **kwargs)

        return noted

    modules = {index: model.get_submodule(units[index].name) for index in streamed}
    for index, module in modules.items():
        vars(module)["forward"] = noting(module.forward, index)
    try:
        yield one.units
        one.completed = True
    finally:
        for module in modules.values():
            del vars(module)["forward"]
    one.after = handle.stats
    names = [units[index].name for index in streamed]
    learned = expect._learned.setdefault(handle, expect._Learned(names, streamed))
    expected = expect._expected(frozen, learned, one)
    got, must = (one.onloads, one.bytes_onloaded), (expected.onloads, expected.bytes_onloaded)
    assert got == must if expected.is_exact else got >= must, f"copied {got}, expected {must}"
    learned.learn(one.units, one.completed, expected.goes_as_known)


def settle(handle: torch_offload.Handle, forward: Callable[[], Any], *, passes: int = 4) -> None:
    """Runs forwards until the units are cut, then the first one with leaves; counts all copies."""
    leaf_cut = leaf_cut_of(handle)
    window_bytes = handle.stats.window_bytes
    for _ in range(passes):
        assert not leaf_cut._is_cut
        with observed_uncut(handle):
            forward()
        if leaf_cut._is_cut:
            break
    assert leaf_cut.is_settled, f"no cut after {passes} passes"
    assert handle.stats.window_bytes == window_bytes
    assert_cut_streams(handle, forward)


def assert_cut_streams(handle: torch_offload.Handle, forward: Callable[[], Any]) -> expect.Pass:
    """Asserts the exact copies of the first pass after a cut, which begins with an empty window."""
    streamed = [index for index, unit in enumerate(handle.units) if unit.place is not None]
    assert not any(handle._engine.is_whole(index) for index in streamed)
    expect._learned.pop(handle, None)  # the new pipeline has learned nothing yet
    with expect.watch(handle) as calls:
        forward()
    (one,), (expected,) = calls.passes, calls.expected
    got, must = (one.onloads, one.bytes_onloaded), (expected.onloads, expected.bytes_onloaded)
    assert got == must if expected.is_exact else got >= must, f"copied {got}, expected {must}"
    if handle.config.mode == "pipeline" and expected.goes_as_known:
        assert one.misses == 1, "only the first unit could not be foreseen"
    return one


def leaf_names(handle: torch_offload.Handle) -> set[str]:
    return {unit.name for unit in handle.units}


@contextmanager
def offloaded(model: nn.Module, device: torch.device, **options: Any) -> Iterator[Any]:
    """As ``granularity="module"``; afterwards the plain model, attribute by attribute."""
    before = expect.snapshot(model)
    with torch.no_grad():
        handle = torch_offload.offload(
            model, device, **({"granularity": "module", "depth": 0} | options)
        )
        try:
            yield handle
            expect.assert_at_rest(handle)
        finally:
            handle.remove()
    expect.assert_unchanged(model, before, same_memory=False)


def inputs_of(name: str, device: torch.device) -> dict[str, Any]:
    inputs = CASES[name].inputs()
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def checked(model: Any, plain: Any, *args: Any, **kwargs: Any) -> Callable[[], None]:
    """A forward of the model that must give the plain one's bits."""
    with torch.no_grad():
        must = plain(*args, **kwargs)
    return lambda: assert_equal(model(*args, **kwargs), must)


def stack_pair(device: torch.device, **settings: Any) -> tuple[Any, Callable[[], None]]:
    model = tiny_stack(**settings)
    width = settings.get("width", 16)
    return model, checked(model, plain_on(model, device), rows(device, width=width))


class TestCut:
    """From sublayers to leaves, in the same window."""

    @pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
    def test_first_pass_streams_sublayers_and_second_streams_leaves(
        self, device: torch.device, mode: str
    ) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device, mode=mode) as handle:
            window_bytes, host_bytes = handle.stats.window_bytes, handle.stats.host_bytes
            assert leaf_names(handle) == {
                f"blocks.{i}.{half}" for i in range(4) for half in ("attn", "mlp")
            }
            with observed_uncut(handle) as called:
                forward()
            assert called == list(range(8))
            assert leaf_names(handle) == {
                f"blocks.{i}.{leaf}" for i in range(4) for leaf in ("attn", "mlp.up", "mlp.down")
            }
            assert assert_cut_streams(handle, forward).units == list(range(12))
            with expect.watch(handle) as calls:
                forward()
                forward()
            expect.assert_streams_exactly(calls, exact_passes=2)
            assert calls.passes[-1].onloads >= 12 - 3  # depth 0: no more than a few stay whole
            assert handle.stats.window_bytes == window_bytes
            assert handle.stats.host_bytes == host_bytes

    @pytest.mark.parametrize("name", ["llama", "vit"])
    def test_window_is_smaller_than_that_of_sublayers(
        self, device: torch.device, name: str
    ) -> None:
        windows = {}
        for granularity in ("sublayer", "module"):
            model = torch_offload.align(CASES[name].build())
            with torch_offload.offload(model, device, granularity=granularity) as handle:
                windows[granularity] = handle.stats.window_bytes
                if granularity == "module":
                    with torch.no_grad():
                        model(**inputs_of(name, device))
                    assert handle.stats.window_bytes == windows[granularity]
                largest = max(unit.size_bytes for unit in handle.units)
                assert largest <= windows[granularity]
        assert windows["module"] < windows["sublayer"]

    def test_counts_go_on_over_the_cut(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            before = handle.stats
            for forwards in range(1, 4):
                forward()
                after = handle.stats
                assert after.forwards == forwards
                assert after.onloads > before.onloads
                for field in fields(after):
                    assert getattr(after, field.name) >= getattr(before, field.name), field.name
                before = after

    def test_cut_model_is_given_back_and_can_be_offloaded_again(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        for _ in range(2):
            with offloaded(model, device) as handle:
                settle(handle, forward)
                assert "blocks.0.mlp.up" in leaf_names(handle)
        model.to(device)
        forward()

    def test_model_removed_before_its_first_pass_is_plain(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            assert not leaf_cut_of(handle).is_settled
        model.to(device)
        forward()

    def test_biases_that_join_no_leaf_become_resident(self, device: torch.device) -> None:
        case = CASES["qwen3"]
        model = torch_offload.align(case.build())
        forward = checked(model, plain_on(model, device), **inputs_of("qwen3", device))
        with offloaded(model, device) as handle:
            streamed = {name for unit in handle.units for name in unit.parameters}
            resident = handle.stats.bytes_resident
            settle(handle, forward)
            left = streamed - {name for unit in handle.units for name in unit.parameters}
            assert left
            assert all("norm" in name for name in left)
            sizes = [model.get_parameter(name).nbytes for name in left]
            assert handle.stats.bytes_resident == resident + sum(sizes)
            assert {model.get_parameter(name).device for name in left} == {device}


WHOLE = {
    "mamba": (".mixer", 5),  # its conv1d is read without a call
    "weight_norm": (".mlp", 4),  # the parametrised projection is closed
    "mixtral": (".mlp", 5),  # fused experts are no leaves of torch's
    "transformer": ("layers.", 8),  # nn.MultiheadAttention, in layers that are closed themselves
    "functional_mixer": (".mixer", 5),
}


@pytest.mark.parametrize("name", list(WHOLE))
def test_half_that_cannot_be_cut_stays_whole(device: torch.device, name: str) -> None:
    part, count = WHOLE[name]
    model = torch_offload.align(CASES[name].build())
    must = plain_on(model, device)
    inputs = inputs_of(name, device)
    # A Mamba's cache is an object that compares by identity: its last hidden state says enough.
    take = (lambda out: out) if not hasattr(must, "config") else (lambda out: out.logits)
    with torch.no_grad():
        expected = take(must(**inputs))

    def forward() -> None:
        assert_equal(take(model(**inputs)), expected)

    with offloaded(model, device) as handle:
        whole = {unit for unit in leaf_names(handle) if part in unit}
        assert len(whole) == count
        settle(handle, forward)
        assert whole <= leaf_names(handle)


class OwnAttention(nn.Module):
    """nn.MultiheadAttention beside a projection, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = Mlp(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


def test_multihead_attention_stays_whole_beside_leaves(device: torch.device) -> None:
    model = torch_offload.align(nn.Sequential(*(OwnAttention() for _ in range(3))).eval())
    x = rows(device, batch=6).reshape(2, 3, 16)
    forward = checked(model, plain_on(model, device), x)
    with offloaded(model, device) as handle:
        settle(handle, forward)
        names = leaf_names(handle)
        assert {"1.attention", "1.mlp.up", "1.mlp.down"} <= names
        assert not any("out_proj" in name for name in names)


class TestPartialPasses:
    """A cut waits until every sublayer was seen, but not for ever."""

    def test_encoder_alone_does_not_cut(self, device: torch.device) -> None:
        model = torch_offload.align(CASES["t5"].build())
        plain = plain_on(model, device)
        inputs = inputs_of("t5", device)
        encode = checked(model.get_encoder(), plain.get_encoder(), inputs["input_ids"])
        with offloaded(model, device) as handle:
            before = leaf_names(handle)
            with observed_uncut(handle) as called:
                encode()
            assert 0 < len(called) < len(before)
            assert not leaf_cut_of(handle)._is_cut
            assert leaf_names(handle) == before
            with observed_uncut(handle):
                assert_equal(model(**inputs).logits, plain(**inputs).logits)
            assert leaf_cut_of(handle).is_settled
            assert leaf_names(handle) != before

    @pytest.mark.parametrize("name", ["t5", "bart"])
    def test_generate_from_the_first_call_on_equals_plain(
        self, device: torch.device, name: str
    ) -> None:
        case = CASES[name]
        model = torch_offload.align(case.build())
        ids = inputs_of(name, device)["input_ids"]
        with torch.no_grad():
            must = plain_on(model, device).generate(ids, **case.generate)
        with offloaded(model, device) as handle:
            before = leaf_names(handle)
            assert torch.equal(model.generate(ids, **case.generate), must)
            assert leaf_cut_of(handle).is_settled  # the encoder's pass, then a decoder's
            assert leaf_names(handle) != before
            handle.refresh()
            assert torch.equal(model.generate(ids, **case.generate), must)
            streamed = [unit for unit in handle.units if unit.place]
            assert all(unit.acquired and unit.onloads for unit in streamed)

    def test_part_that_never_runs_is_cut_out_of_patience(self, device: torch.device) -> None:
        model, _ = stack_pair(device)
        model.sequence = [0, 1, 3]
        forward = checked(model, plain_on(model, device), rows(device))
        with offloaded(model, device) as handle:
            for _ in range(3):
                forward()
                assert not leaf_cut_of(handle)._is_cut
            forward()
            assert leaf_cut_of(handle).is_settled
            assert {"blocks.2.mlp", "blocks.1.mlp.up"} <= leaf_names(handle)
            forward()
            model.sequence[:] = [0, 1, 2, 3]  # what was never seen still streams, as a sublayer
            checked(model, plain_stack(device), rows(device))()


def plain_stack(device: torch.device) -> Any:
    return tiny_stack().to(device)


class TestFailures:
    """A first pass that does not end."""

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_failed_first_pass_is_traced_again(
        self, device: torch.device, error: type[BaseException]
    ) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            before = [dict(vars(module)) for module in model.modules()]
            fail = FailOnce(model.blocks[2].mlp.down, error)
            with pytest.raises(error):
                forward()
            fail.undo()
            assert fail.raised
            assert [dict(vars(module)) for module in model.modules()] == before
            expect.assert_at_rest(handle)
            assert not leaf_cut_of(handle)._is_cut
            assert not leaf_cut_of(handle).is_settled
            forward()
            assert leaf_cut_of(handle).is_settled
            assert "blocks.2.mlp.down" in leaf_names(handle)
            assert_cut_streams(handle, forward)

    def test_removed_after_a_failed_first_pass_is_plain(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device):
            fail = FailOnce(model.blocks[1].attn, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                forward()
            fail.undo()
        model.to(device)
        forward()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_failed_later_pass_leaves_the_cut(
        self, device: torch.device, error: type[BaseException]
    ) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            settle(handle, forward)
            names = leaf_names(handle)
            fail = FailOnce(model.blocks[2].mlp.down, error)
            with pytest.raises(error):
                forward()
            fail.undo()
            expect.assert_at_rest(handle)
            forward()
            assert leaf_names(handle) == names
            assert leaf_cut_of(handle).is_settled


class FailOnce:
    """Makes the next forward of a module raise."""

    def __init__(self, module: nn.Module, error: type[BaseException]) -> None:
        self._module, self._error, self.raised = module, error, False
        vars(module)["forward"] = self._fail

    def _fail(self, *args: Any, **kwargs: Any) -> None:
        self.raised = True
        raise self._error("planted")

    def undo(self) -> None:
        del vars(self._module)["forward"]


class TestBudget:
    """A budget holds before the cut and after it."""

    @pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
    def test_leaves_that_fit_become_resident(self, device: torch.device, share: float) -> None:
        model, forward = stack_pair(device, num_blocks=6)
        least = least_budget(model, device)
        whole = sum(parameter.nbytes for parameter in model.parameters())
        budget = int(least + share * (whole - least))
        with offloaded(model, device, gpu_budget=budget) as handle:
            first = handle.stats
            settle(handle, forward)
            last = handle.stats
            assert last.window_bytes == first.window_bytes
            assert last.bytes_resident + last.window_bytes <= budget
            resident = [unit for unit in handle.units if unit.place is None]
            assert (len(resident) > 0) == (share > 0)
            assert last.bytes_resident == sum(
                tensor.nbytes
                for tensor in model.parameters()
                if id(tensor) not in {id(p) for p in streamed_parameters(handle)}
            )
            with expect.watch(handle) as calls:
                forward()
                forward()
            expect.assert_streams_exactly(calls, exact_passes=2)
        model.to(device)
        forward()


def streamed_parameters(handle: torch_offload.Handle) -> list[nn.Parameter]:
    assert handle.model is not None
    return [
        handle.model.get_parameter(name)
        for unit in handle.units
        if unit.place is not None
        for name in unit.parameters
    ]


def least_budget(model: nn.Module, device: torch.device) -> int:
    with pytest.raises(ValueError, match="gpu_budget of at least") as raised:
        torch_offload.offload(model, device, granularity="module", gpu_budget=0)
    return int(str(raised.value).split("at least ")[1].split()[0])


class Reader(nn.Module):
    """An MLP that may read a weight of its child without calling it, on demand."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.down = nn.Linear(2 * width, width)
        self.reads_outside = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.up(x))
        if self.reads_outside:
            if self.down.weight.device != x.device or _SIMULATED.active(self.down.weight):
                # What torch says on a GPU, where a master is no tensor of the kernel's device.
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices"
                )
            return nn.functional.linear(x, self.down.weight, self.down.bias)
        return self.down(x)


class _Simulated:
    """Says on the host device, where every master is readable, whether a weight is at rest."""

    def __init__(self) -> None:
        self.window: Callable[[], tuple[int, int]] | None = None

    def active(self, weight: torch.Tensor) -> bool:
        if self.window is None or weight.device.type != "cpu":
            return False
        begin, end = self.window()
        return not begin <= weight.data_ptr() < end


_SIMULATED = _Simulated()


@pytest.fixture
def simulated_mismatch() -> Iterator[_Simulated]:
    yield _SIMULATED
    _SIMULATED.window = None


class ReaderBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(16, 16)
        self.mlp = Reader()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x + self.attn(x))


class TestDistrust:
    """A leaf that a later pass reads outside its call joins its sublayer again."""

    @pytest.mark.parametrize("budget", [None, 0.5])
    def test_leaf_read_outside_raises_once_and_joins_its_sublayer(
        self, device: torch.device, simulated_mismatch: _Simulated, budget: float | None
    ) -> None:
        model = nn.Sequential(*(ReaderBlock() for _ in range(4))).eval()
        torch_offload.align(model)
        forward = checked(model, plain_on(model, device), rows(device))
        options = {}
        if budget is not None:
            least = least_budget(model, device)
            whole = sum(parameter.nbytes for parameter in model.parameters())
            options["gpu_budget"] = int(least + budget * (whole - least))
        with offloaded(model, device, **options) as handle:
            simulated_mismatch.window = lambda: handle._engine.window
            settle(handle, forward)
            units = {unit.name: unit for unit in handle.units}
            cut = next(
                i for i in range(4) if units[f"{i}.mlp.down"].place and units[f"{i}.mlp.up"].place
            )
            model[cut].mlp.reads_outside = True
            before = handle.stats
            with pytest.raises(RuntimeError, match=rf"(?s)same device.*{cut}\.mlp\.down\.weight"):
                forward()
            expect.assert_at_rest(handle)
            assert not leaf_cut_of(handle).is_settled
            assert leaf_names(handle) == set(units)
            forward()
            names = leaf_names(handle)
            assert f"{cut}.mlp" in names
            assert not {f"{cut}.mlp.down", f"{cut}.mlp.up"} & names
            assert names - {f"{cut}.mlp"} <= set(units)
            assert leaf_cut_of(handle).is_settled
            after = handle.stats
            assert after.onloads > before.onloads
            assert after.window_bytes == before.window_bytes
            forward()
            with expect_relearned(handle) as calls:
                forward()
                forward()
            assert calls.exact
            model[cut].mlp.reads_outside = False
        model.to(device)
        forward()

    def test_names_of_no_leaf_change_nothing(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            leaf_cut_of(handle).distrust(
                ["blocks.0.attn.weight"]
            )  # before the cut: nothing to join
            settle(handle, forward)
            names = leaf_names(handle)
            leaf_cut_of(handle).distrust(["nothing.of.ours", "bias", ""])
            assert leaf_cut_of(handle).is_settled
            forward()
            assert leaf_names(handle) == names

    def test_every_leaf_distrusted_gives_the_sublayers_back(self, device: torch.device) -> None:
        model, forward = stack_pair(device)
        with offloaded(model, device) as handle:
            sublayers = leaf_names(handle)
            settle(handle, forward)
            streamed = [name for unit in handle.units for name in unit.parameters]
            leaf_cut_of(handle).distrust(streamed)
            forward()
            assert leaf_names(handle) == sublayers
            forward()


@contextmanager
def expect_relearned(handle: torch_offload.Handle) -> Iterator[expect.Calls]:
    """As `expect.watch`, after one pass with units that were cut meanwhile."""
    streamed = [index for index, unit in enumerate(handle.units) if unit.place is not None]
    learned = expect._Learned([handle.units[index].name for index in streamed], streamed)
    learned.learn(list(streamed), completed=True, was_known=True)
    learned.learn(list(streamed), completed=True, was_known=True)
    expect._learned[handle] = learned
    with expect.watch(handle) as calls:
        yield calls
    expect.assert_streams_exactly(calls)
