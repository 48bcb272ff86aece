"""An embedding whose table stays on the host: only the rows that are asked for are copied.

Note [A stand-in, and no swap]: the class's own forward runs on the device over a small table of
just these rows, so that whatever it does beside the lookup gives the same bits. What it gets as
``self`` is a copy of the embedding, made for this call, that shows the rows as its weight. The
embedding itself is never changed: its weight cannot be lost, whoever calls it from however many
threads, and hooks see the module and the indices that they would see without us.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch_offload import _C
from torch_offload._C import StateError
from torch_offload.tracing import refuse_tracing


class _HandingOn(nn.Embedding):
    """Forwards that do nothing with indices but to hand them on, as transformers writes them."""

    embed_scale: Any
    embed_norm: Any

    def scaled(self, input: torch.Tensor) -> Any:
        return super().forward(input) * self.embed_scale

    def scaled_in_the_tables_dtype(self, input: torch.Tensor) -> Any:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)

    def normed(self, input: torch.Tensor) -> Any:
        return self.embed_norm(super().forward(input))


def _form(function: Any) -> tuple[bytes, tuple[str, ...]] | None:
    """What a function does, by its bytecode: none of the known ones has a constant."""
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_names)


_KNOWN_FORMS = frozenset(
    _form(forward)
    for forward in (
        _HandingOn.scaled,
        _HandingOn.scaled_in_the_tables_dtype,
        _HandingOn.normed,
    )
)


def hands_indices_on(embedding: nn.Embedding) -> bool:
    """Whether a forward would do the same with other indices of the same rows.

    ``nn.Embedding``'s own would, and what is known to call it with the indices as they came. One
    that compares them, as for tokens of its own beside the table, would not.
    """
    if "forward" in vars(embedding):
        return False
    for base in type(embedding).__mro__:
        forward = vars(base).get("forward")
        if base is nn.Embedding:
            return True
        if forward is not None and _form(forward) not in _KNOWN_FORMS:
            return False
    return False


class _GatheringForward:
    """The forward of one embedding. Reading the indices blocks the host until they are known.

    A decoding loop knows them anyway. Any number of threads may call it.
    """

    def __init__(
        self, module: nn.Embedding, name: str, device: torch.device, view: _C.FileView | None
    ) -> None:
        self._embedding = weakref.ref(module)
        self._type = type(module)
        self._name = name
        self._device = device
        self._view = view

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        embedding = self._embedding()
        refuse_tracing(embedding, self._type)
        assert embedding is not None
        plain: Callable[..., Any] = self._type.forward
        given = [*args, *kwargs.values()]
        weight = embedding.weight
        # Whoever has kept this forward may call it when the table is on the device again.
        if weight.device.type != "cpu" or len(given) != 1 or not isinstance(given[0], torch.Tensor):
            return plain(embedding, *args, **kwargs)
        if self._view is not None and weight.data_ptr() == self._view.address:
            self._view.check_unchanged()
        rows, small = _gather(weight, given[0], self._device)
        if torch.is_grad_enabled() and weight.requires_grad:
            rows = _RowsWithoutGradient.apply(weight, rows, self._name)  # type: ignore[no-untyped-call]
        return plain(
            _stand_in(embedding, rows), *[small for _ in args], **dict.fromkeys(kwargs, small)
        )


def gather_rows(
    module: nn.Embedding, name: str, device: torch.device, view: _C.FileView | None = None
) -> None:
    """Makes every call of an embedding gather its rows on the host, and copy only those.

    Args:
        module: The embedding; its forward hands indices on.
        name: Qualified name of its weight.
        device: Where it computes.
        view: Of the checkpoint files that the table may lie in: a file that is not what it was any
            more is an error before a row is read, as the processor's reading it could kill.
    """
    # A forward that somebody has put there since calls ours, which holds as long as the model does.
    vars(module).setdefault("forward", _GatheringForward(module, name, device, view))


def stop_gathering(module: nn.Module) -> None:
    """Undoes `gather_rows`."""
    if isinstance(vars(module).get("forward"), _GatheringForward):
        del vars(module)["forward"]


@torch.inference_mode(False)
@torch.no_grad()
def _gather(
    weight: torch.Tensor, indices: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of the rows that are asked for, and the indices into it."""
    flat = indices.detach().reshape(-1).to("cpu", torch.int64)
    num_rows = weight.shape[0]
    if flat.numel() and not -1 < int(flat.min()) <= int(flat.max()) < num_rows:
        raise IndexError(
            f"expected indices from 0 to {num_rows - 1}, got {int(flat.min())} to {int(flat.max())}"
        )
    wanted, positions = torch.unique(flat, return_inverse=True)
    rows = weight.detach().index_select(0, wanted)
    small = positions.to(indices.dtype).view(indices.shape)
    return rows.to(device), small.to(indices.device)


def _stand_in(embedding: nn.Embedding, rows: torch.Tensor) -> nn.Embedding:
    """What shows the rows as its weight, and all else as the embedding does."""
    kind = type(embedding)
    stand_in = kind.__new__(kind)
    vars(stand_in).update(vars(embedding), _parameters={"weight": rows})
    vars(stand_in).pop("forward", None)
    stand_in.padding_idx = None  # it says something of gradients only
    return stand_in


class _RowsWithoutGradient(torch.autograd.Function):
    """Says in a backward that the table gets no gradient, rather than leave it out."""

    @staticmethod
    def forward(weight: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
        """Returns the rows."""
        return rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keeps what there is to say."""
        ctx.name = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Raises."""
        raise StateError(
            f"expected no gradient of {ctx.name!r}, got a backward to it: its rows are gathered on "
            f"the host; keep it on the device with offload(..., resident=[{ctx.name!r}]), or call "
            "requires_grad_(False) on it"
        )
