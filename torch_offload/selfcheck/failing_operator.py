"""Lets one operator of torch fail."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class FailingOperator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at the k-th operator of a block, counted from one: in a layer, in a copy, anywhere.

    Attributes:
        failed: The name of that operator; empty until it has come.
    """

    def __init__(self, k: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = k
        self._error = error
        self.failed = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> None:
        """Counts an operator, or something that goes for one, which fails if its time has come."""
        self._left -= 1
        if self._left == 0:
            self.failed = name
            raise self._error(f"planted failure of {name}")
