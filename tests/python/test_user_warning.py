"""Warnings show the line that calls the model: so Python's own filter hides no handle's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.python.dropin import rows, streamed, tiny_llama, tiny_stack, tokens
from torch_offload import _C, offload
from torch_offload.devices import devices_made_by
from torch_offload.user_warning import warn_user

HOST = torch.device("cpu")


@contextmanager
def shown_by_default() -> Iterator[list[warnings.WarningMessage]]:
    """What Python shows unless told otherwise: a warning once a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield caught


def lines_of(
    shown: list[warnings.WarningMessage], category: type[Warning], begin: str
) -> list[int]:
    """The lines of this file that the warnings show, each once, in order."""
    for warning in shown:
        assert warning.category is category
        assert str(warning.message).startswith(f"torch_offload: {begin}")
        assert warning.filename == __file__
    return list(dict.fromkeys(warning.lineno for warning in shown))


def test_grad_mode_is_warned_of_once_for_each_handle(device: torch.device) -> None:
    one, other = tiny_llama(), tiny_llama()  # whose layers are called by a line of transformers
    ids = tokens(device)
    with streamed(one, device), streamed(other, device), shown_by_default() as shown:
        one(ids)
        one(ids)
        other(ids)
    assert len(shown) == 2
    first, second = lines_of(shown, UserWarning, "this forward runs in grad mode")
    assert second == first + 2


def test_grad_mode_of_a_unit_alone_is_warned_of_at_its_call(device: torch.device) -> None:
    model = tiny_stack()
    with streamed(model, device), shown_by_default() as shown:
        model.blocks[1](rows(device))
    assert len(lines_of(shown, UserWarning, "this forward runs in grad mode")) == 1


def test_cache_that_is_of_no_use_is_warned_of_for_each_handle(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=256, intermediate_size=512).bfloat16()
    options: dict[str, Any] = {"transport": "packed", "packed_cache": tmp_path}
    offload(model, HOST, **options).remove()
    with shown_by_default() as shown:
        model.model.layers[1].mlp.up_proj.weight.data.neg_()
        offload(model, HOST, **options).remove()
        model.model.layers[1].mlp.up_proj.weight.data.neg_()
        offload(model, HOST, **options).remove()
    assert len({str(warning.message) for warning in shown}) == 1
    assert len(shown) == 2
    first, second = lines_of(shown, RuntimeWarning, "expected a cache of packed weights")
    assert second == first + 2


def test_read_that_comes_too_early_is_warned_of_for_each_handle() -> None:
    fault = _C.DeviceFault("synchronizes")

    def make(device: torch.device) -> _C.Device:
        return _C.faulty_device(device, fault, seed=1, longest_delay_us=100_000)

    one, other = tiny_llama(), tiny_llama()
    ids = tokens(HOST)
    with (
        torch.inference_mode(),
        devices_made_by(make),
        streamed(one, HOST, debug=True),
        streamed(other, HOST, debug=True),
        shown_by_default() as shown,
    ):
        try:
            fault.is_armed = True
            one(ids)
            other(ids)
        finally:
            fault.is_armed = False
    first, second = lines_of(shown, RuntimeWarning, "possible race: the copy of unit")
    assert second == first + 1


def test_warning_outside_of_any_call_shows_the_innermost_line() -> None:
    with shown_by_default() as shown:
        warn_user("of nothing", RuntimeWarning)
        warn_user("of nothing")
    assert [warning.category for warning in shown] == [RuntimeWarning, UserWarning]
    assert {warning.filename for warning in shown} == {__file__}
