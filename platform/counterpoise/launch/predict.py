"""Predictions for Parquet files by actors of Ray Data, each with the model in memory.

Parts, the function that makes one and what is written are those of `engine/bulk.py`; an actor reads its rows and
writes its part itself, and only the record travels back. Model, data and `out` must be reachable from every machine.
"""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch

from counterpoise.contracts import CounterpoiseError, ResourceError
from counterpoise.engine.bulk import Record, RunParts, Work, make_part
from counterpoise.engine.inference import Model, load_model
from counterpoise.engine.memory import reuse_memory
from counterpoise.launch.cluster import cluster
from counterpoise.launch.prepare import arrivals


def ray_predict(workers: int, address: str | None = None, verbose: bool = False) -> RunParts:
    """What `predict_files` calls to have parts made by `workers` actors."""
    return functools.partial(_ray_parts, workers=workers, address=address, verbose=verbose)


def _ray_parts(
    parts: Sequence[int], work: Work, workers: int, address: str | None, verbose: bool
) -> Generator[Record, None, None]:
    if not parts:
        return
    with cluster(workers, 1, address=address, verbose=verbose) as ray_cluster:
        import ray
        import ray.data

        gpus = 1 if work.device.startswith("cuda") else 0
        if gpus and ray_cluster.gpus < 1:
            raise ResourceError("--device cuda: the Ray cluster has no GPU; use --device cpu")
        reference = ray.put(work)

        def dataset() -> Any:
            actor: Any = Predictor
            rows = [{"part": number} for number in parts]
            return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                actor,
                fn_args=(reference,),  # not of the constructor: an actor that is started again could not get it
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=work.threads or 1,
                num_gpus=gpus or None,
                concurrency=min(workers, len(rows)),
            )

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with closing(arrivals(dataset)) as found:
            for record in found:
                yield record or {}


class Predictor:
    """One actor: loads the model with the first part it is given, and keeps it."""

    def __init__(self) -> None:
        self.work: Work | None = None
        self.model: Model | None = None

    def __call__(self, block: Any, reference: Any) -> Any:
        import pyarrow as pa

        made: list[Any] = []
        for cell in block.column("part"):
            try:
                made.append(self._make(cell.as_py(), reference))
            except CounterpoiseError as error:
                made.append(error)
        return pa.table({"record": pa.array([pickle.dumps(item) for item in made], pa.large_binary())})

    def _make(self, number: int, reference: Any) -> Record | None:
        if self.work is None or self.model is None:
            import ray

            work: Work = ray.get(reference) if isinstance(reference, ray.ObjectRef) else reference
            torch.set_num_threads(work.threads or 1)
            reuse_memory(work.device)
            self.model = load_model(work.model, work.device)
            self.work = work
        return make_part(number, self.work, self.model)
