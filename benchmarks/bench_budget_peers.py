"""Other tools and ours within the same device memory, one token, by a model of four layers.

They take seconds for what the yardstick weighs.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from clocks import DEVICE, ON_GPU, Run, device_ms, spread, synchronize
from peers import AccelerateAuto, AirLLM
from records import Part
from yardstick import Stage, Workload, bound, forward, require_equal, skeleton

import torch_offload

# Parts of all weights that a budget allows.
_SHARES = (0.35, 0.6, 0.85)
_LIMIT_BYTES = 4 * 2**30
# Of our weights; the rest is for activations and what the libraries take.
_BUDGET = "3.5GiB"


def _peak_bytes(run: Run) -> int | None:
    """Device memory in use at the peak of a run, weights included; None without a GPU."""
    if not ON_GPU:
        run()
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    run()
    synchronize()
    peak = torch.cuda.max_memory_allocated(DEVICE)
    assert peak <= _LIMIT_BYTES, f"{peak} bytes are more than the {_LIMIT_BYTES} allowed"
    return peak


@pytest.mark.parametrize("share", _SHARES, ids=[f"{share:.0%}" for share in _SHARES])
def bench_accelerate_auto(part: Part, stage: Stage, peer: Workload, share: float) -> None:
    """Accelerate's ``device_map="auto"`` and ours, each within the same budget."""
    tokens = peer.tokens(peer.shapes[0])
    plain = stage.plain(peer)
    budget = int(share * sum(parameter.nbytes for parameter in plain.parameters()))
    streamed = stage.streamed(peer, gpu_budget=budget)
    require_equal(plain, streamed.model, tokens)
    ours = spread(device_ms(bound(streamed.model, tokens), forwards=2, rounds=part.rounds(3, 1.0)))
    copied = torch_offload.align(copy.deepcopy(plain).to("cpu"))
    with AccelerateAuto(copied, budget) as theirs:
        require_equal(plain, theirs.model, tokens)
        times = spread(
            device_ms(bound(theirs.model, tokens), forwards=1, rounds=part.rounds(2, 4.0, least=1))
        )
    del theirs, copied
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    part.figures.update(
        what="auto_peer",
        share=share,
        budget_bytes=budget,
        **streamed.describe(),
        streamed_ms=ours["median"],
        peer_ms=times["median"],
        bit_equal=True,
    )


def bench_airllm(
    part: Part, tiny: bool, stage: Stage, peer: Workload, peer_folder: Path, tmp_path: Path
) -> None:
    """The same checkpoint, which both read from the page cache; AirLLM links its files to it."""
    pytest.importorskip("airllm")
    tokens = peer.tokens(peer.shapes[0])
    expected = forward(stage.plain(peer), tokens).clone()
    stage.clear()

    model = skeleton(peer)
    handle = torch_offload.offload_from_checkpoint(
        model, peer_folder, DEVICE, gpu_budget=None if tiny else _BUDGET
    )
    run = bound(model, tokens)
    peak = _peak_bytes(run)
    assert torch.equal(run(), expected), "ours differs from the plain model"
    assert handle.stats.bytes_onloaded > 0, "nothing was streamed"
    ours = spread(device_ms(run, forwards=2, rounds=part.rounds(3, 1.0)))
    streamed_bytes = sum(unit.size_bytes for unit in handle.units if unit.place is not None)
    handle.remove()
    del model, handle, run
    gc.collect()

    with AirLLM(peer_folder, tmp_path) as theirs:
        run = bound(theirs.model, tokens)
        peer_peak = _peak_bytes(run)
        logits = run()
        times = spread(device_ms(run, forwards=1, rounds=part.rounds(2, 10.0, least=1)))
    assert torch.isfinite(logits).all()
    part.figures.update(
        what="airllm",
        checkpoint_bytes=sum(path.stat().st_size for path in peer_folder.glob("*.safetensors")),
        limit_bytes=_LIMIT_BYTES,
        streamed_bytes=streamed_bytes,
        streamed_ms=ours,
        peak_bytes=peak,
        peer_ms=times,
        peer_peak_bytes=peer_peak,
        times_faster=times["median"] / ours["median"],
        bit_equal=True,
        peer_is_bit_equal=bool(torch.equal(logits, expected)),
    )
