"""A full look at a corpus: every row of every split is read and decoded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from counterpoise import storage
from counterpoise.contracts import DataError
from counterpoise.data.card import SPLITS, Card, resolve, split_card
from counterpoise.data.decode import Decoder, RowError
from counterpoise.data.index import SplitIndex, duplicates, fingerprint, open_splits
from counterpoise.data.shards import read_manifest
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


def check_corpus(card: Card, progress: Progress | None = None) -> CheckReport:
    """Read and decode everything a card points at, and say what is wrong with it."""
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
    _check_sums(card, indexes, report)
    total = sum(len(index) for index in indexes.values())
    done = 0
    hashes: dict[str, dict[str, list[bytes]]] = {}
    for split, index in indexes.items():
        facts = split_card(card, split)
        counts = np.bincount(index.labels, minlength=len(card.class_names)).tolist()
        files = len(np.unique(index.group_pairs[:, 0]))
        classes = dict(zip(card.class_names, counts, strict=True))
        report.splits[split] = SplitReport(len(index), facts.expected if facts else None, files, classes)
        hashes[split] = {name: [] for name in decoder.modalities}
        try:
            for row in _rows(index, decoder, report, hashes[split]):
                done += 1
                if progress and (row % 100 == 0 or done == total):
                    progress(done, total, split)
        except DataError as error:
            report.errors.append(str(error))
        _judge_split(split, index, report)
    if "valid" not in indexes:
        report.warnings.append("no valid split: decisions and early stopping have nothing to go by; carve one")
    _check_overlap(indexes, hashes, report)
    report.inputs = _shapes(card, decoder)
    return report


def _shapes(card: Card, decoder: Decoder) -> dict[str, list[int]]:
    from counterpoise.data.decode import input_spec

    return {n: list(input_spec(m, decoder.stats.get(n)).shape) for n, m in decoder.modalities.items()}


def _rows(index: SplitIndex, decoder: Decoder, report: CheckReport, hashes: dict[str, list[bytes]]) -> Iterable[int]:
    reader = Reader(index, decoder.modalities, keep=1)
    raw = RawRows(index, decoder.modalities, {}, reader)
    try:
        for row in range(len(index)):
            cells = raw.cells(row)
            for name, cell in cells.items():
                hashes[name].append(_digest(cell))
            try:
                decoder(cells)
            except RowError as error:
                report.splits[index.split].undecodable += 1
                if len(report.undecodable) < _KEPT:
                    where = {"split": index.split, "sample_id": index.sample_ids[row], "file": index.file_of(row)}
                    report.undecodable.append({**where, "modality": error.modality, "reason": error.reason})
            yield row
    finally:
        reader.close()


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


def _check_sums(card: Card, indexes: dict[str, SplitIndex], report: CheckReport) -> None:
    manifest = read_manifest(card.folder) or {}
    known: dict[str, str] = {}
    for shards in manifest.get("splits", {}).values():
        known |= {resolve(card, s["file"]): s["sha256"] for s in shards}
    for split in card.splits.values():
        known |= {resolve(card, name): value for name, value in split.sha256.items()}
    for uri in sorted({f for index in indexes.values() for f in index.files} | set(known)):
        if uri in known:
            if not storage.exists(uri):
                report.errors.append(f"{uri}: listed with a checksum, but not there")
            elif hashlib.sha256(storage.read_bytes(uri)).hexdigest() != known[uri].lower():
                report.errors.append(f"{uri}: its SHA-256 is not the one that is recorded; make the file again")


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
