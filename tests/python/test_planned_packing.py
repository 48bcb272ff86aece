"""What the planner packs: never over the budget, never slower than raw or than with less."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.python.dropin import packable_llama
from torch_offload import _C, Config, packing
from torch_offload.choice import Packable, Times, choose, choose_transports
from torch_offload.measured_times import MeasuredTimes
from torch_offload.packing import (
    MAX_SHARE,
    Packing,
    Rates,
    copied_bytes,
    estimated_bytes,
    packed_host_bytes,
    packed_resident_bytes,
    staging_bytes,
)
from torch_offload.planning import Cut, cut_model, least_budget, plan_cut
from torch_offload.prediction import Scenario, predict, predict_plan

_KIB = 1024
# What ending a search early may lose, at this budget and at the other.
_NEARLY = 1.003


def total_of(units: list[_C.Unit]) -> int:
    return sum(unit.size_bytes for unit in units)


@st.composite
def packables(draw: st.DrawFn) -> tuple[list[_C.Unit], Packable]:
    """Layers of random sizes, some of whose units do not pack, and a link and a decoder."""
    attention = draw(st.integers(1, 40))
    ffn = draw(st.integers(1, 120))
    units = [
        _C.Unit(f"{layer}.{kind}", size * 256 * _KIB, layer, kind)
        for layer in range(draw(st.integers(1, 16)))
        for kind, size in (("mha", attention), ("ffn", ffn))
    ]
    if draw(st.booleans()):
        units.append(_C.Unit("head", draw(st.integers(1, 200)) * 256 * _KIB, 99, "ffn"))
    packed = [
        draw(st.sampled_from((0.6, 0.7, 0.75, 0.0))) * unit.size_bytes
        if index < 8
        else 0.7 * unit.size_bytes
        for index, unit in enumerate(units)
    ]
    link = draw(st.floats(1e9, 100e9))
    return units, Packable(
        transport=draw(st.sampled_from(("auto", "packed"))),
        packed_bytes=[int(size) for size in packed],
        link_bytes_per_second=link,
        decode_bytes_per_second=link * draw(st.floats(0.5, 40)),
    )


def device_bytes(choice: _C.Choice, packed_bytes: list[int]) -> int:
    """Reckoned from where each unit is, not from what the planner says."""
    plan = choice.plan
    resident = packed = slot = 0
    for index, (unit, place, way) in enumerate(
        zip(plan.units, plan.places, plan.transports, strict=True)
    ):
        if place is None:
            assert way == "raw"
            resident += unit.size_bytes
            continue
        assert place[1] - place[0] == unit.size_bytes
        assert place[1] <= plan.window_bytes
        if way != "raw":
            assert packed_bytes[index] > 0
        if way == "packed":
            slot = max(slot, _C.aligned_size(packed_bytes[index]))
        elif way == "packed_resident":
            packed += _C.aligned_size(packed_bytes[index])
    assert resident == plan.resident_bytes
    assert packed == choice.packed_resident_bytes == packed_resident_bytes(plan, packed_bytes)
    staging = plan.staging_slots * slot
    assert plan.staging_slots in (1, 2)
    assert staging == choice.staging_bytes == staging_bytes(plan, packed_bytes)
    return resident + packed + plan.window_bytes + staging


@settings(deadline=None, max_examples=60)
@given(packables(), st.floats(0, 1))
def test_plan_is_within_its_budget_and_every_byte_has_one_home(
    given_units: tuple[list[_C.Unit], Packable], share: float
) -> None:
    units, packable = given_units
    sizes = list(packable.packed_bytes)
    least = _C.least_budget_bytes(units, packable.transport, sizes)
    budget = least + int(share * max(0, total_of(units) - least))
    choice = choose(units, budget_bytes=budget, packable=packable)
    assert device_bytes(choice, sizes) <= budget
    if packable.transport == "packed":
        for size, place, way in zip(sizes, choice.plan.places, choice.plan.transports, strict=True):
            assert way != "raw" or place is None or size == 0


@settings(deadline=None, max_examples=40)
@given(packables(), st.floats(0, 1))
def test_auto_is_never_slower_than_raw(
    given_units: tuple[list[_C.Unit], Packable], share: float
) -> None:
    units, packable = given_units
    least = _C.least_budget_bytes(units)
    budget = least + int(share * (total_of(units) - least))
    auto = choose(
        units,
        budget_bytes=budget,
        packable=Packable(
            "auto",
            packable.packed_bytes,
            packable.decode_bytes_per_second,
            packable.link_bytes_per_second,
        ),
    )
    raw = choose(
        units,
        budget_bytes=budget,
        packable=Packable("raw", (), 1e9, packable.link_bytes_per_second),
    )
    assert auto.score_ns <= raw.score_ns
    assert auto.raw_score_ns == raw.score_ns


@settings(deadline=None, max_examples=25)
@given(packables(), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_more_budget_is_never_slower(
    given_units: tuple[list[_C.Unit], Packable], shares: list[float]
) -> None:
    units, packable = given_units
    least = _C.least_budget_bytes(units, packable.transport, packable.packed_bytes)
    whole = max(least, total_of(units))
    scores = [
        choose(units, budget_bytes=least + int(share * (whole - least)), packable=packable).score_ns
        for share in sorted(shares)
    ]
    for before, after in pairwise(scores):
        assert after <= before * _NEARLY


def _llama_cut(transport: str = "auto", **sizes: int) -> Cut:
    model = packable_llama(**sizes)
    config = Config(gpu_budget="1GiB", transport=transport)  # type: ignore[arg-type]
    return cut_model(model, config)[0]


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1), st.sampled_from(("raw", "auto", "packed")))
def test_whole_model_is_within_its_budget(share: float, transport: str) -> None:
    cut = _CUT()
    packing = _PACKINGS[transport]
    least = least_budget(cut, packing)
    whole = least + sum(p.nbytes for p in cut.model.parameters())
    budget = least + int(share * (whole - least))
    planned = plan_cut(cut, Config(gpu_budget=budget), budget, packing)
    assert planned.device_bytes <= budget
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        plan_cut(cut, Config(gpu_budget=least - 1), least - 1, packing)


_PACKINGS = {transport: Packing(transport) for transport in ("raw", "auto", "packed")}
_cuts: list[Cut] = []


def _CUT() -> Cut:  # noqa: N802  # made once, by the first example
    if not _cuts:
        _cuts.append(_llama_cut(num_hidden_layers=6))
    return _cuts[0]


def packed_bytes_of(weights: list[torch.Tensor]) -> int:
    return packing.packed_bytes_of([(str(i), one) for i, one in enumerate(weights)], {})


# --- sizes ---------------------------------------------------------------------------------------


def test_packed_size_is_that_of_the_blob_and_slack() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(256, 512).bfloat16(), torch.randn(512).bfloat16()]
    blob = _C.pack(weights).blob.numel()
    assert packed_bytes_of(weights) == _C.packed_room_bytes(blob) > blob
    # What lies transposed is packed as it lies.
    assert packed_bytes_of([weights[0].t(), weights[1]]) == packed_bytes_of(weights)


def test_estimate_without_weights_is_near_the_size_with_them() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(2048, 1024).bfloat16() * 0.02]
    estimate = estimated_bytes([torch.empty(2048, 1024, dtype=torch.bfloat16, device="meta")])
    assert packed_bytes_of(weights) == pytest.approx(estimate, rel=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(512, 512),
        lambda: torch.randint(0, 2**15, (512, 512), dtype=torch.int16).view(torch.bfloat16),
        lambda: torch.randn(4, 4).bfloat16(),
    ],
    ids=["float32", "random bits", "tiny"],
)
def test_what_packing_would_not_shrink_has_no_packed_size(
    make: Callable[[], torch.Tensor],
) -> None:
    assert packed_bytes_of([make()]) == 0


def test_each_unit_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, ways = _CUT(), Packing("auto")
    first = ways.packable(cut.specs)
    assert all(
        0 < size <= MAX_SHARE * unit.size_bytes
        for size, unit in zip(first.packed_bytes, cut.units, strict=False)
    )
    monkeypatch.setattr(packing, "packed_bytes_of", lambda *_: pytest.fail("read again"))
    assert ways.packable(cut.specs) == first


def test_edited_units_are_counted_anew_when_that_is_asked_for() -> None:
    cut, ways = _llama_cut(), Packing("auto")
    first = ways.packable(cut.specs).packed_bytes
    with torch.no_grad():
        weight = cut.specs[1].parameters[0][1]
        weight.mul_(torch.exp2(torch.randint(-6, 6, weight.shape)))
    assert ways.packable(cut.specs).packed_bytes == first
    ways.count_anew(cut.specs, {})
    second = ways.packable(cut.specs).packed_bytes
    assert second == Packing("auto").packable(cut.specs).packed_bytes
    assert [index for index, size in enumerate(second) if size != first[index]] == [1]
    assert ways.take_counts({name: 0 for name, _ in cut.specs[1].parameters}) == [None] * 3


def test_unit_whose_weights_are_in_its_blob_alone_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut, ways = _CUT(), Packing("auto")
    ways.packable(cut.specs)
    monkeypatch.setattr(packing, "packed_bytes_of", lambda *_: pytest.fail("read"))
    units = cut.units[: len(cut.specs)]
    sizes = {spec.name: u.size_bytes // 2 for spec, u in zip(cut.specs, units, strict=True)}
    sizes[cut.specs[0].name] = units[0].size_bytes
    ways.count_anew(cut.specs, sizes)
    found = ways.packable(cut.specs).packed_bytes
    assert found[0] == 0, "it would not pay"
    assert list(found[1:]) == [_C.packed_room_bytes(u.size_bytes // 2) for u in units[1:]]


def test_weights_that_no_memory_is_left_to_count_keep_their_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> int:
        raise torch.OutOfMemoryError

    cut, ways = _CUT(), Packing("auto")
    first = ways.packable(cut.specs)
    monkeypatch.setattr(packing, "packed_bytes_of", fail)
    ways.count_anew(cut.specs, {})
    assert ways.packable(cut.specs) == first


# --- predictions ---------------------------------------------------------------------------------

_UNITS = [_C.Unit(f"{i}", 2**22, i, "ffn") for i in range(12)]
_PACKED = Packable("packed", [int(0.7 * 2**22)] * 12, 1600e9, 50e9)


def _scenario(**changes: object) -> Scenario:
    link = 50e9
    copy_ns = round(2**22 / link * 1e9)
    base = Scenario(_UNITS, [copy_ns // 50] * 12, link, packable=_PACKED)
    return base.with_(**changes)


def test_prediction_counts_what_is_copied() -> None:
    raw = predict(_scenario(packable=Packable(link_bytes_per_second=50e9)))
    packed = predict(_scenario())
    assert raw.streamed_bytes == 12 * 2**22
    assert packed.streamed_bytes == sum(_PACKED.packed_bytes)
    assert packed.forward_ms == pytest.approx(0.7 * raw.forward_ms, rel=0.02)
    assert packed.staging_bytes == 2 * _C.aligned_size(_PACKED.packed_bytes[0])
    assert packed.device_bytes == packed.plan.window_bytes + packed.staging_bytes
    assert packed.host_bytes == raw.host_bytes + packed_host_bytes(
        packed.plan, _PACKED.packed_bytes
    )
    document = packed.to_json()
    assert document["transports"] == ["packed"] * 12
    assert document["staging_bytes"] == packed.staging_bytes


def test_measured_copies_are_of_raw_units() -> None:
    by_rate = predict(_scenario())
    copy_ns = [round(2**22 / 50e9 * 1e9)] * 12
    by_time = predict_plan(_scenario(copy_ns=copy_ns), by_rate.plan)
    assert by_time.forward_ms == pytest.approx(by_rate.forward_ms, rel=0.01)


def test_budget_keeps_units_packed() -> None:
    found = predict(_scenario(budget_bytes=10 * 2**22))
    ways = found.plan.transports
    assert "packed_resident" in ways
    copied = copied_bytes(found.plan, _PACKED.packed_bytes)
    assert all(copied[i] == 0 for i, way in enumerate(ways) if way == "packed_resident")
    assert found.device_bytes <= 10 * 2**22
    assert found.packed_resident_bytes > 0


def test_transports_of_places_that_are_there_go_by_the_measured_times() -> None:
    plan = _C.make_plan(_UNITS)
    copies = [round(2**22 / 50e9 * 1e9)] * 12
    auto = Packable("auto", _PACKED.packed_bytes, 1600e9, 50e9)
    fast = choose_transports(plan, auto, times=Times([100] * 12, copies))
    slow = choose_transports(plan, auto, times=Times([2 * ns for ns in copies], copies))
    assert set(fast.plan.transports) == {"packed"}
    assert set(slow.plan.transports) == {"raw"}, "kernels are the limit: nothing is gained"


def test_profiled_times_of_other_units_are_refused() -> None:
    cut = _CUT()
    with pytest.raises(ValueError, match="profile with times for every unit"):
        plan_cut(cut, Config(), 2**30, None, MeasuredTimes({"elsewhere": 1}, {"elsewhere": 1}, ()))


def test_rates_say_where_they_are_from() -> None:
    assert "codec.json" in Packing("auto").basis
    assert Packing("auto", Rates(25e9, 500e9, "as stated")).basis == (
        "copies at 25.0 GB/s, decoder at 500.0 GB/s, as stated"
    )
    assert Packing().basis == ""
    assert Packing("raw", remark="no decoder").basis == "no decoder"
