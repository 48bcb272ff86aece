"""The explanation of a weight that was read outside its unit's call, on errors as a GPU gives them.

On the host device such a read works, so torch's error is raised here by the test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.python import expect
from tests.python.dropin import Stack, rows, streamed, tiny_stack

HOST = torch.device("cpu")
_TEXTS = [
    "Expected all tensors to be on the same device, but got mat2 is on cpu, different from others",
    "Expected all tensors to be on the same device, but found two devices, cuda:0 and cpu!",
    "Tensor for argument #2 'mat1' is on CPU, but expected same device as cuda:0 (device type)",
]


def _fail_in(model: Stack, name: str, error: BaseException) -> None:
    def fail(*args: Any) -> None:
        raise error

    model.get_submodule(name).forward = fail  # type: ignore[method-assign]  # the planted error


class _Reads(Stack):
    """Reads a weight of another module in its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1].mlp.forward(super().forward(x))  # type: ignore[operator]


@pytest.mark.parametrize("text", _TEXTS)
def test_mismatch_names_weights_and_cure(text: str) -> None:
    model = _Reads()

    class Raises(torch.nn.Module):
        """Owns the weights that are read, and fails as a kernel on a GPU would."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.up, self.down = inner.up, inner.down

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.up.weight.data_ptr() in at_rest:
                raise RuntimeError(text)
            return self.down(self.up(x))

    for block in model.blocks:
        block.mlp = Raises(block.mlp)
    at_rest: set[int] = set()
    with streamed(model, HOST) as handle, torch.no_grad():
        at_rest.add(model.blocks[1].mlp.up.weight.data_ptr())
        with pytest.raises(RuntimeError) as caught:
            model(rows(HOST))
        message = str(caught.value)
        assert message.startswith(text)
        assert message.count("torch_offload:") == 1
        names = message.split("resident=[")[1].split("]")[0]
        cure = [name.strip(" '") for name in names.split(",")]
        assert cure == [
            f"blocks.1.mlp.{leaf}.{kind}" for leaf in ("up", "down") for kind in ("weight", "bias")
        ]
        expect.assert_at_rest(handle)
    # The cure is one: the names can be given as they are.
    at_rest.clear()
    with streamed(model, HOST, resident=cure), torch.no_grad():
        model(rows(HOST))


class _ReadsByName(Stack):
    """Reads a weight that it holds in a variable: as a module, or as a tensor."""

    how = "module"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        if self.how == "module":
            leaf = self.blocks[1].attn
            raise RuntimeError(f"{_TEXTS[0]}: {leaf}")
        bias = self.blocks[2].mlp.down.bias
        raise RuntimeError(f"{_TEXTS[0]}: {bias.shape}")


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("module", ["blocks.1.attn.weight", "blocks.1.attn.bias"]),
        ("tensor", ["blocks.2.mlp.down.bias"]),
    ],
)
def test_mismatch_names_what_the_reader_has_at_hand(how: str, names: list[str]) -> None:
    model = _ReadsByName()
    model.how = how
    with streamed(model, HOST), torch.no_grad():
        with pytest.raises(RuntimeError) as caught:
            model(rows(HOST))
        assert str(caught.value).endswith(f"resident={names}")


def test_mismatch_of_an_input_says_which_device() -> None:
    model = tiny_stack()
    with streamed(model, HOST), torch.no_grad():
        _fail_in(model, "embed", RuntimeError(_TEXTS[0]))
        with pytest.raises(
            RuntimeError, match=r"inputs lie on meta, but the model runs on cpu"
        ) as e:
            model(x=rows(torch.device("meta")))
        assert "resident=" not in str(e.value)


class _CallsOrForwards(Stack):
    """Calls a unit, or its forward alone, which leaves its weights at rest."""

    calls = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mlp = self.blocks[1].mlp
        return mlp(x) if self.calls else mlp.forward(x)  # type: ignore[operator]


@pytest.mark.parametrize("calls", [True, False])
def test_mismatch_inside_a_unit_blames_no_weight_of_it(calls: bool) -> None:
    model = _CallsOrForwards()
    model.calls = calls
    with streamed(model, HOST), torch.no_grad():
        _fail_in(model, "blocks.1.mlp.up", RuntimeError(_TEXTS[0]))
        with pytest.raises(RuntimeError, match="torch_offload") as caught:
            model(rows(HOST))
    message = str(caught.value)
    assert ("inside the call of a unit" in message) == calls
    assert ("'blocks.1.mlp.up.weight'" in message) != calls


def test_mismatch_of_something_else_names_no_weight() -> None:
    model = tiny_stack()
    with streamed(model, HOST), torch.no_grad():
        _fail_in(model, "embed", RuntimeError(_TEXTS[0]))
        with pytest.raises(RuntimeError, match=r"resident=\["):
            model(rows(HOST))


@pytest.mark.parametrize("error", [RuntimeError("singular matrix"), ValueError(_TEXTS[0])])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    model = tiny_stack()
    with streamed(model, HOST), torch.no_grad():
        _fail_in(model, "blocks.1.attn", error)
        with pytest.raises(type(error)) as caught:
            model(rows(HOST))
        assert caught.value is error
        assert "torch_offload" not in str(error)
