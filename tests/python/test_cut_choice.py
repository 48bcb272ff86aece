"""`granularity="auto"`: which cut a plan takes, and how near a token then comes to the link."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import torch_offload
from tests.python.configs import LLAMA
from tests.python.dropin import tiny_llama
from tests.python.test_leaves_recut import ReaderBlock
from torch_offload.config import Config
from torch_offload.model_files import build_on_meta, read_config
from torch_offload.planning import Planned, cut_model, least_budget, plan_best
from torch_offload.prediction import Scenario, run_scenario

SHARES = (0.18, 0.35, 0.5, 0.7, 0.9)
# One token on an H200: copies, kernels that read weights, and what attention does beside that.
LINK_BYTES_PER_S = 55.2e9
MEMORY_BYTES_PER_S = 4.0e12
COPY_LATENCY_NS = 5_000
ATTENTION_NS = 130_000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    path: Path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps(LLAMA))
    return build_on_meta(read_config(path))


def planned(model: nn.Module, granularity: str, share: float) -> Planned:
    config = Config(granularity=granularity)  # type: ignore[arg-type]  # checked there
    cuts = cut_model(model, config, knows_leaves=True)
    budget = int(share * sum(parameter.nbytes for parameter in model.parameters()))
    found = plan_best(cuts, config, budget)
    assert found.device_bytes <= budget
    return found


def token_ms(found: Planned) -> tuple[float, float]:
    """Predicted, and what the link alone needs for what streams."""
    units, places = found.plan.units, found.plan.places
    attention = sum(unit.kind == "mha" for unit in units) / LLAMA["num_hidden_layers"]
    compute = [
        unit.size_bytes / MEMORY_BYTES_PER_S * 1e9
        + (ATTENTION_NS / attention if unit.kind == "mha" else 0)
        for unit in units
    ]
    copies = [unit.size_bytes / LINK_BYTES_PER_S * 1e9 + COPY_LATENCY_NS for unit in units]
    scenario = Scenario(
        units=units,
        compute_ns=[round(ns) for ns in compute],
        link_bytes_per_second=LINK_BYTES_PER_S,
        copy_ns=[round(ns) for ns in copies],
    )
    forward_ms = run_scenario(scenario, found.plan, passes=4, log=False).pass_ms(3)
    streamed = sum(u.size_bytes for u, place in zip(units, places, strict=True) if place)
    return forward_ms, streamed / LINK_BYTES_PER_S * 1e3


@pytest.mark.parametrize("share", SHARES, ids=[f"{share:.0%}" for share in SHARES])
def test_token_takes_little_more_than_the_link_needs(llama: nn.Module, share: float) -> None:
    forward_ms, link_ms = token_ms(planned(llama, "auto", share))
    assert forward_ms <= 1.03 * link_ms


def test_leaves_are_taken_where_halves_leave_room_for_one_place_only(llama: nn.Module) -> None:
    """A prompt takes eleven times as long there, and gains nothing: a token's gain counts alike."""
    halves, leaves = planned(llama, "sublayer", 0.9), planned(llama, "auto", 0.9)
    assert (halves.granularity, leaves.granularity) == ("sublayer", "module")
    halves_ms, link_ms = token_ms(halves)
    assert halves_ms > 1.03 * link_ms
    assert token_ms(leaves)[0] < 0.97 * halves_ms


@pytest.mark.parametrize("share", SHARES, ids=[f"{share:.0%}" for share in SHARES])
def test_auto_is_not_slower_than_halves(llama: nn.Module, share: float) -> None:
    halves, chosen = planned(llama, "sublayer", share).choice, planned(llama, "auto", share).choice
    assert halves
    assert chosen
    ratios = [then / now for now, then in zip(halves.forward_ns, chosen.forward_ns, strict=True)]
    assert sum(ratios) <= len(ratios)


@pytest.mark.parametrize("knows_leaves", [False, True])
def test_auto_needs_what_halves_need(llama: nn.Module, knows_leaves: bool) -> None:
    """A model runs by its halves until a pass has shown its leaves."""
    config = Config(granularity="auto")
    cuts = cut_model(llama, config, knows_leaves=knows_leaves)
    assert [cut.granularity for cut in cuts] == ["sublayer", "module"]
    least, least_of_leaves = map(least_budget, cuts)
    assert least_of_leaves < least
    with pytest.raises(ValueError, match=f"gpu_budget of at least {least} bytes"):
        plan_best(cuts, config, least - 1)
    assert plan_best(cuts, config, least).device_bytes <= least


def test_leaves_for_which_there_is_no_room_leave_the_halves() -> None:
    """Beside leaves the small weights stay, and of so many blocks they are more than a unit."""
    model = nn.Sequential(*(ReaderBlock(64) for _ in range(64)))
    cuts = cut_model(model, Config(granularity="auto"))
    least, least_of_leaves = map(least_budget, cuts)
    assert least < least_of_leaves, "the test says nothing"
    assert plan_best(cuts, Config(granularity="auto"), least).granularity == "sublayer"


@pytest.mark.parametrize("granularity", ["sublayer", "layer", "module", "auto"])
def test_least_that_is_named_is_enough_and_the_advice_would_help(granularity: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="gpu_budget of at least") as caught:
        torch_offload.offload(model, "cpu", granularity=granularity, gpu_budget=1)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "granularity='module'" not in text, "its first pass runs by halves"
    assert ("granularity='sublayer'" in text) == (granularity == "layer")
    least = int(text.split("at least ")[1].split()[0])
    torch_offload.offload(model, "cpu", granularity=granularity, gpu_budget=least).remove()  # type: ignore[arg-type]
