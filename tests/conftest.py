"""What every Python test runs under: the guard of the masters, restored global state, devices."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch.overrides import _get_current_function_mode_stack

from tests.python.streamed_master_guard import LiveMasters, StreamedMasterGuard

# With this set, a test that needs a GPU and finds none fails: a lane must not pass by skipping.
REQUIRE_CUDA = os.environ.get("TORCH_OFFLOAD_REQUIRE_CUDA") == "1"

# A test that fails must fail for everybody, so hypothesis draws the same examples in every run;
# with this set, others each time: to look for what the usual ones miss.
settings.register_profile("same examples", derandomize=True, deadline=None)
if os.environ.get("TORCH_OFFLOAD_RANDOM_EXAMPLES") != "1":
    settings.load_profile("same examples")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_cuda: runs on a machine with a GPU only")
    config.addinivalue_line("markers", "knows_memory: offload() sees the memory of the device")
    torch.set_num_threads(1)  # tiny models: a second thread costs more than it computes


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") and not torch.cuda.is_available():
        if REQUIRE_CUDA:
            pytest.fail("TORCH_OFFLOAD_REQUIRE_CUDA=1, but torch sees no GPU")
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def live_masters() -> Iterator[LiveMasters]:
    """The masters of all handles that the tests make."""
    with LiveMasters().watch() as live:
        yield live


@pytest.fixture(autouse=True)
def master_guard(live_masters: LiveMasters) -> Iterator[StreamedMasterGuard]:
    """Fails the test when a forward reads a streamed master, even if the test catches the error."""
    with StreamedMasterGuard(live_masters) as guard:
        yield guard
    assert not guard.reads, f"masters were read during a forward: {guard.reads}"


def _leave_function_modes() -> list[str]:
    """Leaves ``torch.device("meta")`` and the like, so that no later test builds in it."""
    left = []
    while stack := _get_current_function_mode_stack():
        left.append(type(stack[-1]).__name__)
        stack[-1].__exit__(None, None, None)
    return left


@pytest.fixture(autouse=True)
def restored_state() -> Iterator[None]:
    """Puts back the global state that models, libraries and tests change."""
    dtype = torch.get_default_dtype()
    grad = torch.is_grad_enabled()
    cache = torch.is_autocast_cache_enabled()
    autocast = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(0)
        torch.manual_seed(0)
        yield
    leaked = [
        device for device, was in autocast.items() if torch.is_autocast_enabled(device) != was
    ]
    modes = _leave_function_modes()
    cache_now = torch.is_autocast_cache_enabled()
    grad_now = torch.is_grad_enabled()
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.set_autocast_cache_enabled(cache)
    assert not modes, f"the test left modes entered: {modes}"
    assert not leaked, f"the test left autocast changed for {leaked}"
    assert cache_now == cache, "the test left the autocast cache changed"
    assert grad_now == grad, "the test left grad mode changed"


@pytest.fixture(autouse=True)
def every_unit_streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU tiny models would be resident after their first forward: here none is, unless asked.

    As on the host device, ``gpu_budget="auto"`` then has no memory to go by. Tests of that are
    marked `knows_memory`.
    """
    if request.node.get_closest_marker("knows_memory") is None:
        monkeypatch.setattr(
            importlib.import_module("torch_offload.offload"), "memory_of", lambda _: None
        )


@pytest.fixture
def device() -> torch.device:
    """Where to run: the current GPU with its index, else the host device."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if REQUIRE_CUDA:
        pytest.fail("TORCH_OFFLOAD_REQUIRE_CUDA=1, but torch sees no GPU")
    return torch.device("cpu")
