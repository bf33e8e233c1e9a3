"""Reading and decoding in Ray Data tasks, on whatever machine has a CPU to spare: a DataSource like `LocalData`.

The plan of an epoch is the same as everywhere (`data/plan.py`), and so are the functions that read and decode
(`data/units.py`), so the batches are the same too, bit for bit. Ray Data moves them: units of the plan are its rows,
a generator task turns each into decoded pieces, and they come back in the planned order.

    streaming   every worker runs a pipeline over its own units, epoch by epoch
    cached      rank 0 runs one pipeline over a split (or decodes it itself, if that takes less than the tasks take to
                start); the arrays lie in Ray's object store, once per machine, and all workers read them there
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from counterpoise import storage
from counterpoise.contracts import CounterpoiseError, ResourceError
from counterpoise.data import plan
from counterpoise.data.loader import LocalData
from counterpoise.data.units import Decoded, decode_unit, read_window
from counterpoise.launch.pipelines import THREAD

if TYPE_CHECKING:
    from counterpoise.data.decode import Decoder
    from counterpoise.data.index import SplitIndex

STALL_S = 60.0  # nothing arrived for so long: look whether the cluster has room for a task at all
_BLOCK = 256  # rows of a piece when a whole split is decoded
_BLOCK_BYTES = 8 * 2**20  # a task hands on its pieces whenever it has so much of them (by default 128 MiB)
_one_at_a_time = threading.Lock()
_NO_ORDER = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class _Source:
    """What every task of a pipeline needs: put into Ray's object store once."""

    index: SplitIndex
    decoder: Decoder
    orders: dict[int, np.ndarray]  # rows of every window


class RayData(LocalData):
    """The DataSource of a Ray Train worker.

    cpus: CPUs of the cluster that are not reserved by workers; this worker's tasks use their share of them.
    share: brings rank 0's value to all ranks (it may hold references to objects in Ray's store), called by all of
    them; without it a worker decodes all it needs itself.
    """

    def __init__(self, *args: Any, cpus: float = 2.0, share: Callable[[Any], Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cpus = cpus
        self._share = share
        self._references: list[Any] = []  # keep shared arrays alive

    def begin(self) -> None:
        """Forget what was reported: another run begins on the same data."""
        self._unreported = [row for rows in self._bad.values() for row in rows.values()]

    @property
    def tasks(self) -> int:
        """Tasks of this worker at a time."""
        return self.options.decode_threads

    def _task_cpus(self, workers: int) -> float:
        """CPUs a task asks for, so that all tasks of `workers` pipelines fit into the cluster at once.

        Were it more, one worker's tasks could take all of it and wait for that worker, which waits in a collective
        for another, which waits for its tasks to start.
        """
        return max(0.01, min(1.0, math.floor(100 * self._cpus / (workers * self.tasks)) / 100))

    # streaming

    def _batches_of_a_unit(self) -> int | None:
        """None where an epoch has windows enough to keep all tasks busy; else windows are cut, and read repeatedly."""
        if self.cached:
            return None
        num_rows = len(self._index("train"))
        num_windows = max(1, num_rows // self.options.shuffle_window, self.least_windows("train"))
        wanted = 3 * self.tasks
        if num_windows >= wanted:
            return None
        return max(1, math.ceil((len(self.bounds()) - 1) / wanted))

    def _decoded_batches(self, split: str, units: Iterable[plan.Unit]) -> Generator[Decoded, None, None]:
        return self._pipeline(split, list(units), self.world)

    def expect(self, epoch: int) -> None:
        """Begin an epoch early where the cluster has a CPU for every task of two pipelines of every worker.

        With fewer, its tasks would slow those of evaluation down, or take the CPUs that another worker waits for.
        """
        if self._cpus >= 2 * self.world * self.tasks:
            super().expect(epoch)

    # cached

    def fill_cache(self, split: str) -> None:
        """Decode a split once for all workers. Called by all of them, for the same splits in the same order."""
        if split in self._cache or self._share is None:
            super().fill_cache(split)
            return
        import ray

        content: Any = None
        if self.rank == 0:
            super().fill_cache(split)
            arrays, good = self._cache.pop(split)
            skipped = [(row, bad["modality"], bad["reason"]) for row, bad in self._bad.get(split, {}).items()]
            content = ([ray.put((arrays, good))], skipped)
            del arrays
        references, skipped = self._share(content)
        if self.rank != 0:
            self._note(split, skipped)
            self._unreported.clear()  # rank 0 reports them
        self._references += references
        self._cache[split] = ray.get(references[0])

    def _decoded_rows(self, split: str) -> Generator[Decoded, None, None]:
        index = self.indexes[split]
        units = plan.evaluation_units(split, index.group_pairs, index.group_sizes, block=_BLOCK)
        return self._pipeline(split, _merged(units, 4 * self.tasks), 1)

    def close(self) -> None:
        super().close()
        self._references.clear()

    # both

    def _pipeline(self, split: str, units: Sequence[plan.Unit], workers: int) -> Generator[Decoded, None, None]:
        """Decoded pieces of the units in order, made by Ray Data tasks."""
        if not units:
            return
        import ray
        import ray.data

        source = _Source(self.indexes[split], self.decoder, {unit.window: unit.order for unit in units})
        reference = ray.put(source)
        task: Any = _decoded
        rows = [{"unit": pickle.dumps(replace(unit, order=_NO_ORDER))} for unit in units]
        expected = [piece.batch for unit in units for piece in unit.pieces]
        with _one_at_a_time, _settings(ray):
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                task,
                fn_args=(reference,),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=self._task_cpus(workers),
                concurrency=min(self.tasks, len(units)),
            )
            # More prefetching would hold the first block back until as many more are there.
            blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        number = 0
        with closing(_watched(blocks, self._explain)) as arriving:
            for block in arriving:
                for cell in block.column("piece"):
                    piece = pickle.loads(cell.as_buffer())
                    if isinstance(piece, CounterpoiseError):
                        raise piece
                    assert piece.batch == expected[number], f"batch {piece.batch} came, {expected[number]} was planned"
                    number += 1
                    yield piece
        assert number == len(expected), f"{number} of {len(expected)} planned pieces came"

    def _explain(self) -> None:
        """Raise if nothing can come because the cluster has no CPU for a task."""
        import ray

        free = ray.available_resources().get("CPU", 0.0)
        wanted = self._task_cpus(self.world)
        if free < wanted:
            raise ResourceError(
                f"reading has waited {STALL_S:.0f} s for {wanted:g} CPUs, and the Ray cluster has {free:g} of "
                f"{ray.cluster_resources().get('CPU', 0.0):g} free; use fewer --workers or a larger cluster"
            )


def _decoded(block: Any, reference: Any) -> Iterator[Any]:
    """In a task: one row per decoded piece of the units in `block`; an error of ours is a row too."""
    import pyarrow as pa
    import ray

    source: _Source = ray.get(reference) if isinstance(reference, ray.ObjectRef) else reference
    for cell in block.column("unit"):
        unit: plan.Unit = pickle.loads(cell.as_py())
        unit = replace(unit, order=source.orders[unit.window])
        try:
            with storage.patience():
                raw = read_window(source.index, unit, source.decoder.modalities)
            for piece in decode_unit(unit, raw, source.decoder):
                yield pa.table({"piece": pa.array([pickle.dumps(piece, protocol=5)], pa.large_binary())})
        except CounterpoiseError as error:
            yield pa.table({"piece": pa.array([pickle.dumps(error)], pa.large_binary())})
            return


def _merged(units: Iterable[plan.Unit], wanted: int) -> list[plan.Unit]:
    """Evaluation units joined to about `wanted` larger ones, each with the pieces of several."""
    single = list(units)
    size = max(1, math.ceil(len(single) / wanted))
    result = []
    for i in range(0, len(single), size):
        part = single[i : i + size]
        pieces, offset = [], 0
        for unit in part:
            pieces += [plan.Piece(p.batch, p.start + offset, p.stop + offset) for p in unit.pieces]
            offset += len(unit.order)
        groups = tuple(dict.fromkeys(g for unit in part for g in unit.groups))
        order = np.concatenate([unit.order for unit in part])
        result.append(replace(part[0], order=order, groups=groups, pieces=tuple(pieces)))
    return result


@contextlib.contextmanager
def _settings(ray: Any) -> Iterator[None]:
    """Ray Data keeps the order and the terminal clean; settings are copied into a dataset when it is made.

    They are the process's: two threads that read must not make their datasets at once.
    """
    context = ray.data.DataContext.get_current()
    before = (
        context.enable_progress_bars,
        context.execution_options.preserve_order,
        context.target_max_block_size,
    )
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        (
            context.enable_progress_bars,
            context.execution_options.preserve_order,
            context.target_max_block_size,
        ) = before


def _watched(blocks: Iterator[Any], explain: Callable[[], None]) -> Generator[Any, None, None]:
    """The same blocks; `explain` is called whenever none came for STALL_S, and may raise."""
    box: list[tuple[str, Any]] = []
    ready, wanted, over = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        while True:
            wanted.wait()
            wanted.clear()
            if over.is_set():
                return
            try:
                box.append(("block", next(blocks)))
            except StopIteration:
                box.append(("end", None))
            except BaseException as error:  # handed to the consumer, whatever it is
                box.append(("error", error))
            ready.set()

    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    thread.start()
    try:
        while True:
            wanted.set()
            while not ready.wait(STALL_S):
                explain()
            ready.clear()
            kind, value = box.pop()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        over.set()
        wanted.set()
