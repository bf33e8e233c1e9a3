"""Jobs on Ray Train: one group of workers executes all of them, so that starting it is paid once.

What happens inside is `launch/worker.py`; how a run went is in its folder, here only how Ray is asked to do it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from counterpoise import storage
from counterpoise.contracts import ConfigError, CounterpoiseError, Interrupted, ResourceError
from counterpoise.engine.job import Job
from counterpoise.engine.run import LOCK, RunFolder
from counterpoise.launch.cluster import Cluster, cluster

TIMEOUT_S = 1800.0  # of a collective: an epoch's slowest evaluation or checkpoint lies below it
_POLL_S = 0.1


def run_ray(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    use_gpu: bool = False,
    address: str | None = None,
    verbose: bool = False,
    stop: Callable[[], str | None] | None = None,
    max_failures: int = 2,
    cpus: float = 1.0,
    gpus: float = 1.0,
) -> list[dict[str, Any] | None]:
    """Execute jobs one after another with `workers` Ray Train workers; their summaries.

    cpus, gpus: of each worker; GPUs only with use_gpu.
    address: of a running Ray cluster (default: RAY_ADDRESS); without one, Ray is started on this machine and ended.
    verbose: let Ray write to the terminal.
    stop: asked often for a reason to stop; the running job then writes a checkpoint and Interrupted is raised.
    max_failures: how often workers that died are replaced; the jobs then continue from their last checkpoints.
    """
    from counterpoise.launch.worker import summaries

    if workers < 1:
        raise ConfigError(f"workers is {workers}; choose 1 or more")
    if not jobs:
        return []
    tasks = max(2, os.cpu_count() or 1)
    with cluster(workers, tasks, address=address, verbose=verbose) as ray:
        resources = {"CPU": cpus, "GPU": gpus} if use_gpu else {"CPU": cpus}
        task_cpus = _check_room(ray, workers, resources)
        config = {
            "jobs": list(jobs),
            "launch": uuid.uuid4().hex,
            "folder": os.getcwd(),
            "verbose": verbose,
            "task_cpus": task_cpus,
        }
        _supervise(jobs, lambda: _fit(config, ray, workers, resources, max_failures), stop)
    return summaries(jobs)


def _check_room(ray: Cluster, workers: int, resources: Mapping[str, float]) -> float:
    """CPUs that are left for tasks which read and decode; an error if the workers do not fit."""
    cpus, gpus = workers * resources["CPU"], workers * resources.get("GPU", 0)
    if ray.gpus < gpus:
        raise ResourceError(
            f"{workers} workers take {gpus:g} GPUs, but Ray sees {ray.gpus:g}; use fewer --workers, or --device cpu"
        )
    left = ray.cpus - cpus
    if left <= 0:
        raise ResourceError(
            f"{workers} workers take {cpus:g} CPUs and reading takes at least one more, but the Ray cluster has "
            f"{ray.cpus:g}; use fewer --workers"
        )
    return left


def _fit(config: dict[str, Any], ray: Cluster, workers: int, resources: Mapping[str, float], max_failures: int) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from counterpoise.launch.trainer import Trainer
    from counterpoise.launch.worker import work

    use_gpu = "GPU" in resources
    failures: Any = {"max_failures": max_failures, "controller_failure_limit": 3}
    trainer = Trainer(
        work,
        trimmed=ray.own,
        train_loop_config=config,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=int(TIMEOUT_S)),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=dict(resources)),
        run_config=RunConfig(
            name=f"counterpoise-{config['launch'][:12]}",
            storage_path=os.path.join(ray.folder, "train"),
            failure_config=FailureConfig(**failures),
        ),
    )
    trainer.fit()


def _supervise(jobs: Sequence[Job], fit: Callable[[], None], stop: Callable[[], str | None] | None) -> None:
    """Run `fit` in a thread, so that signals stay ours, and hand a wish to stop on to the run that is being done."""
    box: list[BaseException] = []

    def call() -> None:
        try:
            fit()
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
        raise _ours(box[0], folders) from None


def _ask(folders: Sequence[RunFolder], reason: str) -> None:
    """Ask the run that is being done to stop. Between runs and before the first there is nothing to save."""
    unfinished = [folder for folder in folders if folder.state() != "finished"]
    if unfinished and unfinished[0].is_locked():
        unfinished[0].request_stop(reason)
    elif unfinished:
        raise Interrupted(f"stopped ({reason}) before run {unfinished[0].name!r} began; start it with --resume")


def _ours(error: BaseException, folders: Sequence[RunFolder]) -> BaseException:
    """Ray's error as one of ours, and a word about it in the folder of the run that failed."""
    from ray.train import ControllerError, WorkerGroupError

    from counterpoise.launch.worker import WorkerLost

    if isinstance(error, WorkerGroupError):
        failures = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
        own = [f for f in failures if isinstance(f, CounterpoiseError)]
        own.sort(key=lambda f: isinstance(f, WorkerLost))
        if own and not isinstance(own[0], WorkerLost):
            found: CounterpoiseError = own[0]
        else:
            dead = ", ".join(str(r) for r, f in sorted(error.worker_failures.items()) if not isinstance(f, WorkerLost))
            who = f"worker {dead} died" if dead else "a worker died"
            found = CounterpoiseError(
                f"{who} (killed, or out of memory) and was not replaced any more; continue with --resume"
            )
    elif isinstance(error, ControllerError):
        line = (str(error.controller_failure).strip().splitlines() or ["unknown"])[0]
        found = ResourceError(f"Ray could not start the workers: {line}")
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


def _note(folder: RunFolder, text: str) -> None:
    """Write the failure down, if the worker that held the run could not."""
    if folder.read_status().get("state") == "running" and not folder.is_locked():
        storage.delete(folder.at(LOCK))  # the worker's, which is dead
        with folder:
            folder.append({"kind": "event", "event": "failed", "error": text})
            folder.write_status({**folder.read_status(), "state": "failed", "error": text}, force=True)
