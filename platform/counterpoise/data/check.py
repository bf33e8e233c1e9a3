"""A full look at a corpus: every row of every split is read and decoded."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from counterpoise import storage
from counterpoise.contracts import DataError, RefusedError
from counterpoise.data.card import SPLITS, Card, resolve, split_card
from counterpoise.data.decode import Decoder, RowError
from counterpoise.data.index import SplitIndex, duplicates, fingerprint, open_parquet, open_splits
from counterpoise.data.shards import MANIFEST, Shard, read_manifest, write_manifest
from counterpoise.data.units import RawRows, Reader, train_stats

Progress = Callable[[int, int, str], None]
_SHOWN = 5
_KEPT = 100
_TOLERATED = 0.01  # of a split; more rows than that undecodable or leaked from another split are an error


@dataclass
class SplitReport:
    """What one split holds."""

    rows: int
    expected: int | None
    files: int
    classes: dict[str, int]
    undecodable: int = 0


@dataclass
class CheckReport:
    """errors: the corpus is not what its card says, or leaks; warnings: worth a look.

    undecodable: the first hundred rows that cannot be decoded.
    """

    corpus: str
    fingerprint: str = ""
    splits: dict[str, SplitReport] = field(default_factory=dict)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    undecodable: list[dict[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}

    def lines(self) -> list[str]:
        """The report as plain text."""
        result = [f"corpus {self.corpus}: {'ok' if self.ok else 'not ok'}"]
        for name, shape in self.inputs.items():
            result.append(f"  {name}: {' x '.join(map(str, shape))}")
        for name, split in self.splits.items():
            counts = split.classes.values()
            said = "" if split.expected is None else f" (card: {split.expected})"
            result.append(
                f"  {name}: {split.rows} rows{said} in {split.files} files, {min(counts)} to {max(counts)} per class, "
                f"{split.undecodable} undecodable"
            )
        if self.fingerprint:
            result.append(f"  fingerprint {self.fingerprint[:16]}")
        for bad in self.undecodable[:_SHOWN]:
            result.append(f"  cannot decode {bad['sample_id']} in {bad['file']}: {bad['modality']}: {bad['reason']}")
        if sum(s.undecodable for s in self.splits.values()) > _SHOWN:
            result.append("  ...")
        result += [f"error: {text}" for text in self.errors] + [f"warning: {text}" for text in self.warnings]
        return result


def check_corpus(card: Card, progress: Progress | None = None, deep: bool = False) -> CheckReport:
    """Read and decode everything a card points at, and say what is wrong with it.

    deep: also read the columns that no modality uses, name files without a recorded checksum, and look for samples of
    different splits that are alike though their bytes differ.
    """
    report = CheckReport(card.name)
    try:
        indexes = open_splits(card)
        decoder = Decoder(card.select(None), {})
        for name, modality in decoder.modalities.items():
            if modality.kind in ("vector", "series"):
                decoder.stats[name] = train_stats(indexes["train"], modality, name)
    except DataError as error:  # nothing further can be read
        report.errors.append(str(error))
        return report
    report.fingerprint = fingerprint(card, indexes)
    _check_sums(card, indexes, report, deep)
    total = sum(len(index) for index in indexes.values())
    done = 0
    hashes: dict[str, dict[str, list[bytes]]] = {}
    looks: dict[str, list[list[np.ndarray | None]]] = {}
    for split, index in indexes.items():
        facts = split_card(card, split)
        counts = np.bincount(index.labels, minlength=len(card.class_names)).tolist()
        files = len(np.unique(index.group_pairs[:, 0]))
        classes = dict(zip(card.class_names, counts, strict=True))
        report.splits[split] = SplitReport(len(index), facts.expected if facts else None, files, classes)
        hashes[split] = {name: [] for name in decoder.modalities}
        looks[split] = []
        try:
            for row in _rows(index, decoder, report, hashes[split], looks[split] if deep else None):
                done += 1
                if progress and (row % 100 == 0 or done == total):
                    progress(done, total, split)
        except DataError as error:
            report.errors.append(str(error))
        _judge_split(split, index, report)
    if "valid" not in indexes:
        report.warnings.append("no valid split: decisions and early stopping have nothing to go by; carve one")
    _check_overlap(indexes, hashes, report)
    if deep:
        _read_whole({file for index in indexes.values() for file in index.files}, report)
        _check_alike(indexes, hashes, looks, report)
    report.inputs = _shapes(card, decoder)
    return report


def _shapes(card: Card, decoder: Decoder) -> dict[str, list[int]]:
    from counterpoise.data.decode import input_spec

    return {n: list(input_spec(m, decoder.stats.get(n)).shape) for n, m in decoder.modalities.items()}


def _rows(
    index: SplitIndex,
    decoder: Decoder,
    report: CheckReport,
    hashes: dict[str, list[bytes]],
    looks: list[list[np.ndarray | None]] | None,
) -> Iterable[int]:
    reader = Reader(index, decoder.modalities, keep=1)
    raw = RawRows(index, decoder.modalities, {}, reader)
    try:
        for row in range(len(index)):
            cells = raw.cells(row)
            for name, cell in cells.items():
                hashes[name].append(_digest(cell))
            found: list[np.ndarray | None] = [None] * len(cells)
            try:
                arrays = decoder(cells)
                if looks is not None:
                    found = [look(arrays[name], m.kind) for name, m in decoder.modalities.items()]
            except RowError as error:
                report.splits[index.split].undecodable += 1
                if len(report.undecodable) < _KEPT:
                    where = {"split": index.split, "sample_id": index.sample_ids[row], "file": index.file_of(row)}
                    report.undecodable.append({**where, "modality": error.modality, "reason": error.reason})
            if looks is not None:
                looks.append(found)
            yield row
    finally:
        reader.close()


_ALIKE = 25  # of the 256 bits of a look; those of two samples that have nothing in common differ in some 128


def look(array: np.ndarray, kind: str) -> np.ndarray | None:
    """How a decoded picture, video or spectrogram looks: 256 bits [32] uint8 that survive another encoding.

    Of 16 rows of 17 cells, whether each is brighter than the next (a difference hash). None where there is nothing to
    see, and for other kinds.
    """
    import cv2

    if kind not in ("image", "frames", "audio"):
        return None
    plane = np.ascontiguousarray(array.reshape(-1, *array.shape[-2:]).mean(axis=0), dtype=np.float32)
    small = cv2.resize(plane, (17, 16), interpolation=cv2.INTER_AREA)
    spread = float(small.max() - small.min())
    if spread <= 0.02 * (255 if kind != "audio" else max(1.0, float(np.abs(small).max()))):
        return None
    return np.packbits(small[:, 1:] > small[:, :-1])


def _check_alike(
    indexes: dict[str, SplitIndex],
    hashes: dict[str, dict[str, list[bytes]]],
    looks: dict[str, list[list[np.ndarray | None]]],
    report: CheckReport,
) -> None:
    """Samples of two splits that look and sound alike in every modality, but are not the same bytes."""
    for first, second in itertools.combinations([s for s in SPLITS if looks.get(s)], 2):
        pairs = []
        seen = [_columns(looks[split]) for split in (first, second)]
        usable = [m for m in range(len(looks[first][0])) if all(known[:, m].any() for _, known in seen)]
        if not usable:
            continue
        (one, there), (two, here) = seen
        names = list(hashes[first])
        exact = [n for i, n in enumerate(names) if i not in usable]
        for row in np.flatnonzero(here[:, usable].any(axis=1)).tolist():
            near = np.ones(len(one), dtype=bool)
            for m in usable:
                differing = np.bitwise_count(one[:, m] ^ two[row, m]).sum(axis=1)
                near &= (differing <= _ALIKE) & there[:, m] & here[row, m]
            for other in np.flatnonzero(near).tolist():
                same = [hashes[first][n][other] == hashes[second][n][row] for n in names]
                if not all(same) and all(hashes[first][n][other] == hashes[second][n][row] for n in exact):
                    pairs.append((other, row))
        if pairs:
            some = _some([f"{indexes[first].sample_ids[a]} and {indexes[second].sample_ids[b]}" for a, b in pairs])
            rows = len({b for _, b in pairs})
            text = f"{first} and {second}: {rows} rows of {second} look and sound like rows of {first}: {some}"
            (report.errors if rows > _TOLERATED * len(indexes[second]) else report.warnings).append(text)


def _columns(rows: list[list[np.ndarray | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Looks [N, M, 4] uint64, and which are there [N, M]."""
    there = np.array([[value is not None for value in row] for row in rows], dtype=bool).reshape(len(rows), -1)
    bits = np.zeros((*there.shape, 32), np.uint8)
    for i, row in enumerate(rows):
        for m, value in enumerate(row):
            if value is not None:
                bits[i, m] = value
    return bits.view(np.uint64), there


def _read_whole(files: set[str], report: CheckReport) -> None:
    """Every column and page: what no modality uses may be damaged too."""
    import pyarrow as pa

    for uri in sorted(files):
        try:
            with open_parquet(uri) as parquet:
                for group in range(parquet.metadata.num_row_groups):
                    parquet.read_row_group(group, use_threads=False)
        except (DataError, pa.ArrowException, OSError) as error:
            text = " ".join(str(error).split())
            report.errors.append(text if uri in text else f"{uri}: {text}")


def _digest(cell: Any) -> bytes:
    """A hash of an encoded cell; empty for a missing one, which equals no other."""
    if cell is None:
        return b""
    digest = hashlib.blake2b(digest_size=16)
    for part in cell if isinstance(cell, list) else [cell]:
        digest.update(part if isinstance(part, bytes) else np.asarray(part).tobytes())
        digest.update(b"\0")
    return digest.digest()


def _judge_split(split: str, index: SplitIndex, report: CheckReport) -> None:
    facts = report.splits[split]
    if facts.undecodable:
        text = f"split {split}: {facts.undecodable} of {facts.rows} rows cannot be decoded"
        (report.errors if facts.undecodable > _TOLERATED * facts.rows else report.warnings).append(text)
    missing = [name for name, count in facts.classes.items() if count == 0]
    if missing:
        report.warnings.append(f"split {split}: no sample of {_some(missing)}")
    twice = duplicates(index.sample_ids)
    if twice:
        report.errors.append(f"split {split}: {len(twice)} sample ids occur more than once: {_some(twice)}")


def _some(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def record_sums(card: Card) -> int:
    """Write manifest.json with the SHA-256 of every file of a corpus that has none; the number of files."""
    if read_manifest(card.folder) is not None:
        raise RefusedError(f"{storage.join(card.folder, MANIFEST)} exists; what it records is compared, not replaced")
    indexes = open_splits(card)
    sums: dict[str, str] = {}
    shards: dict[str, list[Shard]] = {}
    for split, index in indexes.items():
        counts = Counter(np.repeat(index.group_pairs[:, 0], index.group_sizes).tolist())
        for number, rows in sorted(counts.items()):
            uri = index.files[number]
            sums.setdefault(uri, storage.sha256(uri))
            name = uri.removeprefix(card.folder.rstrip("/") + "/")
            shards.setdefault(split, []).append(Shard(name, rows, sums[uri]))
    write_manifest(card.folder, shards, name=card.name)
    return len(sums)


def _check_sums(card: Card, indexes: dict[str, SplitIndex], report: CheckReport, deep: bool) -> None:
    manifest = read_manifest(card.folder) or {}
    known: dict[str, str] = {}
    for shards in manifest.get("splits", {}).values():
        known |= {resolve(card, s["file"]): s["sha256"] for s in shards}
    for split in card.splits.values():
        known |= {resolve(card, name): value for name, value in split.sha256.items()}
    used = {f for index in indexes.values() for f in index.files}
    for uri in sorted(known):
        if not storage.exists(uri):
            report.errors.append(f"{uri}: listed with a checksum, but not there")
        elif storage.sha256(uri) != known[uri].lower():
            report.errors.append(f"{uri}: its SHA-256 is not the one that is recorded; make the file again")
    if deep and (unknown := used - set(known)):
        report.warnings.append(
            f"{len(unknown)} of {len(used)} files have no recorded checksum, so that not every flipped bit can be "
            "noticed; if they are as they should be: counterpoise corpora check --record"
        )


def _check_overlap(
    indexes: dict[str, SplitIndex], hashes: dict[str, dict[str, list[bytes]]], report: CheckReport
) -> None:
    names = [s for s in SPLITS if s in indexes]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            ids = set(indexes[first].sample_ids) & set(indexes[second].sample_ids)
            if ids:
                some = _some(sorted(ids))
                report.warnings.append(f"{first} and {second} share {len(ids)} sample ids: {some}")
            one, two = hashes[first], hashes[second]
            whole = set(zip(*one.values(), strict=True)) & set(zip(*two.values(), strict=True))
            whole = {cells for cells in whole if all(cells)}
            if whole:
                rows = sum(Counter(zip(*two.values(), strict=True))[cells] for cells in whole)
                text = f"{first} and {second} share samples whose every modality is equal: {rows} rows of {second}"
                # public corpora have a few; more than that and the test accuracy means nothing
                (report.errors if rows > _TOLERATED * len(indexes[second]) else report.warnings).append(text)
                continue
            for modality in one:
                shared = (set(one[modality]) & set(two[modality])) - {b""}
                if shared:
                    rows = sum(Counter(two[modality])[h] for h in shared)
                    report.warnings.append(
                        f"{first} and {second} share {len(shared)} equal {modality} cells ({rows} rows of {second})"
                    )
