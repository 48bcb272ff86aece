"""Packed units that outlive a run: one safetensors file for each cut of a model into units.

Note [What the cache is keyed by]: a blob may be used if and only if the masters hold the bytes that
it was packed from. So before a unit is packed its masters are read once, and a checksum of each
parameter's bytes, with names, sizes and offsets, is compared with what the file says of its blob.
That covers the content of the checkpoint, whatever its files are called or dated, and every edit
made since. It is a check against damage and mistakes, not against somebody who forges a file.

All that the file says is covered by a seal (SHA-256 of its metadata), which names each blob's own
checksum. So a blob can be neither damaged nor mistaken for another one without being noticed, and
what is noticed is packed anew.

Note [When the cache is written]: where a model is offloaded, for the weights are then those that
the next run begins with. A later plan may be of edited ones, merged or trained: it takes what fits
and leaves the file alone. Leaves, which are known only after the first forward, are added, but take
no other weights' place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

import torch

from torch_offload import _C
from torch_offload.checkpoint import StoredTensor, read_header
from torch_offload.debugging import LOGGER
from torch_offload.user_warning import warn_user

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError(
        "expected safetensors for packed_cache, got none; pip install safetensors"
    ) from error

Keeping = Literal["all", "missing", "nothing"]
_FORMAT = "torch_offload packed units"
# Of the metadata; blobs have a version of their own.
_VERSION = 1
_TEMPORARY = ".tmp"
# Younger folders may not have been locked yet by who has just made them.
_YOUNG_S = 60


class _UnusableError(Exception):
    """A file that cannot be used; the message says why."""


@dataclass(frozen=True)
class _Entry:
    """What the file says of one unit's blob.

    Attributes:
        content: Of what it was packed, see Note [What the cache is keyed by].
        blob: The checksum that the blob itself says it has.
    """

    content: str
    blob: str


@dataclass
class _Kept:
    """A mapped file, where its tensors lie, and the entries that it has."""

    file: _C.FileMapping | None = None
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)
    entries: Mapping[str, _Entry] = field(default_factory=dict)

    def blob_of(self, unit: str, content: str) -> torch.Tensor | None:
        """The blob that was packed of this content, to be checked by whoever takes it."""
        entry = self.entries.get(unit)
        if entry is None or entry.content != content:
            return None
        blob = self._blob(unit)
        return blob if blob is not None and _checksum_in(blob) == entry.blob else None

    def others(self, units: set[str]) -> dict[str, tuple[_Entry, torch.Tensor]]:
        """What is kept of units that are not among these."""
        found = {}
        for unit, entry in self.entries.items():
            if unit not in units and (blob := self._blob(unit)) is not None:
                found[unit] = (entry, blob)
        return found

    def _blob(self, unit: str) -> torch.Tensor | None:
        """By no operator of torch: an error in one of those comes out of safetensors as another."""
        stored = self.stored.get(unit)
        if self.file is None or stored is None or stored.dtype != torch.uint8:
            return None
        if len(stored.shape) != 1 or not stored.size_bytes:
            return None
        view = _C.FileView([(self.file, stored.offset, stored.size_bytes)])
        return view.tensor(torch.uint8, stored.shape)


class PackedCache:
    """The folder that keeps packed units of one model."""

    def __init__(self, folder: str | Path) -> None:
        # Once: another plan may be made in another current folder.
        self.folder = Path(os.path.expanduser(folder)).absolute()

    def pack(
        self,
        engine: _C.Engine,
        most_bytes: Sequence[int],
        counts: Sequence[torch.Tensor | None] = (),
        *,
        keeps: Keeping = "all",
    ) -> None:
        """As ``engine.pack``, with kept blobs where they are those of the masters.

        Whatever is wrong with the file or its folder is told in one warning, and packed anew.

        Blocks while weights are read once, and what has to be packed is packed and written.

        Args:
            engine: Whose masters hold the weights.
            most_bytes: As ``engine.pack``.
            counts: Likewise.
            keeps: What may be written, see Note [When the cache is written]: ``"all"`` that had to
                be packed; ``"missing"``, only where it takes the place of no other weights;
                ``"nothing"``, and then nothing is warned of.
        """
        plan = engine.plan
        units = {
            index: unit.name
            for index, unit in enumerate(plan.units)
            if plan.places[index] is not None
        }
        contents = {index: _key_of(engine.content(index)) for index in units}
        path = self.folder / _file_name(engine)
        kept, unusable = _opened(path)
        offered = [
            kept.blob_of(units[index], contents[index]) if index in units else None
            for index in range(len(plan.units))
        ]
        engine.offer_blobs(offered)
        try:
            engine.pack(most_bytes, counts)
            taken = set(engine.blobs_taken)
        finally:
            engine.offer_blobs([])
        transports = engine.plan.transports
        packed = [index for index in units if transports[index] != "raw"]
        stale = [units[i] for i in packed if i not in taken and units[i] in kept.entries]
        problem = unusable
        if stale:
            problem = (
                f"it holds {len(stale)} of {len(packed)} units otherwise than the model does, "
                f"{stale[0]!r} among them: damaged, or packed from other weights"
            )
        if taken.issuperset(packed):
            LOGGER.info("%d packed units taken from %s", len(taken), path)
            return
        if keeps == "nothing" or (keeps == "missing" and stale):
            LOGGER.info("%d packed units taken from %s, the others packed", len(taken), path)
            return
        blobs = {i: blob for i in packed if (blob := engine.packed_blob(i)) is not None}
        tensors = {units[i]: blob for i, blob in blobs.items()}
        entries = {units[i]: _Entry(contents[i], _checksum_in(blob)) for i, blob in blobs.items()}
        for name, (entry, blob) in kept.others(set(units.values())).items():
            entries[name], tensors[name] = entry, blob
        try:
            _write(path, tensors, entries)
        except (OSError, SafetensorError) as error:
            problem = f"{problem + '; and ' if problem else ''}it cannot be written: {error}"
        if problem:
            warn_user(
                f"expected a cache of packed weights in {path}, but {problem}; the weights are "
                "packed anew, and results are the same",
                RuntimeWarning,
            )


def _key_of(content: list[tuple[str, int, int, int]]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_name(engine: _C.Engine) -> str:
    """Another one for each cut into units, so that those of several granularities are all kept."""
    cut = [
        (unit.name, unit.size_bytes, engine.parameter_names(index))
        for index, unit in enumerate(engine.plan.units)
    ]
    return f"packed-{hashlib.sha256(json.dumps(cut).encode()).hexdigest()[:16]}.safetensors"


def _checksum_in(blob: torch.Tensor) -> str:
    try:
        return f"{_C.blob_checksum(blob):016x}"
    except ValueError:
        return ""


# --- reading -------------------------------------------------------------------------------------


def _opened(path: Path) -> tuple[_Kept, str]:
    """The file, or nothing and why it is of no use; neither where there is none yet."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe waits for whoever writes to it
            raise _UnusableError("that is no regular file")
        with safe_open(path, framework="pt") as opened:
            entries = _entries_of(opened.metadata() or {})
        return _Kept(_C.FileMapping(str(path)), read_header(path), entries), ""
    except FileNotFoundError:
        return _Kept(), ""
    except _UnusableError as error:
        return _Kept(), str(error)
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, ValueError) and not os.path.exists(path):
            return _Kept(), ""  # another process has removed it meanwhile
        return _Kept(), f"it cannot be read: {error}"


def _entries_of(metadata: Mapping[str, str]) -> dict[str, _Entry]:
    if metadata.get("format") != _FORMAT:
        raise _UnusableError("it is a file of another kind")
    wanted, found = _header(), {key: metadata.get(key) for key in _header()}
    if found != wanted:
        raise _UnusableError(f"it is of another version: {found}, where this release has {wanted}")
    text = metadata.get("units", "")
    if metadata.get("seal") != _seal(text):
        raise _UnusableError("it is damaged: what it says of its units does not fit its seal")
    try:
        return {name: _Entry(**entry) for name, entry in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise _UnusableError(f"it is damaged: {error}") from None


def _header() -> dict[str, str]:
    return {
        "format": _FORMAT,
        "version": str(_VERSION),
        "blob_version": str(_C.blob_version),
        "alignment": str(_C.aligned_size(1)),
    }


def _seal(units: str) -> str:
    return hashlib.sha256(units.encode()).hexdigest()


# --- writing -------------------------------------------------------------------------------------


def _write(path: Path, tensors: dict[str, torch.Tensor], entries: dict[str, _Entry]) -> None:
    """Writes the file beside its place and renames it: it is there as a whole, or not at all.

    Raises:
        OSError, SafetensorError: If there is no room, or no right to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    units = json.dumps({name: vars(entry) for name, entry in entries.items()})
    metadata = {**_header(), "units": units, "seal": _seal(units)}
    # A folder, as safetensors writes to a name of its own first.
    temporary = Path(mkdtemp(prefix=f"{path.name}.", suffix=_TEMPORARY, dir=path.parent))
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever finds it locked leaves it alone
        written = temporary / path.name
        save_file(tensors, written, metadata)
        written.chmod(_mode_of_new_files(temporary))
        _sync(written)
        written.replace(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)
    LOGGER.info("%d packed units kept in %s", len(tensors), path)


def _mode_of_new_files(folder: Path) -> int:
    """Of files that anybody makes in this process: safetensors makes its own for the user alone."""
    probe = folder / "mode"
    probe.touch()
    return stat.S_IMODE(probe.stat().st_mode)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove_leftovers(path: Path) -> None:
    """What a process has begun and did not live to finish; one that lives holds its lock."""
    for leftover in path.parent.glob(f"{path.name}.*{_TEMPORARY}"):
        try:
            if time.time() - leftover.stat().st_mtime < _YOUNG_S:
                continue
            lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)
