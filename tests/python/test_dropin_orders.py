"""Passes that go another way than the one before, or break off."""

from __future__ import annotations

import pytest
import torch

from tests.python import expect
from tests.python.dropin import (
    IDLE_WARNING,
    assert_streams_like_plain,
    plain_on,
    raising,
    rows,
    streamed,
    tiny_stack,
)


@pytest.mark.parametrize(
    "sequence",
    [
        pytest.param([0, 1], id="early-exit"),
        pytest.param([0, 2, 3], id="skipped"),
        pytest.param([0, 1, 1, 2, 1, 3], id="repeated"),
        pytest.param([3, 2, 1, 0], id="reversed"),
        pytest.param([2], id="one"),
    ],
)
@pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")
@pytest.mark.parametrize("mode", ["sync", "streams", "events", "pipeline"])
def test_other_sequences_equal_plain_and_are_learned(
    device: torch.device, sequence: list[int], mode: str
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    with streamed(model, device, mode=mode) as handle:
        model.sequence = plain.sequence = sequence
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=4)
        model.sequence = plain.sequence = [0, 1, 2, 3]
        assert_streams_like_plain(model, plain, handle, lambda m: m(x), forwards=3)


@pytest.mark.filterwarnings(f"ignore:{IDLE_WARNING}:UserWarning")
def test_sequence_that_changes_every_time_is_right(device: torch.device) -> None:
    model = tiny_stack(5)
    plain = plain_on(model, device)
    x = rows(device)
    generator = torch.Generator().manual_seed(6)
    with streamed(model, device) as handle, torch.no_grad():
        with expect.watch(handle) as calls:
            for _ in range(40):
                length = int(torch.randint(1, 8, (), generator=generator))
                sequence = torch.randint(0, 5, (length,), generator=generator).tolist()
                model.sequence = plain.sequence = sequence
                assert torch.equal(model(x), plain(x))
        assert len(calls.passes) == 40
        for one, expected in zip(calls.passes, calls.expected, strict=True):
            if expected.is_exact:
                assert one.onloads == expected.onloads
            else:
                assert one.onloads >= expected.onloads


@pytest.mark.parametrize("k", range(10))
@pytest.mark.parametrize("streams", ["shared", "split"])
def test_exception_in_any_layer_leaves_the_model_at_rest(
    device: torch.device, k: int, streams: str
) -> None:
    model = tiny_stack()
    plain = plain_on(model, device)
    x = rows(device)
    modules = [model.embed]
    for block in model.blocks:
        modules += [block.attn, block.mlp.down]
    modules.append(model)
    with streamed(model, device, streams=streams) as handle, torch.no_grad():
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
        hook = modules[k].register_forward_hook(raising(ValueError("planted")))
        with expect.watch(handle) as calls:
            for _ in range(2):
                with pytest.raises(ValueError, match="planted"):
                    model(x)
                expect.assert_at_rest(handle)
        assert not any(one.completed for one in calls.passes)
        hook.remove()
        assert_streams_like_plain(model, plain, handle, lambda m: m(x))
