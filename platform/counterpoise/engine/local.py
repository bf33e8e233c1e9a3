"""Running jobs on this machine without Ray: in this process, or in several that this one starts."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from counterpoise.contracts import CounterpoiseError
from counterpoise.engine.job import Job, execute


def run_local(
    jobs: Sequence[Job], workers: int = 1, stop: Callable[[], str | None] | None = None
) -> list[dict[str, Any]]:
    """Execute jobs one after another with `workers` processes on this machine; their summaries.

    stop: asked every second or so for a reason to stop. With several workers it is asked in this process.
    """
    from counterpoise.engine.comm import SingleComm

    if workers == 1:
        results = [execute(job, SingleComm(), stop=stop) for job in jobs]
        return [result for result in results if result is not None]
    return _spawn(jobs, workers, stop)


def _spawn(jobs: Sequence[Job], workers: int, stop: Callable[[], str | None] | None) -> list[dict[str, Any]]:
    from counterpoise.engine.run import RunFolder

    context = multiprocessing.get_context("spawn")
    folder = tempfile.TemporaryDirectory(prefix="counterpoise-")
    meeting = os.path.join(folder.name, "meeting")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_worker, args=(list(jobs), rank, workers, meeting, results), name=f"worker-{rank}")
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    errors: list[BaseException] = []
    summaries: list[dict[str, Any]] = []

    def receive() -> None:
        while not results.empty():
            kind, value = pickle.loads(results.get())
            (errors if kind == "error" else summaries).append(value)

    asked = float("-inf")
    try:
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(timeout=0.1)
            receive()  # or a worker with much to say would wait for us, and we for it
            reason = stop() if stop else None
            if (
                reason and time.monotonic() - asked > 1
            ):  # again and again: a run that is just starting clears old wishes
                asked = time.monotonic()
                for job in jobs:
                    RunFolder.open(job.run).request_stop(reason)
            if any(process.exitcode not in (None, 0) for process in processes):
                break
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        folder.cleanup()
    receive()
    if errors:
        raise min(errors, key=lambda error: not isinstance(error, CounterpoiseError))
    for rank, process in enumerate(processes):
        if process.exitcode:
            raise CounterpoiseError(f"worker {rank} died with exit code {process.exitcode}; continue with --resume")
    return summaries


def _worker(jobs: list[Job], rank: int, world: int, meeting: str, results: Any) -> None:
    """One process of a local group. Signals to the process group are the parent's to handle: it asks for a stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import torch
    import torch.distributed as dist

    from counterpoise.engine.comm import current_comm, join_group

    device = torch.device(jobs[0].device)
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        join_group(device, rank, world, meeting)
        for job in jobs:
            summary = execute(job, current_comm())
            if summary is not None:
                results.put(pickle.dumps(("summary", summary)))
        dist.destroy_process_group()
    except BaseException as error:
        if not isinstance(error, CounterpoiseError):
            log = Path(jobs[0].run.removeprefix("file://")) / "logs"
            log.mkdir(parents=True, exist_ok=True)
            (log / f"worker-{rank}.log").write_text(traceback.format_exc())
            error = CounterpoiseError(f"worker {rank}: {type(error).__name__}: {error} (see {log})")
        results.put(pickle.dumps(("error", error)))
        sys.stdout.flush()
        os._exit(1)
