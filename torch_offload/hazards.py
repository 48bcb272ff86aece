"""Whether a recorded run could have gone wrong: the hazard checker over its op log."""

from __future__ import annotations

from torch_offload import _C

#: Two ops of a log, and the edge missing between them; `message` says what to do, in one sentence.
Finding = _C.Finding


def check(log: _C.OpLog) -> list[Finding]:
    """Decides from a log alone whether its order can go wrong, however fast or slow the device is.

    By happens-before over streams, events and the host: two accesses to the same bytes, one of them
    a write, that nothing orders; a wait for an event that was recorded too early or never; memory
    freed, reused or read by the host while it is in flight; kernels that read other bytes than
    those of their unit. Whether it did go wrong this time is another question. Does not block.

    Args:
        log: What `Handle.record` or a simulation has kept. Only what is in it is judged.

    Returns:
        At most 100 findings; none means that every order the log allows reads what was meant.

    Raises:
        TypeError: If it is no log.

    Example:
        >>> with handle.record() as log:  # doctest: +SKIP
        ...     model(**inputs)
        >>> torch_offload.check(log)  # doctest: +SKIP
        []
    """
    if not isinstance(log, _C.OpLog):
        raise TypeError(
            f"expected an OpLog, got {type(log).__name__}; keep one by `with handle.record() "
            "as log:` around forwards"
        )
    return _C.check(log)
