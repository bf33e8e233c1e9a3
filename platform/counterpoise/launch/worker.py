"""What a Ray Train worker does: the jobs one after another, through the same `execute` as everywhere else.

Every failure leaves a worker as a CounterpoiseError with a text of one line. Three kinds are told apart: `WorkerLost`,
when another worker went away, which a new group of workers may repair; `Moved`, when this group ended itself with a
checkpoint so that another can go on elsewhere; and all others, which would only come again.
"""

from __future__ import annotations

import json
import os
import socket
import threading
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
from counterpoise.engine.job import Job, execute, experiment_card, lost_a_peer, open_data
from counterpoise.engine.run import LOCK, RunFolder
from counterpoise.launch.ingest import RayData
from counterpoise.methods import METHODS

MARK = "logs/launch.json"  # which launch wrote to the run last
AFTER = "COUNTERPOISE_AFTER"  # in the environment of workers: why the group before them ended
LOOK_S = 1.0  # how often drains are looked for
LAST_S = 20.0  # before a node goes, a group that has nowhere else to go writes its checkpoint and ends
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
    config = dict(config) | {"task_cpus": comm.broadcast(_task_cpus(config, comm.world) if comm.rank == 0 else None)}
    data: RayData | None = None
    opened = ""
    watch = _watch(config, comm)
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
                source: Any = data
                if blows := config["blows"].get(job.run):
                    from counterpoise.launch.rehearsal import Struck

                    source = Struck(data, job.run, comm, blows)
                after = os.environ.get(AFTER, "") if order["again"] else ""
                execute(replace(job, resume=order["resume"]), comm, data=source, move=watch, after=after)
            except Interrupted:
                if comm.rank == 0:
                    raise
                return  # rank 0 is still writing; its word ends the group
            except CounterpoiseError:
                if comm.rank != 0:
                    time.sleep(_PATIENCE_S)
                raise
            except Exception as error:
                raise _told(error, job, comm.rank) from None
    finally:
        if watch is not None:
            watch.end()
        if data is not None:
            data.close()


def _task_cpus(config: Mapping[str, Any], world: int) -> float:
    """CPUs that workers leave for tasks which read and decode. There may be fewer nodes now than at the start."""
    import ray

    left = float(ray.cluster_resources().get("CPU", 0.0)) - world * config["need"].get("CPU", 0.0)
    return max(0.01, min(left, config["task_cpus"] or left))


class Watch:
    """Rank 0 asks it for a reason to go on elsewhere: a node of the group will be taken away, or there is room for
    more workers than the group has. A thread looks, so that asking costs nothing.

    nodes: of every worker, as Ray's ids. need: resources of one. least, most: workers a group may have. grow_s: it is
    left alone for so long before it grows.
    """

    def __init__(self, nodes: Sequence[str], need: Mapping[str, float], least: int, most: int, grow_s: float) -> None:
        self._nodes, self._need, self._least, self._most, self._grow_s = list(nodes), dict(need), least, most, grow_s
        self._began = time.monotonic()
        self._reason: str | None = None
        self._room_before = 0
        self._over = threading.Event()
        threading.Thread(target=self._look_on, name="watch", daemon=True).start()

    def __call__(self) -> str | None:
        return self._reason

    def end(self) -> None:
        self._over.set()

    def _look_on(self) -> None:
        while not self._over.wait(LOOK_S) and self._reason is None:
            try:
                self._reason = self._look()
            except Exception:  # the cluster is busy, or going; the workers will notice by themselves
                continue

    def _look(self) -> str | None:
        from counterpoise.launch import room

        leaving = room.draining()
        if mine := [node for node in self._nodes if node in leaving]:
            deadlines = [leaving[node] for node in mine if leaving[node]]
            late = not deadlines or min(deadlines) / 1000 - time.time() < LAST_S
            staying = len(self._nodes) - len(mine)
            if late or staying + self._room(len(mine), staying) >= self._least:
                names = room.node_names()
                gone = ", ".join(names.get(node, node) for node in dict.fromkeys(mine))
                return f"node {gone} will be taken away"
        elif len(self._nodes) < self._most and time.monotonic() - self._began > self._grow_s:
            more = self._room(self._most - len(self._nodes), len(self._nodes))
            if more and more == self._room_before:  # it was so a moment ago: no passing state
                return f"there is room for {len(self._nodes) + more} workers"
            self._room_before = more
        return None

    def _room(self, most: int, there: int) -> int:
        from counterpoise.launch import room

        return room.fitting(room.free(), self._need, most, room.totals(), there)


def _watch(config: Mapping[str, Any], comm: Comm) -> Watch | None:
    """On rank 0, in a cluster that is more than this machine."""
    import ray

    if not config["watch"]:
        return None
    nodes = comm.gather(ray.get_runtime_context().get_node_id())
    if nodes is None:
        return None
    return Watch(nodes, config["need"], config["least"], config["most"], config["grow_s"])


def _look(job: Job, launch: str) -> dict[str, bool]:
    """Rank 0's first look at a run: is it finished, or begun, perhaps by workers of this launch that died?"""
    import ray

    folder = RunFolder.open(job.run)
    if folder.state() == "finished":
        return {"skip": True, "resume": False, "again": False}
    again = storage.exists(folder.at(MARK)) and folder.read_json(MARK).get("launch") == launch
    if again:
        # Ray has ended the workers of before, so the lock is nobody's, even if their machine cannot be asked.
        storage.delete(folder.at(LOCK))
    context = ray.get_runtime_context()
    mark = {"launch": launch, "engine": "ray", "session": context.get_session_name(), "job": context.get_job_id()}
    folder.write_json(MARK, {**mark, "host": socket.gethostname(), "pid": os.getpid()})
    return {"skip": False, "resume": job.resume or again, "again": again}


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
        even=comm.world == config["most"],
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
    if lost_a_peer(error):
        return WorkerLost(f"rank {rank} lost the connection to another worker ({text}){where}")
    return CounterpoiseError(f"rank {rank}: {text}{where}")


def summaries(jobs: Sequence[Job]) -> list[dict[str, Any] | None]:
    """What finished runs have to say, None for others."""
    folders = [RunFolder.open(job.run) for job in jobs]
    return [dict(f.read_json("summary.json")) if f.state() == "finished" else None for f in folders]
