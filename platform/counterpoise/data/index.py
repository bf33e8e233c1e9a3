"""Where every row of a split is: ids and labels in memory, media left in the Parquet files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from counterpoise import storage
from counterpoise.contracts import DataError
from counterpoise.data.card import SPLITS, Card, Carve, SplitCard, resolve, split_card
from counterpoise.data.tokens import preprocessing_facts
from counterpoise.wording import did_you_mean


@dataclass(frozen=True)
class SplitIndex:
    """The rows of one split in canonical order: by file name, then as they lie in the file.

    group_pairs [G, 2]: file number and row group of the row groups in row order; group_sizes [G]: their rows here.
    num_bytes: of these rows as they are stored, all columns, not compressed.
    position [N]: a row's place inside its row group, which may hold rows of other splits too.
    """

    corpus: str
    split: str
    files: tuple[str, ...]
    group_pairs: np.ndarray
    group_sizes: np.ndarray
    position: np.ndarray
    labels: np.ndarray
    sample_ids: list[str]
    num_bytes: int

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def group_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.group_sizes)])

    def place(self, row: int) -> tuple[int, int, int]:
        """File number, row group, and position in the row group of a row."""
        group = int(np.searchsorted(self.group_starts, row, side="right")) - 1
        return int(self.group_pairs[group, 0]), int(self.group_pairs[group, 1]), int(self.position[row])

    def file_of(self, row: int) -> str:
        return self.files[self.place(row)[0]]


def open_parquet(uri: str) -> Any:
    """A pyarrow.parquet.ParquetFile that checks page checksums; DataError with the file's name if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not storage.is_local(uri):
            ranges = storage.open_ranges(uri)
            size = _reject_extension_types(ranges, uri)
            opened = pq.ParquetFile(ranges, page_checksum_verification=True, pre_buffer=True)
        else:
            with storage.open_input(uri) as source:
                size = _reject_extension_types(source, uri)
            opened = pq.ParquetFile(storage.local_path(uri), page_checksum_verification=True)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: not a readable Parquet file ({_first_line(error)}); make it again") from None
    meta = opened.metadata
    unpacked = sum(meta.row_group(g).total_byte_size for g in range(meta.num_row_groups))
    if unpacked > _UNPACKED and unpacked > _RATIO * size:
        opened.close()
        raise DataError(f"{uri}: {size:,} bytes that unpack to {unpacked:,}; media do not shrink like that")
    return opened


def check_light(parquet: Any, columns: Iterable[str], uri: str) -> None:
    """Raise if ids, labels and the like, which are read as a whole, are too large to be that."""
    wanted = set(columns)
    for g in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(g)
        for c in range(group.num_columns):
            chunk = group.column(c)
            if chunk.path_in_schema in wanted and chunk.total_uncompressed_size > _LIGHT * (group.num_rows + 8):
                raise DataError(
                    f"{uri}: column '{chunk.path_in_schema}' has {chunk.total_uncompressed_size:,} bytes for "
                    f"{group.num_rows} rows; ids and labels have at most {_LIGHT:,} bytes each"
                )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_UNPACKED, _RATIO = 2**28, 100  # bytes of a file when it is unpacked, and times its size: more than both is a bomb
_LIGHT = 10_000  # bytes of an id, label, ... of one row
_TAIL = 65536  # bytes read at once from the end of a file; most footers fit in


def _reject_extension_types(source: Any, uri: str) -> int:
    """The size of the file. Raises before pyarrow sees an extension type: a registered one may run code of its own
    while it is opened."""
    size = source.seek(0, 2)
    if size < 12:
        raise DataError(f"{uri}: {size} bytes is too short for a Parquet file; make it again")
    source.seek(max(size - _TAIL, 0))
    tail = source.read(_TAIL)
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != b"PAR1" or length > size - 12:
        raise DataError(f"{uri}: not a whole Parquet file (the footer is missing); make it again")
    if length + 8 <= len(tail):
        footer = tail[-8 - length : -8]
    else:
        source.seek(size - 8 - length)
        footer = source.read(length)
    for match in re.finditer(rb"ARROW:schema.{1,8}?([A-Za-z0-9+/]{16,}={0,2})", footer, re.DOTALL):
        text = match.group(1)
        # the length byte before the text may itself look like base64: try the alignments
        for skip in range(4):
            part = text[skip:]
            if b"ARROW:extension:name" in base64.b64decode(part[: len(part) // 4 * 4], validate=False):
                raise DataError(f"{uri}: has Arrow extension types; write it with plain column types")
    source.seek(0)
    return int(size)


def split_files(card: Card, split: SplitCard, name: str) -> list[str]:
    """Absolute paths or URIs of a split's Parquet files, sorted, so that no listing order matters."""
    found: set[str] = set()
    for pattern in split.files:
        uri = resolve(card, pattern)
        if any(c in uri for c in "*?["):
            matches = [m for m in storage.glob(uri) if m.endswith(".parquet")]
            if not matches:
                raise DataError(f"corpus {card.name}, split {name}: no .parquet file matches {uri}{_hint(card)}")
            found.update(matches)
        elif not storage.exists(uri):
            raise DataError(f"corpus {card.name}, split {name}: {uri} does not exist{_hint(card)}")
        else:
            found.add(uri)
    return sorted(found)


def _hint(card: Card) -> str:
    from counterpoise.data.recipes import recipe_names

    if card.name in recipe_names():
        return f"; run: counterpoise corpora prepare {card.name}"
    return f"; correct splits in {card.location or 'the card'}"


@dataclass
class _Rows:
    """Light columns of all files of a split."""

    files: list[str]
    file: np.ndarray
    group: np.ndarray
    position: np.ndarray
    size: np.ndarray  # bytes; the same for all rows of a row group
    columns: dict[str, list[Any]]
    ids: list[str]


def columns_of(modality: Any) -> list[str]:
    """The Parquet columns a modality is read from."""
    if not isinstance(modality.column, str):
        return list(modality.column)
    pair = getattr(modality, "pair", None)
    return [modality.column] if pair is None else [modality.column, pair]


def _read_light(card: Card, split: SplitCard, name: str, extra: Iterable[str]) -> _Rows:
    import pyarrow as pa

    files = split_files(card, split, name)
    light = list(dict.fromkeys([card.label, *split.where, *extra, *([card.sample_id] if card.sample_id else [])]))
    needed = [*light, *(c for m in card.modalities.values() for c in columns_of(m))]
    parts: list[tuple[int, int, int, int]] = []
    columns: dict[str, list[Any]] = {c: [] for c in light}
    ids: list[str] = []
    for number, uri in enumerate(files):
        with open_parquet(uri) as parquet:
            names = parquet.schema_arrow.names
            for column in needed:
                if column not in names:
                    raise DataError(
                        f"corpus {card.name}, split {name}: {uri} has no column '{column}'"
                        f"{did_you_mean(column, names)}; its columns are: {', '.join(names)}"
                    )
            meta = parquet.metadata
            groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
            parts += [(number, g, group.num_rows, group.total_byte_size) for g, group in enumerate(groups)]
            check_light(parquet, light, uri)
            try:
                table = parquet.read(columns=light)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{uri}: damaged ({_first_line(error)}); make it again") from None
        for column in light:
            columns[column] += table.column(column).to_pylist()
        if card.sample_id is None:
            stem = uri.rsplit("/", 1)[-1].removesuffix(".parquet")
            ids += [f"{stem}/{i}" for i in range(table.num_rows)]
        else:
            values = table.column(card.sample_id).to_pylist()
            if None in values:
                raise DataError(f"{uri}: row {values.index(None)} has no {card.sample_id}")
            ids += [str(v) for v in values]
    sizes = np.array([p[2] for p in parts], dtype=np.int64)
    return _Rows(
        files,
        np.repeat(np.array([p[0] for p in parts], dtype=np.int64), sizes),
        np.repeat(np.array([p[1] for p in parts], dtype=np.int64), sizes),
        np.concatenate([np.arange(n) for n in sizes]) if len(sizes) else np.zeros(0, np.int64),
        np.repeat(np.array([p[3] / max(p[2], 1) for p in parts]), sizes),
        columns,
        ids,
    )


def _kept(card: Card, split: SplitCard, name: str, rows: _Rows) -> np.ndarray:
    keep = np.ones(len(rows.ids), dtype=bool)
    for column, wanted in split.where.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        values = rows.columns[column]
        mask = np.fromiter((v in allowed for v in values), dtype=bool, count=len(values))
        if not mask.any():
            present = sorted({str(v) for v in values})[:10]
            raise DataError(
                f"corpus {card.name}, split {name}: no row has {column} = {wanted!r}; "
                f"values there: {', '.join(present)}"
            )
        keep &= mask
    return keep


def _labels(card: Card, name: str, values: list[Any], ids: list[str]) -> np.ndarray:
    classes = card.class_names
    number = {c: k for k, c in enumerate(classes)}
    labels = np.empty(len(values), dtype=np.int64)
    for i, value in enumerate(values):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str):
            label = number.get(value, -1)
            if label < 0 or not card.classes:
                raise DataError(
                    f"corpus {card.name}, split {name}, sample {ids[i]}: {card.label} is '{value}'"
                    f"{did_you_mean(value, classes)}; classes of the card: {', '.join(classes[:20])}"
                )
        elif isinstance(value, int) and not isinstance(value, bool):
            label = value
            if not 0 <= label < len(classes):
                raise DataError(
                    f"corpus {card.name}, split {name}, sample {ids[i]}: {card.label} is {value}; "
                    f"the card has {len(classes)} classes, so labels lie in 0..{len(classes) - 1}"
                )
        else:
            raise DataError(
                f"corpus {card.name}, split {name}, sample {ids[i]}: {card.label} is {value!r}; "
                "labels are whole numbers, or names that the card lists in classes"
            )
        labels[i] = label
    return labels


def _rank(*parts: object) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def carved(carve: Carve, split: str, ids: list[str], labels: np.ndarray, groups: list[str]) -> np.ndarray:
    """Which rows go to the carved split, as a mask: a function of ids, labels, groups and seed, not of row order.

    Groups are taken in an order given by a hash, each only if it brings the count nearer to the wanted one. With
    `stratify`, groups whose rows share one class are counted per class; mixed groups are counted together.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    strata: dict[int, list[str]] = {}
    for group, rows in members.items():
        kinds = set(labels[rows].tolist())
        strata.setdefault(kinds.pop() if carve.stratify and len(kinds) == 1 else -1, []).append(group)
    mask = np.zeros(len(ids), dtype=bool)
    for names in strata.values():
        wanted = carve.fraction * sum(len(members[n]) for n in names)
        taken = 0
        for name in sorted(names, key=lambda n: (_rank("carve", split, carve.seed, n), n)):
            size = len(members[name])
            if abs(taken + size - wanted) < abs(taken - wanted):
                mask[members[name]] = True
                taken += size
    return mask


def _index(card: Card, name: str, rows: _Rows, keep: np.ndarray) -> SplitIndex:
    chosen = np.flatnonzero(keep)
    ids = [rows.ids[i] for i in chosen]
    labels = _labels(card, name, [rows.columns[card.label][i] for i in chosen], ids)
    pairs = np.stack([rows.file[chosen], rows.group[chosen]], axis=1)
    unique, counts = np.unique(pairs, axis=0, return_counts=True)  # sorted, as the rows are
    return SplitIndex(
        card.name, name, tuple(rows.files), unique.astype(np.int64), counts.astype(np.int64),
        rows.position[chosen], labels, ids, round(float(rows.size[chosen].sum())),
    )  # fmt: skip


def open_splits(card: Card, *, counted: bool = True) -> dict[str, SplitIndex]:
    """The index of every split of the card; reads footers and light columns only.

    counted: raise if a split has not the number of rows that the card says, or none.
    """
    carves = [(n, c) for n in ("test", "valid") if (s := split_card(card, n)) and (c := s.carve)]
    result: dict[str, SplitIndex] = {}
    for name in SPLITS:
        split = split_card(card, name)
        if split is None or split.carve:
            continue
        groups = {c.group for _, c in carves if c.group} if name == "train" else set()
        rows = _read_light(card, split, name, sorted(groups))
        keep = _kept(card, split, name, rows)
        if name == "train":
            whole = _index(card, name, rows, keep)
            chosen = np.flatnonzero(keep)
            left = np.ones(len(whole), dtype=bool)
            for target, carve in carves:
                grouping = [str(rows.columns[carve.group][i]) for i in chosen] if carve.group else whole.sample_ids
                at = np.flatnonzero(left)
                # the fraction is of the whole source, also for the second split carved out of it
                scaled = carve.model_copy(update={"fraction": min(carve.fraction * len(whole) / len(at), 1.0)})
                mask = carved(
                    scaled,
                    target,
                    [whole.sample_ids[i] for i in at],
                    whole.labels[at],
                    [grouping[i] for i in at],
                )
                taken = np.zeros(len(rows.ids), dtype=bool)
                taken[chosen[at[mask]]] = True
                left[at[mask]] = False
                result[target] = _index(card, target, rows, taken)
            taken = np.zeros(len(rows.ids), dtype=bool)
            taken[chosen[left]] = True
            result[name] = _index(card, name, rows, taken)
        else:
            result[name] = _index(card, name, rows, keep)
    if counted:
        for name, index in result.items():
            _check_count(card, name, len(index))
    return {name: result[name] for name in SPLITS if name in result}


def open_split(card: Card, split: str) -> SplitIndex:
    """The index of one split."""
    indexes = open_splits(card)
    if split not in indexes:
        split_card(card, split)
        raise DataError(f"corpus {card.name} has no split {split}; it has: {', '.join(indexes)}")
    return indexes[split]


def _check_count(card: Card, name: str, found: int) -> None:
    split = split_card(card, name)
    assert split is not None, name
    if split.expected is not None and split.expected != found:
        from counterpoise.data.recipes import recipe_names

        remedy = (
            f"rebuild with: counterpoise corpora prepare {card.name}"
            if card.name in recipe_names()
            else f"rebuild it, or correct splits.{name}.expected in {card.location or 'the card'}"
        )
        raise DataError(
            f"corpus {card.name}, split {name}: {found} rows found, the card says {split.expected}; {remedy}"
        )
    if found == 0:
        raise DataError(f"corpus {card.name}, split {name}: no rows")


def fingerprint(card: Card, indexes: Mapping[str, SplitIndex], modalities: Iterable[str] | None = None) -> str:
    """SHA-256 of ids and labels per split, class names and preprocessing; the same for any layout of the shards."""
    digest = hashlib.sha256()
    chosen = card.select(modalities)
    facts = {
        "classes": card.class_names,
        "modalities": {n: preprocessing_facts(m) for n, m in chosen.items()},
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name in SPLITS:
        if name in indexes:
            index = indexes[name]
            digest.update(f"\n{name}\n".encode())
            for pair in sorted(zip(index.sample_ids, index.labels.tolist(), strict=True)):
                digest.update(json.dumps(pair).encode())
    return digest.hexdigest()


def duplicates(ids: Iterable[str]) -> list[str]:
    """Ids that occur more than once, sorted."""
    return sorted(i for i, n in Counter(ids).items() if n > 1)
