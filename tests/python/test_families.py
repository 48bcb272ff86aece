"""The streamed forward of every family of the zoo: the plain model's bits, exactly counted copies.

The plain model to compare with is the aligned one, on the same device. Each case runs as by default
and under a few rows of a covering array; five families run under the full product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import torch_offload
from tests.python import expect
from tests.python.dropin import IDLE_WARNING
from tests.python.leaf_oracle import settle
from tests.python.models import CASES, Case
from tests.python.streamed_master_guard import StreamedMasterGuard, StreamedMasterReadError
from torch_offload.structure import attribute_name

# Some skip a part of themselves; `assert_streams` knows which part of whom.
pytestmark = pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")

MODES = ("sync", "streams", "events", "pipeline")
STREAMS = ("shared", "split")
GRANULARITIES = ("sublayer", "layer", "module")
DEPTHS = (0, None)

# What `offload(model)` does: every case runs so.
DEFAULT = ("pipeline", "shared", "sublayer", None)
# Three rows of one group for a case: the next case takes the next group. See TestCoveringArray.
ROWS: tuple[tuple[str, str, str, int | None], ...] = (
    DEFAULT,
    ("events", "split", "module", None),
    ("streams", "split", "layer", None),
    ("events", "shared", "layer", None),
    ("pipeline", "shared", "module", 0),
    ("sync", "shared", "sublayer", 0),
    ("pipeline", "split", "layer", 0),
    ("streams", "shared", "sublayer", None),
    ("sync", "shared", "module", None),
    ("events", "split", "sublayer", 0),
    ("streams", "shared", "module", 0),
    ("sync", "shared", "layer", 0),
)
ROWS_PER_CASE = 3
FULL_PRODUCT = ("llama", "t5", "mixtral", "vit", "stack")
BUDGETED = ("llama", "t5", "swin", "bare_linears")
# Its attention returns a weight, which is cloned out of the window: nothing is read there later.
LENDERS = {"gpt_neox_japanese"}
# It calls `layer.forward(...)`, so a layer is no unit there; DESIGN names it among the exceptions.
NO_LAYERS = {"squeezebert"}


@dataclass(frozen=True)
class Family:
    """A case, its plain answers on the device, and a model to be offloaded."""

    case: Case
    model: nn.Module
    inputs: Mapping[str, Any]
    must: list[torch.Tensor]
    must_tokens: torch.Tensor | None
    volatile: frozenset[tuple[str, str]]  # (module, attribute) that a plain forward sets anew

    @property
    def generate_inputs(self) -> dict[str, Any]:
        return {name: value for name, value in self.inputs.items() if name != "decoder_input_ids"}

    def forward(self) -> None:
        """One forward, which must give the plain model's bits."""
        assert_same_bits(bits_of(self.model(**self.inputs)), self.must)

    def generate(self) -> None:
        """One `generate`, which must give the plain model's tokens."""
        assert self.must_tokens is not None
        assert self.case.generate is not None
        got = self.model.generate(**self.generate_inputs, **self.case.generate)
        assert torch.equal(got, self.must_tokens)


def bits_of(output: Any) -> list[torch.Tensor]:
    """All tensors of an output in order; caches and other objects are opened."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return bits_of(list(output.values()))
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in bits_of(item)]
    if hasattr(output, "__dict__"):
        return bits_of(vars(output))
    return []


def assert_same_bits(got: list[torch.Tensor], must: list[torch.Tensor]) -> None:
    assert must, "the plain model returned no tensor"
    assert any(one.isfinite().any() for one in must), "nothing that could differ"
    assert len(got) == len(must)
    for number, (one, other) in enumerate(zip(got, must, strict=True)):
        assert (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
        assert torch.equal(one, other) or torch.allclose(
            one, other, rtol=0, atol=0, equal_nan=True
        ), f"output {number} differs"


def _on(device: torch.device, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def build(name: str, device: torch.device, *, generates: bool = False) -> Family:
    """A case with its plain answers. Call it under ``torch.no_grad``."""
    case = CASES[name]
    inputs = _on(device, case.inputs())
    plain = torch_offload.align(case.build()).to(device)
    before = expect.snapshot(plain)["vars"]
    must = bits_of(plain(**inputs))
    volatile = frozenset(
        (path, key)
        for path, module in plain.named_modules()
        for key, value in vars(module).items()
        if key not in before[path] or before[path][key] is not value
    )
    family = Family(case, plain, inputs, must, None, volatile)
    assert_same_bits(bits_of(plain(**inputs)), must)  # else no comparison would mean anything
    tokens = None
    if generates and case.generate is not None:
        tokens = plain.generate(**family.generate_inputs, **case.generate)
    model = torch_offload.align(case.build())
    return replace(family, model=model, must_tokens=tokens)


@contextmanager
def offloaded(family: Family, device: torch.device, **options: Any) -> Iterator[Any]:
    """An offloaded family; afterwards at rest inside its masters, removed, and plain again."""
    before = expect.snapshot(family.model)
    options = {"resident": family.case.cure} | options
    handle = torch_offload.offload(family.model, device, **options)
    try:
        yield handle
        expect.assert_at_rest(handle)
        assert_values_at_rest(handle, before)
    finally:
        handle.remove()
    for path, key in family.volatile:
        before["vars"][path][key] = vars(family.model.get_submodule(path))[key]
    if not family.case.cure:  # an RWKV divides its weights in its first forward, plain or not
        expect.assert_unchanged(family.model, before, same_memory=False)


def assert_values_at_rest(handle: torch_offload.Handle, before: Mapping[str, Any]) -> None:
    """Each streamed parameter has its old values, in memory of its own outside the window."""
    model = handle.model
    assert model is not None
    spans = []
    for unit in handle.units:
        for name in unit.parameters if unit.place else ():
            parameter = model.get_parameter(name)
            assert torch.equal(parameter.cpu(), before["parameters"][name][3].cpu()), name
            storage = parameter.untyped_storage()
            assert storage.nbytes() == parameter.nbytes, f"{name} has no storage of its own"
            spans.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert sum(end - begin for begin, end in spans) <= handle.stats.host_bytes


def assert_streams(
    family: Family, handle: torch_offload.Handle, *, generates: bool = False
) -> None:
    """Three forwards and, where asked for, two `generate`: right bits, exact copies."""
    if handle.config.granularity == "module":
        settle(handle, family.forward)
    is_pipeline = handle.config.mode == "pipeline"
    with expect.watch(handle) as calls:
        for _ in range(3):
            family.forward()
    expect.assert_streams_exactly(calls)
    last, expected = calls.passes[-1], calls.expected[-1]
    assert len(calls.passes) == 3
    assert expected.is_exact
    assert expected.is_repeat
    assert last.units
    assert calls.passes[0].onloads > 0 or handle.config.granularity == "module"
    assert not is_pipeline or last.misses == 0
    never = {attribute_name(unit.name) for unit in handle.units if unit.place and not unit.acquired}
    if handle.config.granularity != "layer":
        assert never <= set(family.case.idle), "a streamed unit never ran"
    else:  # which has other names
        assert not never or family.case.idle, "a streamed layer never ran"
    if generates and family.must_tokens is not None:
        with expect.watch(handle) as calls:
            family.generate()
            family.generate()
        expect.assert_streams_exactly(calls)
        assert len(calls.passes) >= 4


def _rows_of(name: str) -> list[tuple[str, str, str, int | None]]:
    begin = list(CASES).index(name) * ROWS_PER_CASE % len(ROWS)
    rows = dict.fromkeys((DEFAULT, *ROWS[begin : begin + ROWS_PER_CASE]))
    return [row for row in rows if not (row[2] == "layer" and name in NO_LAYERS)]


# cuDNN wants the weights of an RNN in one piece; torch warns, and gathers them anew at every call.
@pytest.mark.filterwarnings(
    "ignore:RNN module weights are not part of single contiguous:UserWarning"
)
@pytest.mark.parametrize("name", list(CASES))
@torch.no_grad()
def test_family_streams_as_plain(name: str, device: torch.device) -> None:
    family = build(name, device, generates=True)
    # `generate` takes as long as all the rest, so it runs in one row, which changes.
    generating_row = list(CASES).index(name) // (len(ROWS) // ROWS_PER_CASE) % ROWS_PER_CASE
    for number, (mode, streams, granularity, depth) in enumerate(_rows_of(name)):
        options = {"mode": mode, "streams": streams, "granularity": granularity, "depth": depth}
        with offloaded(family, device, **options) as handle:
            assert_streams(family, handle, generates=number == generating_row)
    family.model.to(device)
    family.forward()  # the plain model again


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", FULL_PRODUCT)
@torch.no_grad()
def test_full_product_streams_as_plain(name: str, granularity: str, device: torch.device) -> None:
    family = build(name, device)
    onloads = {}
    for mode, streams in itertools.product(MODES, STREAMS):
        if (mode, streams) == ("sync", "split"):
            continue
        options = {"mode": mode, "streams": streams, "granularity": granularity, "depth": 0}
        with offloaded(family, device, **options) as handle:
            assert_streams(family, handle)
            onloads[mode, streams] = handle.stats.onloads
    assert onloads["sync", "shared"] == onloads["streams", "split"]  # both copy when asked only


@pytest.mark.filterwarnings("ignore:torch_offload. this forward runs in grad mode:UserWarning")
@pytest.mark.parametrize("name", FULL_PRODUCT)
def test_grad_mode_streams_as_plain_and_its_backward_raises(
    name: str, device: torch.device
) -> None:
    with torch.no_grad():
        family = build(name, device)
    plain = torch_offload.align(family.case.build()).to(device)
    must = bits_of(plain(**family.inputs))  # kernels may be others than without gradients

    def loss(outputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([one.float().sum() for one in outputs if one.requires_grad]).sum()

    loss(must).backward()
    assert any(parameter.grad is not None for parameter in plain.parameters())
    with offloaded(family, device) as handle:
        for forwards in (1, 2):
            got = bits_of(family.model(**family.inputs))
            assert_same_bits(got, must)
            assert handle.stats.forwards == forwards
            assert handle.stats.onloads >= forwards * expect.num_streamed(handle) > 0
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss(got).backward()


@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_every_depth_streams_as_plain(name: str, device: torch.device) -> None:
    family = build(name, device)
    windows = []
    for depth in (0, None, "1GiB"):
        with offloaded(family, device, depth=depth) as handle:
            assert_streams(family, handle)
            windows.append(handle.stats.window_bytes)
            last_forward = handle.stats.onloads
            family.forward()
            streamed = sum(unit.size_bytes for unit in handle.units if unit.place)
            if depth == "1GiB":  # everything is ahead, so all of it stays where it is
                assert handle.stats.window_bytes == streamed
                assert handle.stats.onloads == last_forward == expect.num_streamed(handle)
    assert windows == sorted(windows)
    assert windows[0] < windows[-1]


def _least_budget(family: Family, device: torch.device) -> int:
    with pytest.raises(ValueError, match="gpu_budget of at least") as raised:
        torch_offload.offload(family.model, device, gpu_budget=0, resident=family.case.cure)
    return int(str(raised.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_every_budget_streams_as_plain(name: str, device: torch.device) -> None:
    family = build(name, device)
    least = _least_budget(family, device)
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        torch_offload.offload(family.model, device, gpu_budget=least - 1)
    whole = sum(parameter.nbytes for parameter in family.model.parameters())
    shares = []
    for budget in (least, (least + whole) // 2):
        with offloaded(family, device, gpu_budget=budget) as handle:
            assert handle.stats.bytes_resident + handle.stats.window_bytes <= budget
            assert_streams(family, handle)
            shares.append(sum(unit.place is not None for unit in handle.units) / len(handle.units))
    assert shares[0] > shares[1] > 0, "a larger budget keeps more units resident"


READERS = [(name, "sublayer") for name, case in CASES.items() if case.cure] + [
    (name, "layer") for name in sorted(NO_LAYERS)
]


@pytest.mark.parametrize(("name", "granularity"), READERS)
@torch.no_grad()
def test_weight_read_outside_its_unit_is_never_silent(
    name: str, granularity: str, device: torch.device, master_guard: StreamedMasterGuard
) -> None:
    family = build(name, device)
    with torch_offload.offload(family.model, device, granularity=granularity) as handle:
        streamed = {weight for unit in handle.units if unit.place for weight in unit.parameters}
        # On CUDA an RWKV changes its masters in place, on the CPU: that is an edit, and noticed.
        if name in LENDERS or (name == "rwkv" and device.type == "cuda"):
            family.forward()
            family.forward()
        elif device.type == "cuda":
            with pytest.raises(RuntimeError, match=r"(?s)torch_offload: .* resident=\['"):
                family.forward()
        else:
            with master_guard.expect_reads() as reads:
                with pytest.raises(StreamedMasterReadError, match="outside its unit's call"):
                    family.forward()
                assert set(reads) & streamed
        expect.assert_at_rest(handle)


class TestCoveringArray:
    """The rows must cover what the tests above claim."""

    def test_every_pair_of_options_is_in_a_row(self) -> None:
        axes = (MODES, STREAMS, GRANULARITIES, DEPTHS)
        for one, other in itertools.combinations(range(len(axes)), 2):
            wanted = set(itertools.product(axes[one], axes[other])) - {("sync", "split")}
            assert {(row[one], row[other]) for row in ROWS} == wanted

    def test_every_case_runs_as_by_default(self) -> None:
        config = torch_offload.Config()
        assert (config.mode, config.streams, config.granularity, config.depth) == DEFAULT
        assert all(DEFAULT in _rows_of(name) for name in CASES)

    def test_neighbouring_cases_take_every_row(self) -> None:
        neighbours = list(CASES)[: len(ROWS) // ROWS_PER_CASE]
        assert {row for name in neighbours for row in _rows_of(name)} == set(ROWS)

    def test_every_case_with_a_reader_outside_is_known(self) -> None:
        assert {name for name, _ in READERS} >= {"rwkv", "gemma3n", "gpt_neox_japanese", "dit"}

    def test_bits_of_opens_caches_and_outputs(self) -> None:
        class Cache:
            def __init__(self) -> None:
                self.layers = [torch.ones(2)]

        assert len(bits_of({"a": (torch.zeros(1), None), "cache": Cache()})) == 2
        with pytest.raises(AssertionError, match="output 0 differs"):
            assert_same_bits([torch.zeros(2)], [torch.ones(2)])
