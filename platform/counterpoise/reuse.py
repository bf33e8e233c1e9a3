"""Runs that a sweep need not do again: somebody has finished the same ones.

A run is the same if experiment (with its seed), data, workers, device and the versions of the libraries are. It is
copied whole, so a sweep's folder stays complete by itself, and its run.json still says where and when it was trained.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from counterpoise import storage
from counterpoise.contracts import DataError
from counterpoise.engine.run import MANIFEST, RunFolder, find_runs
from counterpoise.storage import join

_SAME = ("digest", "data_fingerprint", "workers", "device", "versions")


class Reuse:
    """The finished runs of some places: runs, sweeps, comparisons, or folders that hold them."""

    def __init__(self, places: Sequence[str]) -> None:
        """Raises DataError for a place without runs."""
        self._runs: dict[str, list[tuple[dict[str, Any], RunFolder]]] = {}
        for place in places:
            found = find_runs([place])
            if not found:
                raise DataError(f"nothing to reuse in {storage.show(place)}: it holds no run")
            for folder in map(RunFolder, found):
                manifest = folder.manifest
                self._runs.setdefault(str(manifest.get("digest")), []).append((manifest, folder))

    def __bool__(self) -> bool:
        return bool(self._runs)

    def take(self, wanted: Mapping[str, Any], target: str) -> tuple[str, list[str]]:
        """Copy a run like `wanted`, the run.json it would have, to `target`: its place, '' if there is none, and why
        others with the same experiment were not taken."""
        refused = []
        for manifest, folder in self._runs.get(str(wanted["digest"]), []):
            if reason := next(_objections(wanted, manifest, folder), None):
                refused.append(f"{storage.show(folder.uri)}: {reason}")
                continue
            copy(folder.uri, target)
            return folder.uri, refused
        return "", refused


def _objections(wanted: Mapping[str, Any], manifest: Mapping[str, Any], folder: RunFolder) -> Iterator[str]:
    """What speaks against a run; its files are read only if nothing else does."""
    yield from (f"it has other {key.replace('_', ' ')}" for key in _SAME if manifest.get(key) != wanted[key])
    if (state := folder.state()) != "finished":
        yield f"it is {state}"
    yield from folder.verify()


def copy(source: str, target: str) -> None:
    """Copy a run folder. What was left unfinished at `target` is written over; a local one is there whole or not."""
    local = storage.is_local(target)
    place = join(os.path.dirname(target), f".{os.path.basename(target)}.part") if local else target
    if local:
        shutil.rmtree(storage.local_path(place), ignore_errors=True)
    for name in sorted(storage.list_files(source), key=lambda name: name == MANIFEST):  # that makes it a run: last
        storage.write_bytes(join(place, name), storage.read_bytes(join(source, name)))
    if local:
        os.rename(storage.local_path(place), storage.local_path(target))
