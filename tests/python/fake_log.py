"""Small op logs with times, written down call by call, for tests of what reads them."""

from __future__ import annotations

from dataclasses import dataclass, field

MS = 1_000_000


@dataclass(frozen=True)
class FakeOp:
    """One call, with the fields that `_C.Op` has."""

    kind: str
    stream: int | None = None
    event: int | None = None
    unit: int | None = None
    generation: int = 0
    memory: tuple[int, int] = (0, 0)
    source: tuple[int, int] = (0, 0)
    host_time_ns: int = 0
    begin_ns: int | None = None
    end_ns: int | None = None


@dataclass(frozen=True)
class FakeUnit:
    """One unit, with the fields that `_C.Unit` has."""

    name: str
    size_bytes: int
    layer_index: int
    kind: str


def halves(layers: int, size_bytes: int = 2**20) -> list[FakeUnit]:
    """Attention and FFN of some layers."""
    return [
        FakeUnit(f"layers.{layer}.{module}", size_bytes, layer, kind)
        for layer in range(layers)
        for module, kind in (("self_attn", "mha"), ("mlp", "ffn"))
    ]


@dataclass
class FakeLog:
    """A log that is written by playing: each stream goes on from where it was, in ns.

    The host takes 1,000 ns a call. `record_times` is off where a device does not tell when a stream
    reached a record, as CUDA need not.
    """

    stream_names: list[str]
    unit_names: list[str]
    has_times: bool = True
    record_times: bool = True
    ops: list[FakeOp] = field(default_factory=list)
    host_ns: int = 0
    _reached: dict[int, int] = field(default_factory=dict)
    _recorded: dict[int, int] = field(default_factory=dict)

    def _begin(self, stream: int) -> int:
        self.host_ns += 1000
        return max(self._reached.get(stream, 0), self.host_ns)

    def _append(self, kind: str, begin_ns: int | None, end_ns: int | None, **fields: int) -> None:
        self.ops.append(
            FakeOp(kind, host_time_ns=self.host_ns, begin_ns=begin_ns, end_ns=end_ns, **fields)
        )

    def copy(self, stream: int, unit: int, ns: int, generation: int = 1) -> None:
        begin = self._begin(stream)
        self._reached[stream] = begin + ns
        fields = {"stream": stream, "unit": unit, "generation": generation}
        self._append("copy", begin, begin + ns, **fields)

    def compute(self, stream: int, unit: int, ns: int, generation: int = 1) -> None:
        fields = {"stream": stream, "unit": unit, "generation": generation}
        begin = self._begin(stream)
        self._append("read", begin, begin, **fields)
        self._begin(stream)
        self._reached[stream] = begin + ns
        self._append("read_end", begin + ns, begin + ns, **fields)

    def record(self, stream: int, event: int) -> None:
        at = self._begin(stream)
        self._recorded[event] = at
        times = (at, at) if self.record_times else (None, None)
        self._append("record", *times, stream=stream, event=event)

    def wait(self, stream: int, event: int) -> None:
        begin = self._begin(stream)
        self._reached[stream] = max(begin, self._recorded[event])
        self._append("wait", begin, self._reached[stream], stream=stream, event=event)

    def synchronize(self, stream: int) -> None:
        begin = self._begin(stream) * 0 + self.host_ns
        self.host_ns = max(self.host_ns, self._reached.get(stream, 0))
        self._append("synchronize", begin, self.host_ns, stream=stream)


COPY, COMPUTE = 0, 1


def pipeline_log(layers: int = 2, passes: int = 1, *, record_times: bool = True) -> FakeLog:
    """The reference layer (SPEC: 6.74, 152.42, 13.54, 25.94 ms), each unit copied ahead of its use.

    Two places a kind: the copy of a unit waits for the use of its namesake two layers before.
    """
    units = halves(layers)
    log = FakeLog(["weight_h2d", "caller"], [u.name for u in units], record_times=record_times)
    copy_ns = {"mha": int(6.74 * MS), "ffn": int(13.54 * MS)}
    compute_ns = {"mha": int(152.42 * MS), "ffn": int(25.94 * MS)}
    count = len(units)
    sequence = [(unit, generation) for generation in range(1, passes + 1) for unit in range(count)]

    def onload(step: int) -> None:
        unit, generation = sequence[step]
        if step >= 2:
            log.wait(COPY, count + sequence[step - 2][0])
        log.copy(COPY, unit, copy_ns[units[unit].kind], generation)
        log.record(COPY, unit)

    onload(0)
    for step, (unit, generation) in enumerate(sequence):
        log.wait(COMPUTE, unit)
        if step == 0 and len(sequence) > 1:
            onload(1)
        log.compute(COMPUTE, unit, compute_ns[units[unit].kind], generation)
        log.record(COMPUTE, count + unit)
        if step + 2 < len(sequence):
            onload(step + 2)
    return log


def sync_log(layers: int = 2) -> FakeLog:
    """The same on one stream, the host waiting after each step."""
    units = halves(layers)
    log = FakeLog(["caller"], [unit.name for unit in units])
    copy_ns = {"mha": int(6.74 * MS), "ffn": int(13.54 * MS)}
    compute_ns = {"mha": int(152.42 * MS), "ffn": int(25.94 * MS)}
    for unit, of in enumerate(units):
        log.copy(0, unit, copy_ns[of.kind])
        log.record(0, unit)
        log.synchronize(0)
        log.compute(0, unit, compute_ns[of.kind])
        log.synchronize(0)
    return log
