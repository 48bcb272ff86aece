"""Runs the scheduler in virtual time: the real C++ pipeline, on a device whose durations are given.

Nothing here knows how a mode works. What comes out is what the pipeline submitted, and when a
device with these durations would have run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_offload import _C
from torch_offload.attribution import Attribution, attribute
from torch_offload.reference import CallCosts, Figures, LayerTimes
from torch_offload.trace import Trace, trace_of

MODES = ("sync", "streams", "events", "pipeline")
_NS_PER_MS = 1e6
# The plan needs sizes, of which only the proportions matter when durations are given.
_BYTES_PER_MS = 2**20


@dataclass(frozen=True)
class Run:
    """A simulated run of some passes.

    Attributes:
        plan: What it ran.
        mode: How.
        streams: The stream layout.
        result: What the core says of it.
    """

    plan: _C.Plan
    mode: str
    streams: str
    result: _C.SimResult

    def pass_ms(self, index: int) -> float:
        """From the end of the pass before, or from the start, to the end of this one."""
        ends = self.result.pass_end_ns
        begin_ns = ends[index - 1] if index else self.result.pass_begin_ns[0]
        return (ends[index] - begin_ns) / _NS_PER_MS

    def trace(self, title: str = "") -> Trace:
        """What it did."""
        return trace_of(self.result.log, title=title or self.mode, units=self.plan.units)

    def attribution(self, index: int) -> Attribution:
        """Where the time of one pass went."""
        trace = self.trace()
        ends = self.result.pass_end_ns
        begin_ns = ends[index - 1] if index else self.result.pass_begin_ns[0]
        return attribute(trace, begin_ns - trace.origin_ns, ends[index] - trace.origin_ns)


def streams_for(mode: str, streams: str) -> str:
    """`sync` knows one stream, whatever the layout of the others."""
    return "shared" if mode == "sync" else streams


def run_plan(
    plan: _C.Plan,
    costs: _C.SimCosts,
    *,
    mode: str,
    streams: str = "shared",
    passes: Sequence[Sequence[int]],
    log: bool = True,
    packed_bytes: Sequence[int] = (),
) -> Run:
    """Runs a plan. Blocks for about a microsecond per call of the pipeline.

    Args:
        plan: It.
        costs: What work takes.
        mode: One of `MODES`.
        streams: ``"shared"`` or ``"split"``.
        passes: Units of each forward, as they are used.
        log: Whether to keep the log.
        packed_bytes: Of the units that the plan packs.

    Raises:
        ValueError: For an invalid mode, layout or costs.
    """
    result = _C.simulate(plan, mode, streams, costs, passes, log, packed_bytes=packed_bytes)
    return Run(plan, mode, streams, result)


def reference_plan(times: LayerTimes, layers: int, ahead: float | None = None) -> _C.Plan:
    """Attention and FFN of so many layers, every unit streamed.

    Args:
        times: Durations of the four steps.
        layers: How many.
        ahead: How many layers copies may run ahead; None for the default, which is one.
    """
    sizes = {
        kind: _C.aligned_size(max(1, round(ms * _BYTES_PER_MS)))
        for kind, ms in (("mha", times.mha_h2d_ms), ("ffn", times.ffn_h2d_ms))
    }
    units = [
        _C.Unit(f"layers.{layer}.{module}", sizes[kind], layer, kind)
        for layer in range(layers)
        for module, kind in (("self_attn", "mha"), ("mlp", "ffn"))
    ]
    return _C.make_plan(units, None if ahead is None else int(ahead * sum(sizes.values())))


def run_layers(
    times: LayerTimes,
    layers: int,
    *,
    mode: str,
    streams: str = "shared",
    passes: int = 1,
    ahead: float | None = None,
    calls: CallCosts | None = None,
    num_copy_engines: int = 1,
) -> Run:
    """Runs so many equal layers.

    Args:
        times: Durations of the four steps.
        layers: How many.
        mode: One of `MODES`.
        streams: ``"shared"`` or ``"split"``.
        passes: Forwards, one right after the other.
        ahead: How many layers copies may run ahead; None for the default.
        calls: What each call costs the host; None for nothing.
        num_copy_engines: How many copies can run at once.
    """
    plan = reference_plan(times, layers, ahead)
    calls = calls or CallCosts(0, 0, 0, 0)
    costs = _C.SimCosts(
        copy_bytes_per_second=None,
        copy_ns=[_ns(times.mha_h2d_ms), _ns(times.ffn_h2d_ms)] * layers,
        compute_ns=[_ns(times.mha_compute_ms), _ns(times.ffn_compute_ms)] * layers,
        call_ns={
            "copy": _ns(calls.copy_ms),
            "launch": _ns(calls.launch_ms),
            "record": _ns(calls.record_ms),
            "wait": _ns(calls.wait_ms),
        },
        num_copy_engines=num_copy_engines,
    )
    order = list(range(2 * layers))
    return run_plan(plan, costs, mode=mode, streams=streams, passes=[order] * passes)


def figures_of(
    times: LayerTimes, layers: int, batch: int, mode: str, streams: str = "shared"
) -> Figures:
    """The rows of the reference table for one of our modes.

    Durations are simulated with a host whose calls cost nothing, so that they depend on the four
    inputs alone; the host's time comes from a second run in which each call costs what the
    reference's does.
    """
    layout = streams_for(mode, streams)
    run = run_layers(times, layers, mode=mode, streams=layout, passes=2)
    steady = run.attribution(1)
    costed = run_layers(times, layers, mode=mode, streams=layout, calls=CallCosts())
    host_ns = costed.result.host_end_ns[0] - costed.result.pass_begin_ns[0]
    total_ms = run.pass_ms(0)
    return Figures(
        layer_ms=run.pass_ms(1) / layers,
        total_ms=total_ms,
        cpu_ms=host_ns / layers / _NS_PER_MS,
        blocked_share=costed.result.host_blocked_ns / host_ns,
        hidden_share=steady.hidden_share,
        streams_at_once=steady.streams_at_once,
        tokens_per_second=batch / total_ms * 1e3,
        gpu_share=steady.compute_ns / steady.span_ns,
    )


def _ns(ms: float) -> int:
    return round(ms * _NS_PER_MS)
