"""One worker's view of a corpus on its own machine: the DataSource that needs no cluster.

Decoded rows come from memory (cached) or from the shards, window by window (streaming); both give the same bits, and
so does any number of workers, put together.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from counterpoise.contracts import DataError, InputSpec
from counterpoise.data import plan
from counterpoise.data.card import SPLITS, Card, load_card, split_card
from counterpoise.data.decode import Decoder, RowError, Stats, input_spec
from counterpoise.data.index import SplitIndex, fingerprint, open_splits
from counterpoise.data.options import DataOptions
from counterpoise.data.transforms import assemble, augmented, check_augment
from counterpoise.data.units import Decoded, Reader, Window, all_bad, decode_unit, good_rows, train_stats

if TYPE_CHECKING:
    from counterpoise.contracts import Batch
    from counterpoise.data.device import DeviceTransforms

T = TypeVar("T")
_Made = tuple["Batch | None", list[tuple[int, str, str]]]  # a batch, and rows that were skipped for it
_CACHE_BLOCK = 256


class LocalData:
    """The DataSource of one worker.

    A subclass may decode elsewhere: it overrides `_decoded_batches`, and `_decoded_rows` if it fills the cache too.
    state: what `preprocessing_state()` of an earlier run returned; without it the train split is read for it.
    even: refuse a batch size that does not divide among the workers. Shares may be uneven, but nobody would ask for it.
    """

    def __init__(
        self,
        card: Card | str,
        modalities: Iterable[str] | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        options: DataOptions | None = None,
        state: Mapping[str, Any] | None = None,
        even: bool = True,
    ) -> None:
        self.card = load_card(card) if isinstance(card, str) else card
        self.options = options or DataOptions()
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        chosen = self.card.select(modalities)
        check_augment(self.options.augment, chosen)
        self.indexes: dict[str, SplitIndex] = open_splits(self.card)
        plan.check_batches(len(self.indexes["train"]), batch_size, world, even)
        stats = {n: Stats.from_json(s) for n, s in (state or {}).items() if n in chosen}
        for name, modality in chosen.items():
            if modality.kind in ("vector", "series") and name not in stats:
                stats[name] = train_stats(self.indexes["train"], modality, name)
        self.modalities: tuple[str, ...] = tuple(chosen)
        self.classes: tuple[str, ...] = self.card.class_names
        self.selects_on: Literal["valid", "test"] = self.card.selects_on
        self.inputs: Mapping[str, InputSpec] = {n: input_spec(m, stats.get(n)) for n, m in chosen.items()}
        self._on_device: DeviceTransforms | None = None
        if self.options.transforms == "device":
            from counterpoise.data.device import DeviceTransforms

            self._on_device = DeviceTransforms(chosen, self.inputs, self.options.augment, seed)
        self.decoder = Decoder(chosen, stats, self._on_device.waves if self._on_device else frozenset())
        self.fingerprint: str = fingerprint(self.card, self.indexes, self.modalities)
        self.cached = self.options.cache == "on" or (
            self.options.cache == "auto" and self.decoded_bytes() <= self.options.cache_limit_gib * 2**30
        )
        self._cache: dict[str, tuple[dict[str, np.ndarray], np.ndarray]] = {}
        self._bad: dict[str, dict[int, dict[str, Any]]] = {}
        self._unreported: list[dict[str, Any]] = []
        self._ahead: tuple[tuple[int, int], Background[_Made]] | None = None  # (epoch, start) that was begun
        self.on_progress: Callable[[], None] = lambda: None  # called while the cache is filled

    # Facts

    def num_samples(self, split: str) -> int:
        split_card(self.card, split)
        return len(self.indexes[split]) if split in self.indexes else 0

    def sample_ids(self, split: str) -> Sequence[str]:
        return self._index(split).sample_ids

    def labels(self, split: str) -> np.ndarray:
        return self._index(split).labels

    def bounds(self) -> Sequence[int]:
        return plan.bounds(self.num_samples("train"), self.batch_size)

    def preprocessing_state(self) -> dict[str, Any]:
        """What was learned from the train split (shapes, mean, std), to be stored with a run: JSON-able."""
        return {name: stats.to_json() for name, stats in self.decoder.stats.items()}

    def decoded_bytes(self) -> int:
        """Memory that all splits take when decoded."""
        row = sum(int(np.prod(shape)) * kind.itemsize for shape, kind in self.decoder.compact().values())
        return row * sum(len(index) for index in self.indexes.values())

    def _index(self, split: str) -> SplitIndex:
        split_card(self.card, split)
        if split not in self.indexes:
            raise DataError(f"corpus {self.card.name} has no split {split}; it has: {', '.join(self.indexes)}")
        return self.indexes[split]

    def _cards(self) -> dict[str, Any]:
        return self.decoder.modalities

    # Batches

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This worker's part of every global batch of the epoch, from global batch `start` on."""
        begun = self._taken((epoch, start))
        return self._batches("train", self._units(epoch, start) if begun is None else (), epoch, begun)

    def _units(self, epoch: int, start: int) -> Iterable[plan.Unit]:
        index = self._index("train")
        return plan.rank_units(
            "train",
            index.group_pairs,
            index.group_sizes,
            seed=self.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            shuffle_window=self.options.shuffle_window,
            rank=self.rank,
            world=self.world,
            start=start,
            max_batches=self._batches_of_a_unit(),
            least_windows=self.least_windows("train"),
        )

    def expect(self, epoch: int) -> None:
        """Begin to read and decode an epoch, whose batches will be asked for later; nothing if they are in memory."""
        if not self.cached:
            self._taken(None)
            units = self._units(epoch, 0)
            made = self._assembled("train", self._decoded_batches("train", units), epoch)
            self._ahead = (epoch, 0), Background(made, self.options.prefetch)

    def _taken(self, wanted: tuple[int, int] | None) -> Background[_Made] | None:
        """What was begun for (epoch, start); anything else that was begun ends."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == wanted:
            return ahead[1]
        if ahead is not None:
            ahead[1].close()
        return None

    def least_windows(self, split: str) -> int:
        """So many that the encoded rows of one window fit into the memory that is meant for them."""
        return plan.windows_for(self._index(split).num_bytes, self.options.shuffle_mib * 2**20)

    def _batches_of_a_unit(self) -> int | None:
        """At most so many batches are one unit of work; None: all of a window."""
        return None

    def batches(self, split: str, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """This worker's blocks of a split or of `rows` of it, without augmentation. Blocks are `batch_size` rows on
        any number of workers, so that a row's logits do not depend on how many there are."""
        index = self._index(split)
        units = plan.evaluation_units(
            split,
            index.group_pairs,
            index.group_sizes,
            block=self.batch_size,
            rank=self.rank,
            world=self.world,
            rows=rows,
        )
        return self._batches(split, units, None)

    def _batches(
        self, split: str, units: Iterable[plan.Unit], epoch: int | None, begun: Background[_Made] | None = None
    ) -> Iterator[Batch]:
        made: Generator[_Made, None, None] | Background[_Made]
        if begun is not None:
            made = begun
        else:
            if self.cached:
                self.fill_cache(split)
            decoded = self._from_cache(split, units) if self.cached else self._decoded_batches(split, units)
            made = self._assembled(split, decoded, epoch)
            if not self.cached or (epoch is not None and self.options.augment):
                made = Background(made, self.options.prefetch)
        with closing(made):
            for batch, skipped in made:
                self._note(split, skipped)
                if batch is not None:
                    yield batch

    def _assembled(
        self, split: str, decoded: Generator[Decoded, None, None], epoch: int | None
    ) -> Generator[_Made, None, None]:
        index = self.indexes[split]
        with closing(decoded):
            for whole in joined(decoded):
                if len(whole.rows) == 0:
                    yield None, whole.skipped
                    continue
                arrays, ready = whole.arrays, dict[str, Any]()
                changing = epoch is not None and bool(self.options.augment)
                ids = [index.sample_ids[r] for r in whole.rows.tolist()] if changing else []
                if self._on_device is not None:
                    arrays, ready = self._on_device.packed(arrays, epoch if changing else None, ids)
                elif epoch is not None and changing:
                    arrays = augmented(arrays, self.options.augment, self.seed, epoch, ids)
                cards = {name: card for name, card in self._cards().items() if name in arrays}
                batch = assemble(arrays, index.labels[whole.rows], whole.rows, cards)
                yield {**batch, **ready}, whole.skipped

    def finish(self, batch: Batch) -> Batch:
        """What is done to a batch on the device that trains."""
        return self._on_device(batch) if self._on_device is not None else batch

    def _decoded_batches(self, split: str, units: Iterable[plan.Unit]) -> Generator[Decoded, None, None]:
        """Decoded pieces of the units, in order. While one window is decoded and its encoded rows go, the next is read
        and its rows come, so that memory holds hardly more than one."""
        index = self.indexes[split]
        cards = self._cards()
        reader = Reader(index, cards)
        with (
            closing(reader),
            ThreadPoolExecutor(self.options.decode_threads, "decode") as pool,
            ThreadPoolExecutor(1, "read") as ahead,
        ):
            windows = (Window(index, unit, cards, reader, ahead) for unit in units)
            window = next(windows, None)
            while window is not None:
                pieces = decode_unit(window.unit, window.rows(), self.decoder, pool)
                following = next(windows, None)
                for number in range(len(window.unit.pieces)):
                    if following is not None:
                        following.advance((number + 1) / len(window.unit.pieces))
                    yield next(pieces)
                window = following

    # The cache

    def _decoded_rows(self, split: str) -> Generator[Decoded, None, None]:
        """Every decodable row of a split once, in row order, with what was skipped."""
        index = self.indexes[split]
        units = plan.evaluation_units(split, index.group_pairs, index.group_sizes, block=_CACHE_BLOCK)
        return self._decoded_batches(split, units)

    def fill_cache(self, split: str) -> None:
        """Decode a split into memory, unless it is there."""
        if split in self._cache:
            return
        num_rows = len(self._index(split))
        arrays = {n: np.zeros((num_rows, *shape), kind) for n, (shape, kind) in self.decoder.compact().items()}
        good = np.zeros(num_rows, dtype=bool)
        with closing(self._decoded_rows(split)) as decoded:
            for part in decoded:
                self.on_progress()
                self._note(split, part.skipped)
                for name, values in part.arrays.items():
                    arrays[name][part.rows] = values
                good[part.rows] = True
        self._cache[split] = (arrays, good)

    def _from_cache(self, split: str, units: Iterable[plan.Unit]) -> Generator[Decoded, None, None]:
        arrays, good = self._cache[split]
        for unit in units:
            if unit.epoch is not None and not good[unit.order].any():
                first = self._bad[split][int(unit.order[0])]
                raise all_bad(self.indexes[split], unit, RowError(first["modality"], first["reason"]))
            for piece in unit.pieces:
                if unit.epoch is None:
                    rows = unit.order[piece.start : piece.stop]
                    rows = rows[good[rows]]
                else:
                    rows = good_rows(unit, piece.start, piece.stop, good)
                yield Decoded(piece.batch, rows, {n: a[rows] for n, a in arrays.items()}, [])

    # Rows that cannot be decoded

    def _note(self, split: str, skipped: Iterable[tuple[int, str, str]]) -> None:
        index = self.indexes[split]
        bad = self._bad.setdefault(split, {})
        for row, modality, reason in skipped:
            if row not in bad:
                bad[row] = {
                    "split": split,
                    "sample_id": index.sample_ids[row],
                    "file": index.file_of(row),
                    "modality": modality,
                    "reason": reason,
                }
                self._unreported.append(bad[row])
        budget = bad_budget(len(index), self.options.bad_samples)
        if len(bad) > budget:
            some = "; ".join(
                f"{b['sample_id']} in {b['file']}: {b['modality']}: {b['reason']}" for b in list(bad.values())[:3]
            )
            raise DataError(
                f"corpus {self.card.name}, split {split}: {len(bad)} rows cannot be decoded, {budget} of {len(index)} "
                f"are tolerated: {some}. Repair the corpus, or raise data.bad_samples ({self.options.bad_samples})"
            )

    def skipped(self) -> list[dict[str, Any]]:
        """Rows this worker could not decode since the last call, each row once in the worker's life."""
        result, self._unreported = self._unreported, []
        return result

    def close(self) -> None:
        """Give the memory of the cache back, and end what was begun."""
        self._taken(None)
        self._cache.clear()


def bad_budget(num_rows: int, fraction: float) -> int:
    """How many rows of a split may be undecodable: at least one, unless the fraction is 0."""
    return max(1, int(fraction * num_rows)) if fraction > 0 else 0


def joined(pieces: Iterable[Decoded]) -> Iterator[Decoded]:
    """Pieces of the same batch as one."""
    held: list[Decoded] = []
    for piece in pieces:
        if held and piece.batch != held[0].batch:
            yield _join(held)
            held = []
        held.append(piece)
    if held:
        yield _join(held)


def _join(pieces: list[Decoded]) -> Decoded:
    if len(pieces) == 1:
        return pieces[0]
    full = [p for p in pieces if len(p.rows)]
    arrays = {n: np.concatenate([p.arrays[n] for p in full]) for n in (full[0].arrays if full else ())}
    skipped = [s for p in pieces for s in p.skipped]
    return Decoded(pieces[0].batch, np.concatenate([p.rows for p in pieces]), arrays, skipped)


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Background(Iterator[T]):
    """The items of `source`, made by a thread up to `depth` ahead, from now on. Errors surface; closing it ends the
    thread."""

    def __init__(self, source: Generator[T, None, None], depth: int) -> None:
        self._box: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._end = object()
        self._thread = threading.Thread(target=self._work, args=(source,), name="batches", daemon=True)
        self._thread.start()

    def _work(self, source: Generator[T, None, None]) -> None:
        try:
            with closing(source):
                for item in source:
                    if not self._put(item):
                        return
            self._put(self._end)
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(_Failure(error))

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._box.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        item = self._box.get()
        if item is self._end:
            self.close()
            raise StopIteration
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        value: T = item
        return value

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


__all__ = ["SPLITS", "Background", "LocalData", "bad_budget", "joined"]
