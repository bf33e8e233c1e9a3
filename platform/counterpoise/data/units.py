"""From a unit of the plan to decoded rows: read its window, decode, replace what cannot be decoded.

Everything here can run in another process: arguments and results are plain data.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from counterpoise.contracts import DataError
from counterpoise.data.card import AnyModality
from counterpoise.data.decode import DecodeError, Decoder, RowError, Stats, numbers
from counterpoise.data.index import SplitIndex, columns_of, open_parquet
from counterpoise.data.plan import Unit


class Reader:
    """Reads row groups of a split, keeping a few files open and the last row groups at hand. Safe to share."""

    def __init__(self, index: SplitIndex, modalities: Mapping[str, AnyModality], keep: int = 2) -> None:
        self.index = index
        self.columns = sorted({c for m in modalities.values() for c in columns_of(m)})
        self._keep = keep
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._tables: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def table(self, file: int, group: int) -> Any:
        import pyarrow as pa

        with self._lock:
            if (file, group) in self._tables:
                return self._tables[file, group]
            if file not in self._files:
                if len(self._files) >= 8:
                    self._files.popitem(last=False)[1].close()
                self._files[file] = open_parquet(self.index.files[file])
            try:
                table = self._files[file].read_row_group(group, columns=self.columns, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                reason = (str(error).strip().splitlines() or ["unknown"])[0]
                raise DataError(
                    f"{self.index.files[file]}: row group {group} is damaged ({reason}); make the file again"
                ) from None
            self._tables[file, group] = table
            while len(self._tables) > self._keep:
                self._tables.popitem(last=False)
            return table

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._tables.clear()


@dataclass
class RawRows:
    """Encoded rows by number, as far as they are held. Others are read when they are asked for, and not kept."""

    index: SplitIndex
    modalities: dict[str, AnyModality]
    held: dict[int, dict[str, Any]] = field(default_factory=dict)
    _reader: Reader | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def cells(self, row: int) -> dict[str, Any]:
        """The encoded cell of every modality of a row."""
        held = self.held.get(row)
        return self._read(row) if held is None else held

    def hold(self, rows: Iterable[int]) -> None:
        """Read rows and keep them: copies, so that the rest of their row groups takes no memory."""
        for row in rows:
            self.held[row] = self._read(row)

    def release(self, rows: Iterable[int]) -> None:
        """Keep rows no longer: they are decoded."""
        for row in rows:
            self.held.pop(row, None)

    def _read(self, row: int) -> dict[str, Any]:
        file, group, position = self.index.place(row)
        if self._reader is None:
            self._reader = Reader(self.index, self.modalities)
        table = self._reader.table(file, group)
        result = {}
        for name, modality in self.modalities.items():
            columns = columns_of(modality)
            values = [_plain(table.column(c)[position]) for c in columns]
            result[name] = values[0] if columns == [modality.column] else values
        return result


def _plain(scalar: Any) -> Any:
    """A Python value of its own memory; lists of numbers as numpy arrays, which is much faster than as_py()."""
    import pyarrow as pa

    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar) and scalar.is_valid:
        kind = scalar.values.type
        if pa.types.is_floating(kind) or pa.types.is_integer(kind):
            if scalar.values.null_count:
                return np.array(scalar.values.to_numpy(zero_copy_only=False))
            return np.array(np.from_dlpack(scalar.values))  # to_numpy would import pandas, a second at every start
    return scalar.as_py()


class Window:
    """The encoded rows that a unit needs, read row group by row group, by `pool` or at once."""

    def __init__(
        self,
        index: SplitIndex,
        unit: Unit,
        modalities: dict[str, AnyModality],
        reader: Reader,
        pool: Executor | None = None,
    ) -> None:
        self.unit = unit
        self._raw = RawRows(index, modalities, {}, reader)
        self._pool = pool
        self._waiting: dict[tuple[int, int], list[int]] = {group: [] for group in unit.groups}
        for row in unit.rows().tolist():
            self._waiting[index.place(row)[:2]].append(row)
        self._num_groups = len(self._waiting)
        self._under_way: list[Future[None]] = []

    def advance(self, share: float) -> None:
        """Have at least this share of the row groups read, or on their way."""
        while self._waiting and self._num_groups - len(self._waiting) < share * self._num_groups:
            rows = self._waiting.pop(next(iter(self._waiting)))
            if self._pool is None:
                self._raw.hold(rows)
            else:
                self._under_way.append(self._pool.submit(self._raw.hold, rows))

    def rows(self) -> RawRows:
        """All of them."""
        self.advance(1.0)
        for future in self._under_way:
            future.result()
        return self._raw


def read_window(
    index: SplitIndex, unit: Unit, modalities: dict[str, AnyModality], reader: Reader | None = None
) -> RawRows:
    """The encoded rows that a unit needs."""
    own = Reader(index, modalities) if reader is None else reader
    try:
        return Window(index, unit, modalities, own).rows()
    finally:
        if reader is None:
            own.close()


@dataclass
class Decoded:
    """Decoded rows of one piece. rows [n]: what was taken, after replacements; arrays: compact, [n, ...].

    skipped: (row, modality, reason) of rows that could not be decoded.
    """

    batch: int
    rows: np.ndarray
    arrays: dict[str, np.ndarray]
    skipped: list[tuple[int, str, str]]


def _decode_row(raw: RawRows, decoder: Decoder, row: int, out: Mapping[str, np.ndarray]) -> RowError | None:
    """Decode a row into its place."""
    try:
        decoder(raw.cells(row), out)
        return None
    except RowError as error:
        return error


def decode_unit(unit: Unit, raw: RawRows, decoder: Decoder, pool: Executor | None = None) -> Iterator[Decoded]:
    """The unit's pieces in order. In training a bad row is replaced by the next good one in the window's order
    (cyclic); in evaluation it is left out. Encoded rows are released when their piece is decoded."""
    bad: dict[int, RowError] = {}
    for piece in unit.pieces:
        rows = unit.order[piece.start : piece.stop].tolist()
        arrays = decoder.room(len(rows))
        places = [{name: array[i] for name, array in arrays.items()} for i in range(len(rows))]
        errors = (map if pool is None else pool.map)(functools.partial(_decode_row, raw, decoder), rows, places)
        taken: list[int] = []
        good: list[int] = []
        skipped: list[tuple[int, str, str]] = []

        def note(row: int, error: RowError, skipped: list[tuple[int, str, str]] = skipped) -> None:
            if row not in bad:
                bad[row] = error
                skipped.append((row, error.modality, error.reason))

        for offset, (row, error) in enumerate(zip(rows, list(errors), strict=True)):
            if error is not None:
                note(row, error)
                if unit.epoch is None:
                    continue
                row = _replacement(unit, piece.start + offset, raw, decoder, bad, note, places[offset])
            taken.append(row)
            good.append(offset)
        if len(good) < len(rows):
            arrays = {name: array[good] for name, array in arrays.items()} if good else {}
        raw.release(rows)
        yield Decoded(piece.batch, np.array(taken, dtype=np.int64), arrays, skipped)


def _replacement(
    unit: Unit,
    position: int,
    raw: RawRows,
    decoder: Decoder,
    bad: dict[int, RowError],
    note: Callable[[int, RowError], None],
    out: Mapping[str, np.ndarray],
) -> int:
    """The next row in the window's order that can be decoded, decoded into `out`."""
    for step in range(1, len(unit.order)):
        row = int(unit.order[(position + step) % len(unit.order)])
        if row not in bad:
            error = _decode_row(raw, decoder, row, out)
            if error is None:
                return row
            note(row, error)
    raise all_bad(raw.index, unit, next(iter(bad.values())))


def all_bad(index: SplitIndex, unit: Unit, example: RowError) -> DataError:
    return DataError(
        f"corpus {index.corpus}, split {index.split}: not one of {len(unit.order)} rows can be decoded "
        f"(for example {example.modality}: {example.reason}); check it with: counterpoise corpora check {index.corpus}"
    )


def good_rows(unit: Unit, start: int, stop: int, is_good: np.ndarray) -> np.ndarray:
    """What decode_unit would take for order[start:stop], when it is known which rows are good."""
    rows = unit.order[start:stop].copy()
    for offset in np.flatnonzero(~is_good[rows]):
        following = np.roll(unit.order, -(start + int(offset) + 1))
        good = following[is_good[following]]
        rows[offset] = good[0]
    return rows


def _cells(index: SplitIndex, modality: AnyModality, groups: Iterable[int]) -> Iterator[np.ndarray]:
    """Valid numeric cells of some row groups, in row order."""
    reader = Reader(index, {"": modality}, keep=1)
    starts = index.group_starts
    try:
        for group in groups:
            raw = RawRows(index, {"": modality}, {}, reader)
            for row in range(int(starts[group]), int(starts[group + 1])):
                value = raw.cells(row)[""]
                if value is not None:
                    try:
                        yield numbers(value)
                    except DecodeError:
                        continue
    finally:
        reader.close()


def train_stats(index: SplitIndex, modality: AnyModality, name: str) -> Stats:
    """Shape, mean and std of a vector or series over the train split; features that never change get std 1."""
    assert modality.kind in ("vector", "series"), modality.kind
    settings: Any = modality.preprocess
    shape = settings.shape
    if shape is None:
        lengths: dict[int, int] = {}
        for group in range(len(index.group_sizes)):
            for cell in _cells(index, modality, [group]):
                lengths[len(cell)] = lengths.get(len(cell), 0) + 1
            if lengths:
                break
        if not lengths:
            raise DataError(f"corpus {index.corpus}: no row of train has numbers for modality {name}")
        shape = (max(lengths, key=lambda n: (lengths[n], -n)),)
    if not settings.standardize:
        return Stats(tuple(shape))
    width = shape[-1]
    size = int(np.prod(shape))
    # sums of x - first row, so that a large mean does not eat the digits of a small deviation
    origin: np.ndarray | None = None
    count, total, squares = 0, np.zeros(width), np.zeros(width)
    for cell in _cells(index, modality, range(len(index.group_sizes))):
        if len(cell) == size:
            values = cell.reshape(-1, width)
            if origin is None:
                origin = values[0].copy()
            values = values - origin
            count += len(values)
            total += values.sum(axis=0)
            squares += (values**2).sum(axis=0)
    if origin is None:
        raise DataError(f"corpus {index.corpus}: no row of train has {size} numbers for modality {name}")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std[std <= 1e-12 * np.abs(mean + origin)] = 1.0
    return Stats(tuple(shape), tuple((mean + origin).tolist()), tuple(std.tolist()))
