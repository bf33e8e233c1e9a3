"""A disk that fills up, wherever a run writes: what was there stays, the message helps, and it goes on afterwards."""

from __future__ import annotations

import builtins
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import new_folder, settings
from tests.trust.faults import chance, count, differences, digests, flip_bit, job_of, keep, train

from counterpoise import storage
from counterpoise.config import resolve
from counterpoise.contracts import DataError, RefusedError
from counterpoise.engine import checkpoint
from counterpoise.engine import run as run_module
from counterpoise.engine.job import open_data
from counterpoise.engine.run import RunFolder

SITES = {  # where -> (files, whether the run goes on without)
    "checkpoint": (r"checkpoints/.*\.safetensors$", False),
    "marker": (r"checkpoints/.*/COMMITTED", False),
    "best": (r"best/.*state\.json$", False),
    "records": (r"records\.jsonl$", False),
    "predictions": (r"predictions\.parquet", False),
    "summary": (r"summary\.json", False),
    "seal": (r"SHA256SUMS", False),
    "status": (r"status\.json", True),
    "pointer": (r"checkpoints/LATEST", True),
}


class FullDisk:
    """Files as the product opens them, on a disk that is full from the `nth` byte of some files on, until it ends.

    only: the disk is full for these files alone; otherwise for all, from the first of these on.
    """

    def __init__(self, files: str, nth: int, skip: int, only: bool, note: Path) -> None:
        self.files, self.nth, self.skip, self.only, self.note = re.compile(files), nth, skip, only, note
        self.full = False

    def open(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = builtins.open(path, mode, *arguments, **options)  # noqa: SIM115 (whoever asked closes it)
        if isinstance(path, int) or not set(mode) & set("wax"):
            return file
        return _File(file, str(path), self)

    def room(self, path: str, wanted: int) -> int:
        """How many bytes of a write the disk takes."""
        hit = bool(self.files.search(path))
        if hit and self.skip:
            self.skip -= 1
            return wanted
        if hit and not self.full:
            self.full = True
            self.note.write_text(f"{path}, byte {self.nth}")
            return min(self.nth, wanted)
        return 0 if self.full and (hit or not self.only) else wanted


class _File:
    def __init__(self, file: Any, path: str, disk: FullDisk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        room = self._disk.room(self._path, len(data))
        if room < len(data):
            self._file.write(data[:room])
            self._file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))


@pytest.fixture(scope="module")
def whole(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("whole")
    experiment, provenance = resolve(settings(corpus))
    uri = new_folder(place, experiment, provenance).uri
    assert train(job_of(experiment, uri), place).codes == [0]
    return digests(uri)


@pytest.mark.parametrize("site", SITES)
def test_a_full_disk_ends_a_run_with_what_it_needs_and_leaves_what_was_there(
    site: str, corpus: str, whole: dict[str, str], tmp_path: Path
) -> None:
    files, goes_on = SITES[site]
    for trial in range(count(1, 4)):
        rng = chance("disk", site, trial)
        place = tmp_path / str(trial)
        place.mkdir()
        experiment, provenance = resolve(settings(corpus))
        uri = new_folder(place, experiment, provenance).uri
        first = {"checkpoint": 2, "marker": 2, "records": 2, "pointer": 2}.get(site, 0)  # something lies there by then
        skip = first + rng.randrange(2) * (first > 0 or site == "status")
        disk = FullDisk(files, rng.randrange(0, 40), skip, goes_on, place / "landed")

        def fill(rank: int, disk: FullDisk = disk) -> None:
            storage.open = run_module.open = disk.open  # type: ignore[attr-defined]

        ended = train(job_of(experiment, uri), place, also=fill)
        where = {"file": disk.note.read_text()} if disk.note.exists() else None
        if goes_on:
            wrong: Any = differences(uri, whole) if ended.codes == [0] else ended.said
        else:
            said = re.search(r"ResourceError: (\S+): disk full; ([\d,]+) bytes needed, ([\d,]+) free", ended.said[0])
            assert ended.codes == [4] and said is not None, ended.said
            assert said[1].startswith(str(place)) and int(said[2].replace(",", "")) > 0
            folder = RunFolder.open(uri)
            kept = checkpoint.committed(folder.checkpoints)
            assert kept and all(checkpoint.verify(f"{folder.checkpoints}/{name}") is None for name in kept)
            assert not folder.is_locked()
            again = train(job_of(experiment, uri, resume=True), place)
            wrong = differences(uri, whole) if again.codes == [0] else again.said
        keep("5 full disk", f"{site}, {'alone' if goes_on else 'and all after'}", where, not wrong)
        assert not wrong


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_file_system_that_is_really_full(corpus: str, whole: dict[str, str], tmp_path: Path) -> None:
    import subprocess

    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", place], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        experiment, provenance = resolve(settings(corpus))
        uri = new_folder(place, experiment, provenance).uri
        ballast = place / "ballast"

        def fill(rank: int) -> None:
            before, saves = checkpoint._before, []

            def _before(operation: str) -> None:
                saves.append(operation)
                if saves.count("make") == 3 and not ballast.exists():
                    with pytest.MonkeyPatch.context(), open(ballast, "wb") as file:
                        left = storage.free_bytes(str(place)) or 0
                        file.write(b"\0" * max(0, left - 8192))
                before(operation)

            checkpoint._before = _before

        ended = train(job_of(experiment, uri), tmp_path, also=fill)
        where = {"file": str(ballast)} if ballast.exists() else None
        assert ended.codes == [4] and "disk full" in ended.said[0], ended.said
        ballast.unlink()
        again = train(job_of(experiment, uri, resume=True), tmp_path)
        wrong = differences(uri, whole) if again.codes == [0] else again.said
        keep("5 full disk", "tmpfs of 400 kB", where, not wrong)
        assert not wrong
    finally:
        subprocess.run(["umount", "-l", place], check=True)


# --- bit rot


def rotten(path: Path, bit: int, look: Callable[[], object]) -> bool:
    """Whether a flipped bit is noticed by whoever uses the file; it is flipped back."""
    flip_bit(path, bit)
    try:
        look()
    except (DataError, RefusedError):
        return True
    finally:
        flip_bit(path, bit)
    return False


def test_a_flipped_bit_in_checkpoint_or_predictions_is_found_before_use(corpus: str, tmp_path: Path) -> None:
    experiment, provenance = resolve(settings(corpus))
    folder = new_folder(tmp_path, experiment, provenance)
    assert train(job_of(experiment, folder.uri), tmp_path).codes == [0]
    last = Path(folder.checkpoints) / checkpoint.committed(folder.checkpoints)[-1]
    rng = chance("rot")

    def used() -> None:
        folder.read_predictions()
        if problems := folder.verify():
            raise RefusedError(problems[0])

    for file, look in [
        *((file, lambda: checkpoint.load(str(last))) for file in sorted(last.iterdir())),
        (Path(folder.uri) / "predictions.parquet", used),
    ]:
        bits = rng.sample(range(8 * file.stat().st_size), count(8, 200))
        missed = [bit for bit in bits if not rotten(file, bit, look)]
        for bit in bits:
            keep("8 bit rot", file.name, {"file": file.name, "bit": bit}, bit not in missed)
        assert not missed, file


def test_a_flipped_bit_in_a_shard_is_found_before_it_is_trained_on(corpus: str, tmp_path: Path) -> None:
    """In the pages: the footer has no checksum in Parquet; what a flip there changes must show in what is read."""
    import shutil

    place = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    experiment, _ = resolve(settings(str(place)))

    def everything() -> dict[str, Any]:
        data = open_data(experiment)
        try:
            batches = [b for split in ("train", "valid", "test") for b in data.batches(split)]
            if skipped := data.skipped():
                raise DataError(str(skipped[0]))
            content = [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]
            return {"fingerprint": data.fingerprint, "content": content}
        finally:
            data.close()

    whole, rng = everything(), chance("shard")
    files = sorted(place.glob("train-*.parquet"))
    harmless = 0
    for _ in range(count(16, 200)):
        file = rng.choice(files)
        size = file.stat().st_size
        footer = int.from_bytes(file.read_bytes()[-8:-4], "little") + 8
        bit = rng.randrange(32, 8 * (size - footer))

        def unlike() -> None:
            if everything() != whole:
                raise AssertionError("another content was read without a word")
            nonlocal harmless
            harmless += 1  # what was flipped is not content: a page index
            raise DataError("nothing that is read has changed")

        found = rotten(file, bit, unlike)
        keep("8 bit rot", "shard", {"file": file.name, "bit": bit}, found)
        assert found
    assert harmless < count(16, 200) / 2
