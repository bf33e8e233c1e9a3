"""Checkpoints that are whole or not there: named files of tensors and one JSON state, without pickle.

    <folder>/step-00000123/model.safetensors, ...   tensors, one file per name
                           state.json               everything else
                           MANIFEST.sha256          what `sha256sum --check` reads
                           COMMITTED                written last: hash of the manifest, size of every file
    <folder>/LATEST                                 name of the newest: a hint for people, never read here

Local: all is written to `tmp-<uuid>/` and flushed to disk, the folder renamed, `COMMITTED` added, the pointer
replaced, old checkpoints pruned. Object store: upload, compare sizes, `COMMITTED` last. A folder without
`COMMITTED` is no checkpoint, so a kill at any point leaves the one before in charge. No path is used twice.

`load` verifies every byte before it is used. Safetensors alone does not: a flipped bit in a weight loads
silently. Order is by the step in the name, never by a clock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from counterpoise import storage
from counterpoise.contracts import RefusedError, ResourceError
from counterpoise.plain import NotPlain, read_json

if TYPE_CHECKING:
    from torch import Tensor

COMMITTED = "COMMITTED"
MANIFEST = "MANIFEST.sha256"
LATEST = "LATEST"
STATE = "state.json"

_NAME = re.compile(r"(?P<base>[A-Za-z_]+-(?P<step>\d+))(?:-(?P<again>\d+))?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    name: str
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder_uri: str,
    name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> str:
    """The place of the committed checkpoint. Its name is `name`, or `name`-2, ... where that was used before.

    name: letters, a dash and the step, like `step-00000123`. tensors: file -> key -> tensor, from any device.
    state: JSON values with string keys; tuples come back as lists; NaN and infinities survive (as Python's
    JSON writes them). keep: intact checkpoints to keep, with this one; the others are removed afterwards.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least 1 checkpoint has to stay, 2 survive one that is damaged")
    if not _NAME.fullmatch(name) or _order(name)[1]:
        raise ValueError(f"checkpoint name {name!r} is not like step-00000123")
    for file in tensors:
        if not _FILE.fullmatch(file):
            raise ValueError(f"checkpoint file name {file!r}: letters, digits, dash, dot and underscore only")
    text = _to_json(state)
    if storage.is_local(folder_uri):
        uri = _save_local(folder_uri, name, tensors, text)
    else:
        uri = _save_remote(folder_uri, name, tensors, text)
    written = uri.rsplit("/", 1)[-1]
    try:  # the checkpoint is safe; what follows is housekeeping
        _before("point")
        storage.write_text(storage.join(folder_uri, LATEST), written + "\n")
        _prune(folder_uri, written, keep)
    except (OSError, ResourceError) as error:
        _log.warning("checkpoint %s is written, but old ones were not tidied up: %s", written, error)
    return uri


def load(uri: str) -> Checkpoint:
    """The checkpoint at `uri`. Every file is verified first; `RefusedError` names one that differs or is none."""
    import safetensors.torch
    from safetensors import SafetensorError

    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {}
    for file, data in _verified(uri):
        try:
            if file == STATE:
                state = read_json(data)
            else:
                tensors[file.removesuffix(".safetensors")] = safetensors.torch.load(data)
        except (SafetensorError, NotPlain) as error:
            raise RefusedError(f"{storage.show(uri)}/{file} is no file of a checkpoint: {error}") from None
    return Checkpoint(uri.rstrip("/").rsplit("/", 1)[-1], tensors, state)


def verify(uri: str) -> str | None:
    """What is wrong with the checkpoint, or None."""
    try:
        for _ in _verified(uri):
            pass
    except RefusedError as error:
        return str(error)
    return None


def committed(folder_uri: str) -> list[str]:
    """Names of the committed checkpoints, oldest step first."""
    files = storage.list_files(folder_uri)
    return sorted((f.split("/")[0] for f in files if re.fullmatch(rf"[^/]+/{COMMITTED}", f)), key=_order)


def latest(folder_uri: str, on_fallback: Callable[[str, str], None] | None = None) -> Checkpoint | None:
    """The newest intact checkpoint, or None if none was ever committed.

    A damaged one is reported through `on_fallback(name, reason)` and the one before is tried. If none is
    intact that is an error: to start afresh without a word would throw the run away.
    """
    for _ in range(3):
        damaged = []
        names = committed(folder_uri)
        for name in reversed(names):
            uri = storage.join(folder_uri, name)
            try:
                return load(uri)
            except RefusedError as error:
                if not storage.exists(storage.join(uri, COMMITTED)):
                    continue  # pruned by the run while we looked
                damaged.append(str(error))
                _log.warning("checkpoint %s is damaged, trying the one before: %s", name, error)
                if on_fallback:
                    on_fallback(name, str(error))
        if damaged or not names:
            break
    if damaged:
        raise RefusedError(
            f"{storage.show(folder_uri)}: none of {len(damaged)} committed checkpoints is intact "
            f"({'; '.join(damaged)}); restore one from a copy, or start again under another --name"
        )
    return None


# ------------------------------------------------------------------------------------------------- writing


def _before(operation: str) -> None:
    """Called before every file operation of `save`; the tests kill the process here."""


def _save_local(folder_uri: str, name: str, tensors: Mapping[str, Mapping[str, Tensor]], text: bytes) -> str:
    folder = storage.local_path(folder_uri)
    needed = len(text) + sum(t.numel() * t.element_size() for d in tensors.values() for t in d.values())
    storage.make_folder(folder)
    free = storage.free_bytes(folder)
    if free is not None and free < needed:
        raise _disk_full(folder, needed)
    temporary = os.path.join(folder, f"tmp-{uuid.uuid4().hex}")
    final = os.path.join(folder, _unused(folder_uri, name))
    try:
        _before("make")
        os.mkdir(temporary)
        hashes, sizes = {}, {}
        for file, data in _payloads(tensors, text):
            _before(f"write {file}")
            storage.write_file(os.path.join(temporary, file), data)
            hashes[file], sizes[file] = hashlib.sha256(data).hexdigest(), len(data)
        manifest = _manifest(hashes)
        _before("write manifest")
        storage.write_file(os.path.join(temporary, MANIFEST), manifest)
        _before("sync")
        storage.sync_folder(temporary)
        _before("rename")
        os.rename(temporary, final)
        _before("sync rename")
        storage.sync_folder(folder)
        _before("commit")
        storage.write_bytes(os.path.join(final, COMMITTED), _marker(manifest, sizes))
    except Exception as error:  # a kill leaves the rest to `_prune`
        for path in (temporary, final):
            with contextlib.suppress(OSError, ResourceError):
                storage.delete(path)
        if isinstance(error, OSError):
            raise storage.disk_error(folder, error, needed) from error
        if isinstance(error.__cause__, OSError):
            raise storage.disk_error(folder, error.__cause__, needed) from error
        raise
    return storage.join(folder_uri, os.path.basename(final))


def _save_remote(folder_uri: str, name: str, tensors: Mapping[str, Mapping[str, Tensor]], text: bytes) -> str:
    uri = storage.join(folder_uri, _unused(folder_uri, name))
    hashes, sizes = {}, {}
    for file, data in _payloads(tensors, text):
        _before(f"write {file}")
        storage.write_bytes(storage.join(uri, file), data)
        hashes[file], sizes[file] = hashlib.sha256(data).hexdigest(), len(data)
    manifest = _manifest(hashes)
    _before("write manifest")
    storage.write_bytes(storage.join(uri, MANIFEST), manifest)
    there = storage.list_files(uri)
    for file, num_bytes in (sizes | {MANIFEST: len(manifest)}).items():
        if there.get(file) != num_bytes:
            raise ResourceError(
                f"{storage.show(uri)}/{file}: {there.get(file)} bytes in the store, {num_bytes} were sent"
            )
    _before("commit")
    storage.write_bytes(storage.join(uri, COMMITTED), _marker(manifest, sizes))
    return uri


def _payloads(tensors: Mapping[str, Mapping[str, Tensor]], text: bytes) -> Iterator[tuple[str, bytes]]:
    """File name and content, one at a time so that only one copy of the tensors is in memory."""
    import safetensors.torch

    for file, group in tensors.items():
        yield f"{file}.safetensors", safetensors.torch.save(_apart(group))
    yield STATE, text


def _apart(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, and none a view of another: safetensors refuses shared memory."""
    apart, seen = {}, set()
    for key, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart[key] = tensor
    return apart


def _to_json(state: Mapping[str, Any]) -> bytes:
    _check_keys(state, "state")
    try:
        return json.dumps(state, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"the state of a checkpoint holds JSON values only: {error}") from error


def _check_keys(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):  # json would turn 1 into "1" without a word
                raise TypeError(f"the state of a checkpoint has string keys only: {where}[{key!r}]")
            _check_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_keys(item, f"{where}[{i}]")


def _disk_full(path: str, needed: int) -> ResourceError:
    return storage.disk_error(path, OSError(errno.ENOSPC, "no space left on device"), needed)


# ---------------------------------------------------------------------------------------- names, old ones


def _order(name: str) -> tuple[int, int, str]:
    """Sorts names by step, then by how often that step was saved; foreign names come first."""
    match = _NAME.fullmatch(name)
    return (int(match["step"]), int(match["again"] or 0), name) if match else (-1, 0, name)


def _unused(folder_uri: str, name: str) -> str:
    """`name`, or `name`-2, -3, ...: higher than any that is there, so that order is kept after pruning."""
    used = [_order(n)[1] or 1 for n in storage.list_names(folder_uri) if _base(n) == name]
    return f"{name}-{max(used) + 1}" if used else name


def _base(name: str) -> str | None:
    match = _NAME.fullmatch(name)
    return match["base"] if match else None


def _prune(folder_uri: str, written: str, keep: int) -> None:
    """Remove what kills left behind, and all checkpoints older than the `keep` newest intact ones.

    A damaged one does not count, so that the last good one stays. Local ones are hashed to know; in object
    storage their sizes are compared, for a download per save would cost too much.
    """
    whole = committed(folder_uri)
    for name in storage.list_names(folder_uri):
        unfinished = _base(name) is not None and name not in whole
        if unfinished or re.match(r"tmp-[0-9a-f]{32}$|.*\.tmp-[0-9a-f]{8}$", name):
            _before(f"remove {name}")
            storage.delete(storage.join(folder_uri, name))
    intact = 1
    for name in reversed(whole):
        uri = storage.join(folder_uri, name)
        if name == written or _base(name) is None:
            continue
        if intact < keep:
            intact += _is_intact(uri)
            continue
        _before(f"remove {name}/{COMMITTED}")
        storage.delete(storage.join(uri, COMMITTED))  # first: what is half removed is no checkpoint
        _before(f"remove {name}")
        storage.delete(uri)


def _is_intact(uri: str) -> bool:
    try:
        if storage.is_local(uri):
            return verify(uri) is None
        _files(uri)
    except RefusedError:
        return False
    return True


# ---------------------------------------------------------------------------------------------- verifying


def _manifest(hashes: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {file}\n" for file, digest in sorted(hashes.items())).encode()


def _marker(manifest: bytes, sizes: Mapping[str, int | None]) -> bytes:
    """The content of COMMITTED. It can be worked out again, so a damaged marker is known too."""
    lines = [f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}"]
    return "".join(f"{line}\n" for line in lines + [f"{sizes[f]}  {f}" for f in sorted(sizes)]).encode()


def _files(uri: str) -> dict[str, str]:
    """Hash by file from the manifest, after checking marker, manifest and the sizes of all files."""
    where = storage.show(uri.rstrip("/"))
    there = storage.list_files(uri)
    if COMMITTED not in there:
        raise RefusedError(f"{where} is not a committed checkpoint: it has no file {COMMITTED}")
    if MANIFEST not in there:
        raise RefusedError(f"{where}/{MANIFEST} is missing")
    marker = storage.read_bytes(storage.join(uri, COMMITTED))
    manifest = storage.read_bytes(storage.join(uri, MANIFEST))
    if marker[:64] != hashlib.sha256(manifest).hexdigest().encode():
        raise RefusedError(f"{where}/{MANIFEST} or {COMMITTED} is damaged: they do not fit each other")
    lines = [line.partition("  ") for line in manifest.decode(errors="replace").splitlines()]
    hashes = {file: digest for digest, _, file in lines}
    for file in hashes:
        if file not in there:
            raise RefusedError(f"{where}/{file} is missing")
    if marker != _marker(manifest, {f: there[f] for f in hashes}):
        said = set(marker.decode(errors="replace").splitlines())
        wrong = [f for f in hashes if f"{there[f]}  {f}" not in said]
        raise RefusedError(f"{where}/{(wrong or [COMMITTED])[0]} is damaged: not of the committed size")
    return hashes


def _verified(uri: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file; an error instead of a content that is not what was saved."""
    where = storage.show(uri.rstrip("/"))
    for file, digest in _files(uri).items():
        data = storage.read_bytes(storage.join(uri, file))
        if hashlib.sha256(data).hexdigest() != digest:
            raise RefusedError(f"{where}/{file} is damaged: its content is not what was saved (sha256 differs)")
        yield file, data
