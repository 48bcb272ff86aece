"""Who keeps whom alive: nothing outlives `del`, nothing is freed too early, exits are clean."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_offload
from tests.python.dropin import plain_on, rows, tiny_llama, tiny_stack, tokens

_ROOT = Path(torch_offload.__file__).parents[1]


@pytest.fixture
def collector_off() -> Iterator[None]:
    # The first operators under a dispatch mode import parts of torch, whose frames form cycles.
    tiny_stack(1)(rows(torch.device("cpu")))
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("collector_off")
@pytest.mark.parametrize("granularity", ["sublayer", "module", "auto"])
def test_refused_model_is_freed_without_a_collection(granularity: Any) -> None:
    model = tiny_llama()
    gone = weakref.ref(model)
    try:
        torch_offload.offload(model, "cpu", granularity=granularity, gpu_budget=1000)
    except ValueError:
        pass
    else:
        pytest.fail("not refused")
    del model
    assert gone() is None


def _arena_of(handle: torch_offload.Handle) -> tuple[int, int]:
    """Address range of the masters."""
    model = handle.model
    assert model is not None
    masters = [model.get_parameter(name) for unit in handle.units for name in unit.parameters]
    return (
        min(master.data_ptr() for master in masters),
        max(master.data_ptr() + master.nbytes for master in masters),
    )


def _is_mapped(begin: int, end: int) -> bool:
    """Whether anonymous pages of at least this length lie at an address range."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds = line.split(maxsplit=1)[0].split("-")
        first, last = (int(bound, 16) for bound in bounds)
        if first < end and begin < last:
            return True
    return False


_OPTIONS: dict[str, dict[str, Any]] = {
    "leaves": {"granularity": "module"},
    "layers": {"granularity": "layer", "mode": "sync"},
    "split": {"streams": "split", "mode": "events"},
    "chosen": {"units": ["*.mlp"], "resident": ["*.down.bias"]},
}


_ORDERS = list(itertools.permutations(["model", "handle", "output"]))


@pytest.mark.usefixtures("collector_off")
@pytest.mark.parametrize(
    ("options", "order"),
    [("default", order) for order in _ORDERS] + [(other, _ORDERS[0]) for other in _OPTIONS],
)
@pytest.mark.parametrize("forwards", [0, 2])
def test_del_in_any_order_frees_everything(
    device: torch.device, options: str, order: tuple[str, ...], forwards: int
) -> None:
    # Wide enough that the arena is a mapping of its own.
    objects: dict[str, Any] = {"model": tiny_stack(num_blocks=3, width=128)}
    x = rows(device, width=128)
    objects["handle"] = torch_offload.offload(objects["model"], device, **_OPTIONS.get(options, {}))
    objects["output"] = x
    with torch.no_grad():
        for _ in range(forwards):
            objects["output"] = objects["model"](x)
    begin, end = _arena_of(objects["handle"])
    assert _is_mapped(begin, end)
    references = {
        "model": weakref.ref(objects["model"]),
        "unit": weakref.ref(objects["model"].blocks[1].attn),
        "weight": weakref.ref(objects["model"].blocks[1].attn.weight),
        "engine": weakref.ref(objects["handle"]._engine),
        "handle": weakref.ref(objects["handle"]),
    }
    for name in order:
        del objects[name]
        if "model" in objects:
            assert references["handle"]() is not None, "the model keeps its handle alive"
            assert torch_offload.handle_of(objects["model"]) is not None
        else:
            assert references["model"]() is None, "the model outlives del"
    for name, reference in references.items():
        assert reference() is None, f"{name} outlives del"
    assert not _is_mapped(begin, end), "the arena outlives del"


@pytest.mark.usefixtures("collector_off")
def test_del_after_an_exception_frees_everything(device: torch.device) -> None:
    model = tiny_stack(3)
    torch_offload.offload(model, device)
    model.blocks[1].mlp.up.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        try:
            model(rows(device))
        except ZeroDivisionError as error:
            error.__traceback__ = None
    reference = weakref.ref(model)
    del model
    assert reference() is None


@pytest.mark.usefixtures("collector_off")
def test_weight_kept_by_the_user_outlives_the_model(device: torch.device) -> None:
    model = tiny_stack(3)
    values = model.blocks[1].attn.weight.detach().clone()
    torch_offload.offload(model, device)
    with torch.no_grad():
        model(rows(device))
    weight = model.blocks[1].attn.weight
    state = model.state_dict()
    del model
    assert torch.equal(weight.detach(), values)
    assert torch.equal(state["blocks.1.attn.weight"], values)


def test_handle_of_a_deleted_model_says_so(device: torch.device) -> None:
    model = tiny_stack(3)
    handle = torch_offload.offload(model, device)
    del model
    gc.collect()
    assert handle.model is None
    assert "deleted model" in repr(handle)
    handle.remove()
    assert handle.is_removed


@pytest.mark.usefixtures("collector_off")
def test_remove_frees_arena_and_window(device: torch.device) -> None:
    model = tiny_stack(num_blocks=3, width=128)
    handle = torch_offload.offload(model, device)
    with torch.no_grad():
        model(rows(device, width=128))
    begin, end = _arena_of(handle)
    handle.remove()
    assert not _is_mapped(begin, end)
    with pytest.raises(torch_offload.StateError, match="live handle"):
        _ = handle.units


@pytest.mark.usefixtures("collector_off")
def test_handle_kept_after_remove_keeps_no_weights(device: torch.device) -> None:
    model = tiny_stack(3)
    handle = torch_offload.offload(model, device)
    with torch.no_grad():
        model(rows(device))
    handle.remove()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    assert not any(weight() is not None for weight in weights)
    assert handle.is_removed


@pytest.mark.needs_cuda
def test_remove_gives_device_memory_back(device: torch.device) -> None:
    torch.cuda.synchronize()
    model = tiny_stack(num_blocks=4, width=512)
    x = rows(device, width=512)
    with torch.no_grad():
        plain_on(model, device)(x)  # libraries allocate their workspaces
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        handle = torch_offload.offload(model, device)
        model(x)
        assert torch.cuda.memory_allocated(device) > before
        handle.remove()
        assert torch.cuda.memory_allocated(device) == before


@pytest.mark.usefixtures("collector_off")
def test_many_offloads_in_a_row_leak_nothing(device: torch.device) -> None:
    model = tiny_llama()
    plain = plain_on(model, device)
    ids = tokens(device)
    with torch.no_grad():
        must = plain(ids).logits
        for _ in range(20):
            with torch_offload.offload(model, device) as handle:
                assert torch.equal(model(ids).logits, must)
                reference = weakref.ref(handle)
            del handle
            assert reference() is None


# A daemon thread that is *computing* at exit is not here: torch itself ends such a process with
# "terminate called", plain model or not, when its thread asks for the interpreter's lock again.
_EXITS = {
    "at-rest": "model(x); model(x)",
    "removed": "model(x); handle.remove()",
    "handle-kept-by-a-cycle": "import builtins; builtins.kept = [handle, model]; model(x)",
    "in-a-forward": (
        "model.blocks[2].mlp.up.register_forward_pre_hook(lambda *_: sys.exit(0)); model(x)"
    ),
    "thread-waits-in-a-forward": (
        "gate = threading.Event(); inside = threading.Event()\n"
        "def hold(*_): inside.set(); gate.wait()\n"
        "model.blocks[2].mlp.up.register_forward_pre_hook(hold)\n"
        "threading.Thread(target=lambda: model(x.clone()), daemon=True).start()\n"
        "assert inside.wait(60)"
    ),
    "handle-only": "del model",
    "leaves": (
        "handle.remove(); handle = torch_offload.offload(model, device, granularity='module')\n"
        "model(x); model(x)"
    ),
    "unraisable-free": "m = model; del handle; sys.modules['kept'] = m; model(x)",
}


@pytest.mark.parametrize("how", _EXITS)
def test_interpreter_exit_is_clean(device: torch.device, how: str) -> None:
    script = f"""
import sys, threading
import torch, torch_offload
from tests.python.dropin import rows, tiny_stack
torch.set_num_threads(1)
torch.set_grad_enabled(False)
device = torch.device("{device}")
model, x = tiny_stack(6), rows(device)
for parameter in model.parameters():
    parameter.requires_grad_(False)
handle = torch_offload.offload(model, device)
{_EXITS[how]}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
