"""Parts of a raw download made by Ray Data tasks, on whatever machine has a CPU to spare.

The parts, the function that makes one and what is written are those of `data/ingest.py`; a task writes its shard and
its record itself, and only the record travels back. The raw folder and the place of the shards must be reachable
from every machine: a shared folder, or s3://.
"""

from __future__ import annotations

import functools
import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

from counterpoise.contracts import CounterpoiseError, ResourceError
from counterpoise.data.ingest import Part, Readers, Record, RunParts, Work, make_part
from counterpoise.data.media import Limits
from counterpoise.launch.cluster import cluster
from counterpoise.launch.pipelines import THREAD, end_pipelines, pipelines

_POLL_S = 0.1
_STALL_S = 60.0  # nothing came for so long: look whether the cluster has room for a task at all


def ray_parts(address: str | None = None, verbose: bool = False) -> RunParts:
    """What `prepare_raw` calls to have parts made on Ray. address: of a cluster; without one, Ray is started here."""
    return functools.partial(_ray_parts, address=address, verbose=verbose)


def _ray_parts(
    parts: Sequence[Part], work: Work, workers: int, address: str | None, verbose: bool
) -> Generator[tuple[int, Record | None], None, None]:
    with cluster(workers, 1, address=address, verbose=verbose):
        import ray.data

        def dataset() -> Any:
            task: Any = _made
            rows = [{"part": pickle.dumps(part)} for part in parts]
            return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                task,
                fn_args=(pickle.dumps(work),),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=1,
                concurrency=min(workers, len(rows)),
            )

        with closing(arrivals(dataset)) as found:
            for item in found:
                yield (0, None) if item is None else (len(item["ledger"]), item)


def arrivals(dataset: Callable[[], Any]) -> Generator[Any, None, None]:
    """What the column `record` of a dataset holds, pickled, as it comes; None whenever nothing came for a moment.

    An error of ours among the records is raised.
    """
    import ray

    arrived: queue.Queue[Any] = queue.Queue()
    others = pipelines()
    threading.Thread(target=_collect, args=(dataset, arrived), name=THREAD, daemon=True).start()
    try:
        waited = time.monotonic()
        while True:
            try:
                item = arrived.get(timeout=_POLL_S)
            except queue.Empty:
                if time.monotonic() - waited > _STALL_S:
                    _explain(ray)
                    waited = time.monotonic()
                yield None
                continue
            waited = time.monotonic()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        end_pipelines(spared=others)


def _collect(dataset: Callable[[], Any], arrived: queue.Queue[Any]) -> None:
    """In a thread: run the pipeline, and hand on records, an error, or None at the end."""
    import ray.data

    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        blocks: Any = dataset().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for block in blocks:
            for cell in block.column("record"):
                found = pickle.loads(cell.as_py())
                arrived.put(found)
                if isinstance(found, BaseException):
                    return
        arrived.put(None)
    except CounterpoiseError as error:
        arrived.put(error)
    except BaseException as error:  # handed to the waiting generator, whatever it is
        line = (str(error).strip().splitlines() or [""])[0]
        arrived.put(CounterpoiseError(f"Ray failed: {type(error).__name__}: {line}; the same command goes on"))


def _made(block: Any, packed: bytes) -> Any:
    """In a task: the records of the parts in `block`; an error of ours is a row too."""
    import pyarrow as pa

    work: Work = pickle.loads(packed)
    made: list[Any] = []
    for cell in block.column("part"):
        try:
            made.append(make_part(pickle.loads(cell.as_py()), work, _readers(work.limits)))
        except CounterpoiseError as error:
            made.append(error)
    return pa.table({"record": pa.array([pickle.dumps(item) for item in made], pa.large_binary())})


@functools.lru_cache(maxsize=1)
def _readers(limits: Limits) -> Readers:
    """One reading process per process of Ray, kept from task to task."""
    return Readers(1, limits)


def _explain(ray: Any) -> None:
    """Raise if nothing can come because the cluster has no CPU at all."""
    if ray.cluster_resources().get("CPU", 0.0) < 1:
        raise ResourceError("the Ray cluster has no CPU for a task that reads a part; start a node with --num-cpus 1")
