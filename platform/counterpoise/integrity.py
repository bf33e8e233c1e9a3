"""Whether what was written is still what lies there: runs, exported models and predictions, by their checksums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from counterpoise import storage
from counterpoise.contracts import CounterpoiseError, DataError, RefusedError
from counterpoise.engine.run import MANIFEST, SUMS, RunFolder, find_runs


@dataclass
class Verified:
    """One folder. problems: [] if every byte that has a checksum is as it was written. note: what has none."""

    place: str
    kind: str  # run, or folder: an exported model, predictions
    checked: str  # in words
    problems: list[str] = field(default_factory=list)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        place = storage.show(self.place)
        if self.problems:
            return [f"{place}: DAMAGED", *(f"    {problem}" for problem in self.problems)]
        return [f"{place}: {self.checked} as written" + (f"; {self.note}" if self.note else "")]


def verify_places(places: Sequence[str]) -> Iterator[Verified]:
    """Every run, exported model and folder of predictions at some places: themselves, or folders that hold runs."""
    for place in places:
        at = place.rstrip("/")
        if not storage.exists(storage.join(at, MANIFEST)) and storage.exists(storage.join(at, SUMS)):
            yield _folder(at)
            continue
        runs = find_runs([place])
        if not runs:
            raise DataError(f"{storage.show(place)}: neither a run, nor a folder of runs, nor one with {SUMS}")
        for uri in runs:
            yield _run(uri)


def _run(uri: str) -> Verified:
    try:
        folder = RunFolder.open(uri)
        state = folder.describe()
        files = folder.files()
        sealed = len(folder.sums())
        points = sum(name.endswith("/COMMITTED") for name in files)
        problems = folder.verify()
    except (CounterpoiseError, UnicodeDecodeError) as error:
        return Verified(uri, "run", "", [str(error)])
    note = ""
    if SUMS not in files and folder.state() != "finished":
        problems = problems[1:]  # that it is not sealed
        note = f"it is {state}: its other files get checksums when it ends"
    words = f"{sealed} files and " if sealed else ""
    return Verified(uri, "run", f"{words}{points} checkpoint{'' if points == 1 else 's'}", problems, note)


def _folder(place: str) -> Verified:
    from counterpoise.engine.inference import read_sums

    try:
        sums = read_sums(storage.read_bytes(storage.join(place, SUMS)).decode(errors="replace"))
    except (ValueError, RefusedError) as error:
        return Verified(place, "folder", "", [f"{SUMS} is damaged: {error}"])
    problems = []
    for name, digest in sums.items():
        file = storage.join(place, name)
        if not storage.exists(file):
            problems.append(f"{name}: missing")
        elif storage.sha256(file) != digest:
            problems.append(f"{name}: differs from {SUMS}")
    return Verified(place, "folder", f"{len(sums)} files", problems)
