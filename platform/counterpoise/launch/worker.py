"""What a Ray Train worker does: the jobs one after another, through the same `execute` as everywhere else.

Every failure leaves a worker as a CounterpoiseError with a text of one line. Two kinds are told apart: `WorkerLost`,
when another worker went away, which a new group of workers may repair, and all others, which would only come again.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from counterpoise import storage
from counterpoise.config import Experiment
from counterpoise.contracts import Comm, CounterpoiseError, Interrupted
from counterpoise.engine.comm import current_comm
from counterpoise.engine.job import Job, execute, experiment_card, open_data
from counterpoise.engine.run import LOCK, RunFolder
from counterpoise.launch.ingest import RayData
from counterpoise.methods import METHODS

MARK = "logs/launch.json"  # which launch wrote to the run last
# How collectives of gloo and NCCL say that a peer is gone.
_LOST = ("connection closed by peer", "connection reset", "broken pipe", "socket", "gloo", "nccl", "timed out waiting")
_PATIENCE_S = 2.0  # other ranks wait this long before they fail, so that rank 0 can write down what happened


class WorkerLost(CounterpoiseError):
    """A collective failed: most likely another worker died."""


def work(config: Mapping[str, Any]) -> None:
    """Execute all jobs; called on every worker, and again on every worker of a new group after one died."""
    if not config["verbose"]:
        warnings.simplefilter("ignore")
    if os.path.isdir(config["folder"]):
        os.chdir(config["folder"])  # relative paths of corpora and runs
    comm = current_comm()
    data: RayData | None = None
    opened = ""
    try:
        for job in config["jobs"]:
            try:
                order = comm.broadcast(_look(job, config["launch"]) if comm.rank == 0 else None)
                if order["skip"]:
                    continue
                experiment = Experiment(**job.experiment)
                if data is None or opened != _corpus(job, experiment):
                    if data is not None:
                        data.close()
                    data, opened = _open(job, experiment, comm, config), _corpus(job, experiment)
                data.begin()
                execute(replace(job, resume=order["resume"]), comm, data=data)
            except Interrupted:
                if comm.rank == 0:
                    raise
                return  # rank 0 is still writing; its word ends the run
            except CounterpoiseError:
                if comm.rank != 0:
                    time.sleep(_PATIENCE_S)
                raise
            except Exception as error:
                raise _told(error, job, comm.rank) from None
    finally:
        if data is not None:
            data.close()


def _look(job: Job, launch: str) -> dict[str, bool]:
    """Rank 0's first look at a run: is it finished, or begun, perhaps by workers of this launch that died?"""
    folder = RunFolder.open(job.run)
    if folder.state() == "finished":
        return {"skip": True, "resume": False}
    again = storage.exists(folder.at(MARK)) and folder.read_json(MARK).get("launch") == launch
    if again:
        # Ray has ended the workers of before, so the lock is nobody's, even if their machine cannot be asked.
        storage.delete(folder.at(LOCK))
    else:
        folder.write_json(MARK, {"launch": launch, "engine": "ray"})
    return {"skip": False, "resume": job.resume or again}


def _corpus(job: Job, experiment: Experiment) -> str:
    """What jobs must have in common to share an open corpus."""
    card = experiment_card(experiment)
    used = METHODS[experiment.method_name].uses(
        experiment.method, list(card.select(list(experiment.modalities) or None))
    )
    options = experiment.data.model_dump(mode="json")
    corpus = [experiment.corpus, experiment.protocol, experiment.preprocess, list(used)]
    return json.dumps([*corpus, experiment.batch_size, experiment.seed, options, job.data])


def _open(job: Job, experiment: Experiment, comm: Comm, config: Mapping[str, Any]) -> RayData:
    data = open_data(
        experiment,
        comm.rank,
        comm.world,
        job.data,
        kind=RayData,
        cpus=config["task_cpus"],
        share=_from_rank_zero if comm.world > 1 else None,
    )
    assert isinstance(data, RayData)
    return data


def _from_rank_zero(value: Any) -> Any:
    """Rank 0's value on every rank, by Ray: it may hold references to objects in Ray's store."""
    from ray.train.collective import broadcast_from_rank_zero

    return broadcast_from_rank_zero(value)


def _told(error: Exception, job: Job, rank: int) -> CounterpoiseError:
    """An unexpected error in one line; its traceback goes to the run's folder."""
    line = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    folder = RunFolder(job.run)
    name = f"logs/rank-{rank}.log"
    try:
        storage.write_text(folder.at(name), traceback.format_exc())
    except (CounterpoiseError, OSError):
        name = ""
    where = f"; traceback in {storage.show(folder.at(name))}" if name else ""
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST):
        return WorkerLost(f"rank {rank} lost the connection to another worker ({text}){where}")
    return CounterpoiseError(f"rank {rank}: {text}{where}")


def summaries(jobs: Sequence[Job]) -> list[dict[str, Any] | None]:
    """What finished runs have to say, None for others."""
    folders = [RunFolder.open(job.run) for job in jobs]
    return [dict(f.read_json("summary.json")) if f.state() == "finished" else None for f in folders]
