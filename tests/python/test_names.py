"""Names as messages and pictures show them."""

from __future__ import annotations

import pytest

from torch_offload.names import first_line, listed


@pytest.mark.parametrize(
    ("names", "text"),
    [("", ""), ("a", "'a'"), ("ab", "'a', 'b'"), ("abc", "'a', 'b' and 1 more")],
)
def test_names_are_listed_up_to_so_many(names: str, text: str) -> None:
    assert listed(iter(names), 2) == text


def test_first_line_of_an_error_is_its_type_if_it_says_nothing() -> None:
    assert first_line(ValueError("short\nlong")) == "short"
    assert first_line(KeyError()) == "KeyError"
