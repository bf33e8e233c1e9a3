"""Jobs on Ray Train: one group of workers executes all of them, so that starting it is paid once.

What happens inside is `launch/worker.py`; how a run went is in its folder, here only how Ray is asked to do it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from counterpoise import storage
from counterpoise.contracts import ConfigError, CounterpoiseError, Interrupted, ResourceError
from counterpoise.engine.job import Job
from counterpoise.engine.run import LOCK, RunFolder
from counterpoise.launch.cluster import Cluster, cluster
from counterpoise.launch.worker import MARK

TIMEOUT_S = 1800.0  # of a collective: an epoch's slowest evaluation or checkpoint lies below it
WAIT_S = 300.0  # for room for workers
GROW_S = 30.0  # to start anew takes about so long
_POLL_S = 0.1
_DYING_S = 20.0  # what Ray takes to notice that a driver is dead, and to end its workers


def run_ray(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    min_workers: int | None = None,
    use_gpu: bool = False,
    address: str | None = None,
    verbose: bool = False,
    stop: Callable[[], str | None] | None = None,
    max_failures: int = 2,
    wait_s: float | None = None,
    grow_s: float = GROW_S,
    cpus: float = 1.0,
    gpus: float = 1.0,
    tell: Callable[[str], None] = lambda text: None,
    blows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> list[dict[str, Any] | None]:
    """Execute jobs one after another with `workers` Ray Train workers; their summaries.

    min_workers: go on with fewer workers, but not fewer than these, while there is no room for all of them.
    cpus, gpus: of each worker; GPUs only with use_gpu.
    address: of a running Ray cluster (default: RAY_ADDRESS); without one, Ray is started on this machine and ended.
    verbose: let Ray write to the terminal.
    stop: asked often for a reason to stop; the running job then writes a checkpoint and Interrupted is raised.
    max_failures: how often workers that died are replaced, -1: always; the jobs go on from their last checkpoints.
    wait_s: how long to wait for room for the workers, at the start and whenever nodes are lost. By default WAIT_S, and
    at the start not at all if the cluster is too small and has no autoscaler.
    grow_s: a group that has fewer workers than asked for is left alone for so long before it makes room for a larger.
    tell: gets lines about what is waited for.
    blows: failures to bring about, by run (`launch/rehearsal.py`).
    """
    from counterpoise.launch.worker import summaries

    least = workers if min_workers is None else min_workers
    if workers < 1:
        raise ConfigError(f"workers is {workers}; choose 1 or more")
    if not 1 <= least <= workers:
        raise ConfigError(f"--min-workers is {least}; choose 1 to {workers} (--workers)")
    if max_failures < -1:
        raise ConfigError(f"--max-failures is {max_failures}; choose 0 or more, or -1 for no limit")
    if not jobs:
        return []
    tasks = max(2, os.cpu_count() or 1)
    with cluster(workers, tasks, address=address, verbose=verbose) as ray:
        need = {"CPU": cpus, "GPU": gpus} if use_gpu else {"CPU": cpus}
        task_cpus = _check_room(ray, least, workers, need, wait_s, tell)
        for folder in (RunFolder.open(job.run) for job in jobs if job.resume):
            folder.await_lock(_is_over(folder), tell)
        config = {
            "jobs": list(jobs),
            "launch": uuid.uuid4().hex,
            "folder": os.getcwd(),
            "verbose": verbose,
            "task_cpus": task_cpus,
            "need": need,
            "least": least,
            "most": workers,
            "watch": not ray.own,
            "grow_s": grow_s,
            "blows": dict(blows or {}),
        }
        patience = WAIT_S if wait_s is None else wait_s
        _supervise(jobs, lambda lost: _fit(config, ray, max_failures, patience, lost), stop)
    return summaries(jobs)


def _check_room(
    ray: Cluster,
    least: int,
    most: int,
    need: Mapping[str, float],
    wait_s: float | None,
    tell: Callable[[str], None],
) -> float | None:
    """CPUs that are left for tasks which read and decode, None if that will be known later.

    An error if the workers do not fit, and nothing suggests that they ever will.
    """
    from counterpoise.launch.room import can_grow

    cpus, gpus = least * need["CPU"], least * need.get("GPU", 0)
    fewer = "use fewer --workers" if least == most else "use fewer --min-workers"
    problem = ""
    if ray.gpus < gpus:
        problem = f"{least} workers take {gpus:g} GPUs, but Ray sees {ray.gpus:g}; {fewer}, or --device cpu"
    elif ray.cpus - cpus <= 0:
        problem = (
            f"{least} workers take {cpus:g} CPUs and reading takes at least one more, but the Ray cluster has "
            f"{ray.cpus:g}; {fewer}"
        )
    if problem:
        if ray.own or not (wait_s or (wait_s is None and can_grow())):
            raise ResourceError(problem)
        tell(f"{problem}, or wait: nodes may come within {WAIT_S if wait_s is None else wait_s:.0f} s (--wait)")
    left = ray.cpus - most * need["CPU"]
    return left if left > 0 else None


def _is_over(folder: RunFolder) -> Callable[[Mapping[str, Any]], bool | None]:
    """Says of the owner of a run's lock whether the Ray job it worked for is dead; None if the cluster cannot know.

    A driver that was killed leaves workers on other machines, which Ray ends with its job.
    """
    import ray
    from ray._private.state import state

    mark = folder.read_json(MARK) if storage.exists(folder.at(MARK)) else {}

    def over(owner: Mapping[str, Any]) -> bool | None:
        same = (owner.get("host"), owner.get("pid")) == (mark.get("host"), mark.get("pid"))
        if not same or mark.get("session") != ray.get_runtime_context().get_session_name():
            return None
        end = time.monotonic() + _DYING_S
        while time.monotonic() < end:
            job = next((job for job in state.job_table() if job["JobID"] == mark.get("job")), None)
            if job is None or job["IsDead"]:
                return True
            time.sleep(0.5)
        return False

    return over


def _fit(config: dict[str, Any], ray: Cluster, max_failures: int, wait_s: float, lost: list[str]) -> None:
    """lost: gets what died meanwhile."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from counterpoise.launch.trainer import Connection, Trainer
    from counterpoise.launch.worker import work

    use_gpu = "GPU" in config["need"]
    failures: Any = {"max_failures": max_failures}
    trainer = Trainer(
        work,
        least=config["least"],
        most=config["most"],
        wait_s=wait_s,
        lost=lost,
        trimmed=ray.own,
        train_loop_config=config,
        torch_config=Connection(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=int(TIMEOUT_S)),
        scaling_config=ScalingConfig(
            num_workers=config["most"], use_gpu=use_gpu, resources_per_worker=dict(config["need"])
        ),
        run_config=RunConfig(
            name=f"counterpoise-{config['launch'][:12]}",
            storage_path=os.path.join(ray.folder, "train"),
            failure_config=FailureConfig(**failures),
        ),
    )
    trainer.fit()


def _supervise(jobs: Sequence[Job], fit: Callable[[list[str]], None], stop: Callable[[], str | None] | None) -> None:
    """Run `fit` in a thread, so that signals stay ours, and hand a wish to stop on to the run that is being done."""
    box: list[BaseException] = []
    lost: list[str] = []

    def call() -> None:
        try:
            fit(lost)
        except BaseException as error:  # handed to the waiting thread, whatever it is
            box.append(error)

    thread = threading.Thread(target=call, name="ray-train", daemon=True)
    thread.start()
    folders = [RunFolder.open(job.run) for job in jobs]
    reason: str | None = None
    asked = float("-inf")
    while thread.is_alive():
        try:
            thread.join(_POLL_S)
            reason = reason or (stop() if stop else None)
            if reason and time.monotonic() - asked > 1.0:  # again and again: a run that begins clears it
                asked = time.monotonic()
                _ask(folders, reason)
        except KeyboardInterrupt:
            if reason:
                raise
            reason = "SIGINT"
    if box:
        raise _ours(box[0], folders, lost) from None


def _ask(folders: Sequence[RunFolder], reason: str) -> None:
    """Ask the run that is being done to stop. Between runs and before the first there is nothing to save."""
    unfinished = [folder for folder in folders if folder.state() != "finished"]
    if unfinished and unfinished[0].is_locked():
        unfinished[0].request_stop(reason)
    elif unfinished:
        begun = unfinished[0].read_status().get("state") == "running"
        when = "while its workers were being replaced; go on" if begun else "before it began; start it"
        raise Interrupted(f"run {unfinished[0].name!r} was stopped ({reason}) {when} with --resume")


def _ours(error: BaseException, folders: Sequence[RunFolder], lost: Sequence[str] = ()) -> BaseException:
    """Ray's error as one of ours, and a word about it in the folder of the run that failed."""
    from ray.train import ControllerError, WorkerGroupError

    from counterpoise.launch.worker import WorkerLost

    if isinstance(error, WorkerGroupError):
        own = [f for _, f in sorted(error.worker_failures.items()) if isinstance(f, CounterpoiseError)]
        own = [f for f in own if not isinstance(f, WorkerLost)]
        found: CounterpoiseError = own[0] if own else _used_up(lost)
    elif isinstance(error, ControllerError):
        cause = error.controller_failure
        line = (str(cause).strip().splitlines() or ["unknown"])[0]
        found = (
            cause if isinstance(cause, CounterpoiseError) else ResourceError(f"Ray could not start the workers: {line}")
        )
    elif isinstance(error, CounterpoiseError):
        found = error
    elif isinstance(error, Exception):
        line = (str(error).strip().splitlines() or [""])[0]
        found = CounterpoiseError(f"Ray failed: {type(error).__name__}: {line}")
    else:
        return error
    if not isinstance(found, Interrupted):
        for folder in folders:
            with contextlib.suppress(CounterpoiseError, OSError):
                _note(folder, str(found))
    return found


def _used_up(lost: Sequence[str]) -> CounterpoiseError:
    """Workers have died more often than they may."""
    often = [f"{count} times: {what}" if count > 1 else what for what, count in Counter(lost).items()]
    replaced = len(lost) - 1
    times = (
        "none was replaced"
        if replaced < 1
        else "they were replaced once"
        if replaced == 1
        else (f"they were replaced {replaced} times")
    )
    return CounterpoiseError(
        f"workers died (killed, or out of memory), and {times}, as --max-failures has it: {'; '.join(often)}. "
        "The last checkpoint is kept: continue with --resume, and with more memory, fewer workers per node or a higher "
        "--max-failures if it happens again"
    )


def _note(folder: RunFolder, text: str) -> None:
    """Write the failure down, if the worker that held the run could not."""
    if folder.read_status().get("state") == "running" and not folder.is_locked():
        storage.delete(folder.at(LOCK))  # the worker's, which is dead
        with folder:
            folder.append({"kind": "event", "event": "failed", "error": text})
            folder.write_status({**folder.read_status(), "state": "failed", "error": text}, force=True)
