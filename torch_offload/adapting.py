"""``gpu_budget="auto"`` and ``on_oom``: what forwards need of the device, learned from them.

Until a forward has run, nobody knows what its activations and its cache take, so every unit
streams. Afterwards weights get what is left. Forwards are told apart by how many tokens they are
given, in classes of a factor of two: the first of a class is measured, and one that is larger than
any before makes room first, as much as its tokens let expect.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from torch_offload._C import StateError
from torch_offload.budget import AUTO
from torch_offload.config import Config
from torch_offload.debugging import LOGGER
from torch_offload.memory import Memory
from torch_offload.packing_watch import PackingWatch
from torch_offload.sizes import format_size

# A budget that differs by less than this part moves nothing.
_MUCH = 0.05
# Every so many forwards it is asked whether others have taken memory meanwhile, or a cache has.
_PRESSURE_PERIOD = 32


def tokens_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many tokens a call is given: those of its first tensor with a batch and a length.

    Of ``[N, L]`` and ``[N, L, H]`` that is N times L; of latents, ``[N, C, H, W]`` and
    ``[N, C, F, H, W]``, N times the pixels of one channel.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            batch, length, *others = value.shape
            return batch * (math.prod(others) if len(others) > 1 else length)
    return 1


class Adaptation:
    """Watches the outermost calls of one model between which its plan may change.

    Args:
        model: Held weakly, like the owner of the methods that follow.
        memory: Of the device; None where there is none to adapt to.
        config: Of `offload`.
        weights_bytes: What weights take on the device now.
        shrink: Gives back all resident units of a model; returns how many bytes.
        grow: Plans a model anew for a budget.
        packing_watch: Asked after each of these calls.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: Memory | None,
        config: Config,
        weights_bytes: Callable[[], int],
        shrink: Callable[[nn.Module], int],
        grow: Callable[[nn.Module, int], None],
        packing_watch: PackingWatch,
    ) -> None:
        self._model = weakref.ref(model)
        self._memory = memory
        self._weights_bytes = weakref.WeakMethod(weights_bytes)
        self._shrink = weakref.WeakMethod(shrink)
        self._grow = weakref.WeakMethod(grow)
        self._packing_watch = packing_watch
        self._needs: dict[int, int] = {}  # by class of tokens: bytes beside the weights
        self._allocated_before = 0
        self._measured: int | None = None  # the class of the running forward, if it is the first
        self._num_forwards = 0
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Goes by other options from now on."""
        self._is_auto = config.gpu_budget == AUTO
        self._headroom = config.headroom_bytes
        self._shrinks = config.on_oom == "shrink"

    def budget(self, extra_bytes: int = 0) -> int | None:
        """What weights may take now; None before a forward has shown what it needs.

        Args:
            extra_bytes: What a forward will need beyond what any has needed.
        """
        now = self._weights_bytes()
        if self._memory is None or not self._needs or now is None:
            return None
        needed = max(self._needs.values()) + extra_bytes
        free = self._memory.available_bytes() - self._headroom - needed
        return max(0, now() + free)

    def before(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Called before an outermost call, with what it is given."""
        if not self._is_auto or self._memory is None:
            return
        kind = tokens_in(args, kwargs).bit_length()
        self._num_forwards += 1
        if kind in self._needs:
            if self._num_forwards % _PRESSURE_PERIOD == 0:
                self._plan_anew(only_less=True)
            return
        if self._needs and kind > max(self._needs):
            known = max(self._needs)
            expected = self._needs[known] << (kind - known)
            self._plan_anew(expected - max(self._needs.values()), only_less=True)
        self._memory.reset_peak()
        self._allocated_before = self._memory.allocated_bytes()
        self._measured = kind

    def after(self) -> None:
        """Called when an outermost call has returned."""
        self._packing_watch.tell()
        kind, self._measured = self._measured, None
        if kind is None or self._memory is None:
            return
        is_first = not self._needs
        self._needs[kind] = max(0, self._memory.peak_bytes() - self._allocated_before)
        LOGGER.info("a forward of class %d needs %s", kind, format_size(self._needs[kind]))
        with suppress(StateError):  # another thread has removed the handle meanwhile
            self._plan_anew(always=is_first)

    def _plan_anew(
        self, extra_bytes: int = 0, *, always: bool = False, only_less: bool = False
    ) -> None:
        """Plans for what weights may take now, if that is much more or less than they take."""
        budget, now = self.budget(extra_bytes), self._weights_bytes()
        model, grow = self._model(), self._grow()
        if budget is None or now is None or model is None or grow is None:
            return
        weights_bytes = now()
        difference = budget - weights_bytes
        if only_less and difference > 0:
            return
        if always or abs(difference) > _MUCH * weights_bytes:
            grow(model, budget)

    def failed(self, error: BaseException) -> None:
        """Called when an outermost call has raised; explains and heeds a lack of device memory."""
        kind, self._measured = self._measured, None
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) and "torch_offload" not in text:
            error.args = (f"{text}\ntorch_offload: {self._heed(kind)}", *error.args[1:])

    def _heed(self, kind: int | None) -> str:
        cure = (
            "set a smaller gpu_budget (handle.replan(gpu_budget=...) between forwards), or give "
            "the forward fewer tokens"
        )
        shrink, model = self._shrink(), self._model()
        if not self._shrinks or shrink is None or model is None:
            return f"beside the weights there is too little room for this forward; {cure}"
        try:
            given_back = shrink(model)
        except (ValueError, MemoryError, RuntimeError) as error:
            return f"resident units could not be given back ({error}); {cure}"
        if given_back <= 0:
            return f"no unit is resident that could be given back; {cure}"
        if self._is_auto and kind is not None:
            # It needed more than was left: units come back when a forward has shown how much.
            self._needs.clear()
        return (
            f"gave back {format_size(given_back)} of resident units, so that the next forward has "
            "that room; this one was not repeated, as its cache is half written: call again with a "
            "new one"
        )
