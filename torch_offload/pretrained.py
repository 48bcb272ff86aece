"""Offloaded models straight from their checkpoint."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_offload import _C
from torch_offload.checkpoint import (
    CheckpointError,
    StoredTensor,
    read_header,
    stored_tensors,
)
from torch_offload.config import Config
from torch_offload.debugging import LOGGER
from torch_offload.file_masters import CheckpointMasters, FileMasters, read_file_tensors
from torch_offload.file_tensors import FileTensor
from torch_offload.handle import Handle
from torch_offload.names import listed
from torch_offload.offload import offload, offload_with
from torch_offload.user_warning import warn_user

_OFFLOAD_OPTIONS = frozenset(inspect.signature(offload).parameters) - {"model", "device"}
#: Where ``packed_cache=True`` keeps the file, within the checkpoint's folder: others read every
#: safetensors file that lies beside a checkpoint.
CACHE_FOLDER = ".torch_offload"
# Guards what _files_stay_on_disk puts into transformers; a load may hold one of a part.
_patching = threading.RLock()


def from_pretrained(
    auto_class: Any,
    folder: str | Path,
    *model_args: Any,
    device: torch.device | str | int | None = None,
    masters: CheckpointMasters = "auto",
    host_budget: int | str | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a model by its own ``from_pretrained`` and offloads it, without a copy of its weights.

    Weights that the model holds as the files do are streamed from the files' pages in the page
    cache. What must be cast, transposed or put together otherwise goes into page-locked memory.
    The files must stay as they are while the model is offloaded: one that is written to is an
    error at the next forward.

    Blocks while the model is put together; pages are read when they are first streamed.

    Args:
        auto_class: What loads the model: ``AutoModelForCausalLM``, or a model's own class.
        folder: The checkpoint, as that class takes it.
        model_args: Passed on.
        device: As for `offload`.
        masters: ``"auto"`` streams from the files where the system can lock their pages, else
            from page-locked memory, which a warning says. ``"mmap"`` raises there, ``"arena"``
            copies all weights that stream, ``"packed"`` packs them (``masters`` of `offload`).
        host_budget: Bytes of files that may be page-locked at a time: ``"32GiB"``. None: all, or
            what fits the host's memory.
        kwargs: Options of `offload`, where ``packed_cache=True`` means a folder in the
            checkpoint's own; all others go to ``auto_class.from_pretrained``.

    Returns:
        What ``auto_class.from_pretrained`` returns; the model is offloaded (see `handle_of`).

    Raises:
        CheckpointError: If the folder holds pickled weights, or a file of it is broken.
        ValueError, TypeError, MemoryError, StateError, NotImplementedError: As `offload`.

    Example:
        >>> model = torch_offload.from_pretrained(  # doctest: +SKIP
        ...     AutoModelForCausalLM, "Llama-3.1-8B", device="cuda", gpu_budget="4GiB"
        ... )
    """
    files = FileMasters.asked_for(masters, host_budget)
    if not callable(getattr(auto_class, "from_pretrained", None)):
        raise TypeError(
            "expected a class with from_pretrained, such as AutoModelForCausalLM, got "
            f"{auto_class!r}"
        )
    options = {key: kwargs.pop(key) for key in _OFFLOAD_OPTIONS & kwargs.keys()}
    config = _config_of(options, folder, masters)
    _refuse_placement(kwargs)
    if Path(folder).is_dir() and not kwargs.get("subfolder") and not kwargs.get("variant"):
        if not kwargs.get("gguf_file"):
            stored_tensors(Path(folder))  # raises where it is no checkpoint
        kwargs.setdefault("use_safetensors", True)
    stay = nullcontext() if masters == "arena" else _files_stay_on_disk(files)
    with _outside_inference_mode(), stay:
        loaded = auto_class.from_pretrained(folder, *model_args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    _keep_views(files)
    offload_with(model, device, config, files=files)
    return loaded


def offload_from_checkpoint(
    model: nn.Module,
    folder: str | Path,
    device: torch.device | str | int | None = None,
    *,
    masters: CheckpointMasters = "auto",
    host_budget: int | str | None = None,
    **options: Any,
) -> Handle:
    """Gives a model, built on ``meta``, the weights of a checkpoint folder and offloads it.

    The folder's safetensors files name the model's parameters and buffers as its ``state_dict``
    does. Weights of the model's own dtype are streamed from the files themselves; others are cast.
    On an exception the model is what it was.

    Args:
        model: With all its weights on ``meta``, or any others, which are then dropped.
        folder: Holds ``model.safetensors``, or several files and their index.
        device: As for `offload`.
        masters: As for `from_pretrained`.
        host_budget: As for `from_pretrained`.
        options: As for `offload`; ``packed_cache=True`` as for `from_pretrained`.

    Raises:
        CheckpointError: If a file is broken, or its tensors are not those of the model.
        ValueError, TypeError, MemoryError, StateError, NotImplementedError: As `offload`.

    Example:
        >>> with torch.device("meta"):  # doctest: +SKIP
        ...     model = MyModel()
        >>> handle = torch_offload.offload_from_checkpoint(model, "folder")  # doctest: +SKIP
    """
    files = FileMasters.asked_for(masters, host_budget)
    config = _config_of(options, folder, masters)
    slots = _Slots(model)
    try:
        with _outside_inference_mode():
            slots.fill(Path(folder))
            files.views.update(read_file_tensors(model))
        _keep_views(files)
        return offload_with(model, device, config, files=files)
    except BaseException:
        slots.restore()
        raise


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Parameters made inside it would be inference tensors, which no mode outside may touch."""
    grad_is_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad_is_enabled):
        yield


def _config_of(options: dict[str, Any], folder: str | Path, masters: CheckpointMasters) -> Config:
    """The options of `offload`; ``packed_cache=True`` is a folder in the checkpoint's."""
    if options.get("packed_cache") is True:
        if not Path(folder).is_dir():
            raise ValueError(
                "expected packed_cache=True with a checkpoint in a local folder, got "
                f"{str(folder)!r}; name a folder: packed_cache='...'"
            )
        options = {**options, "packed_cache": Path(folder) / CACHE_FOLDER}
    return Config(**options, masters="packed" if masters == "packed" else "plain")


def _keep_views(files: FileMasters) -> None:
    """Only where the files themselves are to be the masters."""
    if files.masters in ("arena", "packed"):
        files.views.clear()


def _refuse_placement(kwargs: dict[str, Any]) -> None:
    for key, instead in (
        ("device_map", "device= for where to compute, and gpu_budget= for how much may stay there"),
        ("tp_plan", "a model on one device"),
        ("state_dict", "offload_from_checkpoint(), or offload() with a model of your own"),
    ):
        if kwargs.get(key) is not None:
            raise ValueError(f"expected no {key}, got {kwargs[key]!r}; use {instead}")
    if kwargs.get("use_safetensors") is False:
        raise CheckpointError(
            "expected safetensors, got use_safetensors=False: a pickle cannot be mapped, and "
            "loading it can run any code"
        )


# --- through transformers ----------------------------------------------------------------------


class _Load:
    """One load by transformers, for as long as its names are replaced."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.is_lazy = True
        self._mappings: dict[str, _C.FileMapping] = {}

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread is the one that loads."""
        return threading.get_ident() == self.thread

    def mapping_of(self, path: str) -> _C.FileMapping:
        """The one mapping of a file, however often it is opened."""
        if path not in self._mappings:
            self._mappings[path] = _C.FileMapping(path)
        return self._mappings[path]


class _LazyFile:
    """What ``safe_open`` returns, with slices that stay on disk."""

    def __init__(self, load: _Load, opened: Any, path: str) -> None:
        self._load = load
        self._opened = opened
        self._stored = read_header(Path(path))
        self._mapping = load.mapping_of(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __enter__(self) -> _LazyFile:
        self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def get_slice(self, name: str) -> Any:
        opened = self._opened.get_slice(name)
        return _LazySlice(self._load, opened, self._mapping, self._stored[name])


class _LazySlice:
    """A tensor of a file: whole, it stays on disk; a part of it is read as always."""

    def __init__(
        self, load: _Load, opened: Any, mapping: _C.FileMapping, stored: StoredTensor
    ) -> None:
        self._load = load
        self._opened = opened
        self._mapping = mapping
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is ... and self._load.is_lazy:
            return file_tensor(self._mapping, self._stored)
        part: torch.Tensor = self._opened[index]
        return part


def file_tensor(mapping: _C.FileMapping, stored: StoredTensor) -> FileTensor:
    """A stored tensor that stays on disk."""
    block = (mapping, stored.offset, stored.size_bytes)
    return FileTensor([block] if stored.size_bytes else [], stored.dtype, stored.shape)


def _loading_module() -> Any:
    return importlib.import_module("transformers.modeling_utils")


@contextmanager
def _files_stay_on_disk(files: FileMasters) -> Iterator[None]:
    """Lets this thread's ``from_pretrained`` put models together from tensors that stay on disk.

    Note [Where transformers is held]: it opens each file with ``safe_open``, hands slices of it to
    one function, which converts them and sets the parameters, and only then initializes what is
    missing, ties weights and reports. The first two names are replaced for the time of the load,
    for this thread: slices then give `FileTensor`, and behind the conversion every parameter is an
    ordinary tensor again. All else is transformers' own. A version without these names loads as
    always, and the weights go into the arena. Loads of other threads wait; one inside this one, as
    of a part, goes to transformers' own functions past ours, or its files would be taken for ours.
    """
    with _patching:
        try:
            loading = _loading_module()
            before = loading.safe_open, loading.convert_and_load_state_dict_in_model
        except (ImportError, AttributeError) as error:
            _say_arena(files, f"this version of transformers loads otherwise ({error})")
            yield
            return
        opens, converts = (getattr(name, "plain", name) for name in before)
        ours = _lazy(opens, converts, files)
        try:
            loading.safe_open, loading.convert_and_load_state_dict_in_model = ours
            yield
        finally:
            loading.safe_open, loading.convert_and_load_state_dict_in_model = before


def _lazy(opens: Any, converts: Any, files: FileMasters) -> tuple[Any, Any]:
    """What takes the place of transformers' two functions for one load, which it keeps `plain`."""
    load = _Load()

    def open_lazily(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened = opens(file, *args, **kwargs)
        return _LazyFile(load, opened, str(file)) if load.is_mine else opened

    def convert(*args: Any, **kwargs: Any) -> Any:
        result = converts(*args, **kwargs)
        if not load.is_mine:
            return result
        if result[0].conversion_errors:
            # An operator that cannot be done to tensors on disk: once more with ordinary ones.
            LOGGER.info("converting anew in memory: %s", result[0].conversion_errors)
            load.is_lazy = False
            result = converts(*args, **kwargs)
        model = kwargs["model"] if "model" in kwargs else args[0]
        files.views.update(read_file_tensors(model))
        return result

    open_lazily.plain, convert.plain = opens, converts  # type: ignore[attr-defined]
    return open_lazily, convert


def _say_arena(files: FileMasters, reason: str) -> None:
    if files.masters == "mmap":
        raise ValueError(f"expected masters='mmap' to be possible, got {reason}; use 'auto'")
    warn_user(f"weights are copied into page-locked memory, as {reason}")


# --- models of one's own -----------------------------------------------------------------------


class _Slots:
    """The places of a model's tensors by name, and what was in them."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._holders: dict[int, list[tuple[dict[str, Any], str, torch.Tensor]]] = {}
        seen: set[int] = set()
        # A module that is registered twice has its weights under either name, as in a state dict.
        for prefix, module in model.named_modules(remove_duplicate=False):
            for slots in (module._parameters, module._buffers):
                for key, tensor in slots.items():
                    if tensor is None:
                        continue
                    self._tensors[f"{prefix}.{key}".lstrip(".")] = tensor
                    if id(module) not in seen:
                        held = (slots, key, tensor)
                        self._holders.setdefault(id(tensor), []).append(held)
            seen.add(id(module))
        self._filled: set[int] = set()

    def fill(self, folder: Path) -> None:
        """Puts the folder's tensors into the slots of their names, tied ones included."""
        surplus: list[str] = []
        for path, stored in stored_tensors(folder).items():
            mapping = _C.FileMapping(str(path))
            for name, entry in stored.items():
                if name in self._tensors:
                    self._put(name, file_tensor(mapping, entry), path)
                else:
                    surplus.append(name)
        missing: dict[int, str] = {}  # by one name each
        for name, tensor in self._tensors.items():
            if tensor.is_meta and id(tensor) not in self._filled:
                missing.setdefault(id(tensor), name)
        if missing:
            raise CheckpointError(
                f"expected all weights of the model in {folder}, got none for "
                f"{listed(missing.values())}; buffers that no checkpoint holds must be made "
                "outside of torch.device('meta')"
            )
        if surplus:
            names = listed(surplus)
            LOGGER.warning("%s holds weights that the model has not: %s", folder, names)

    def _put(self, name: str, tensor: FileTensor, path: Path) -> None:
        former = self._tensors[name]
        if former.shape != tensor.shape:
            raise CheckpointError(
                f"expected {name!r} of shape {tuple(former.shape)}, as the model has it, got "
                f"{tuple(tensor.shape)} in {path}"
            )
        filled: torch.Tensor = tensor if former.dtype == tensor.dtype else tensor.to(former.dtype)
        if isinstance(former, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=former.requires_grad)
        for slots, key, _ in self._holders[id(former)]:
            slots[key] = filled
        self._filled.add(id(former))

    def restore(self) -> None:
        """Puts the former tensors back."""
        for holders in self._holders.values():
            for slots, key, tensor in holders:
                slots[key] = tensor
