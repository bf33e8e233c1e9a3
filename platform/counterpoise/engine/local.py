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
from dataclasses import replace
from pathlib import Path
from typing import Any

from counterpoise.contracts import CounterpoiseError
from counterpoise.engine.job import Job, execute, lost_a_peer
from counterpoise.engine.watchdog import HUNG, Watch

_ENDING_S = 5.0  # for the others, when one worker has ended


class WorkersDied(CounterpoiseError):
    """Workers went away without a word: killed, out of memory, or ended because they hung. They may be started again.

    where: the steps at which the workers were; two deaths at the same place are no accident.
    """

    def __init__(self, text: str, where: tuple[int, ...]) -> None:
        super().__init__(text)
        self.where = where


def run_local(
    jobs: Sequence[Job],
    workers: int = 1,
    stop: Callable[[], str | None] | None = None,
    max_failures: int = 2,
    tell: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Execute jobs one after another with `workers` processes on this machine; their summaries.

    stop: asked every second or so for a reason to stop. With several workers it is asked in this process.
    max_failures: how often several workers are started again when one has died, -1: always; not after two deaths at
    the same step. tell: gets a line about that.
    """
    from counterpoise.engine.comm import SingleComm

    if workers == 1:
        results = [execute(job, SingleComm(), stop=stop) for job in jobs]
        return [result for result in results if result is not None]
    return _replaced(jobs, workers, stop, max_failures, tell)


def _replaced(
    jobs: Sequence[Job],
    workers: int,
    stop: Callable[[], str | None] | None,
    max_failures: int,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    from counterpoise.engine.run import RunFolder

    summaries: list[dict[str, Any]] = []
    deaths: list[WorkersDied] = []
    left, after = list(jobs), ""
    while True:
        try:
            _spawn(left, workers, stop, summaries, after)
            return summaries
        except WorkersDied as died:
            last = deaths[-1].where if deaths else None
            deaths.append(died)
            if died.where == last:
                why = "twice at the same step, so a third time would end as these did"
            elif 0 <= max_failures < len(deaths):
                why = f"and --max-failures is {max_failures}"
            else:
                after = str(died)
                left = left[len(summaries) - (len(jobs) - len(left)) :]
                begun = [RunFolder.open(job.run).read_status() for job in left]
                left = [replace(job, resume=job.resume or bool(b)) for job, b in zip(left, begun, strict=True)]
                tell(f"{died}; starting {workers} workers again, from the last checkpoint")
                continue
            raise CounterpoiseError(
                f"{died}; {why}. The last checkpoint is kept: continue with --resume, and, if it was memory, with "
                "fewer workers, a smaller batch_size or compute.parts"
            ) from None


def _spawn(
    jobs: Sequence[Job],
    workers: int,
    stop: Callable[[], str | None] | None,
    summaries: list[dict[str, Any]],
    after: str,
) -> None:
    """One group of workers, from start to end; adds the summaries of runs that finish. after: why there is another."""
    from counterpoise.engine.run import RunFolder

    context = multiprocessing.get_context("spawn")
    folder = tempfile.TemporaryDirectory(prefix="counterpoise-")
    meeting = os.path.join(folder.name, "meeting")
    results = context.SimpleQueue()
    steps = context.RawArray("q", [-1] * workers)
    processes = [
        context.Process(
            target=_worker, args=(list(jobs), rank, workers, meeting, results, steps, after), name=f"worker-{rank}"
        )
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    errors: list[BaseException] = []
    lost: list[str] = []

    def receive() -> None:
        while not results.empty():
            kind, value = pickle.loads(results.get())
            boxes: dict[str, list[Any]] = {"error": errors, "lost": lost, "summary": summaries}
            boxes[kind].append(value)

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
        end = time.monotonic() + _ENDING_S
        for process in processes:
            process.join(timeout=max(0.1, end - time.monotonic()))
        codes = [process.exitcode for process in processes]  # before we end the rest
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        folder.cleanup()
    receive()
    if errors:
        raise min(errors, key=lambda error: not isinstance(error, CounterpoiseError))
    if gone := [f"worker {rank} {_ended(code)}" for rank, code in enumerate(codes) if code not in (None, 0, _LOST)]:
        where = f" in step {max(steps)}" if max(steps) >= 0 else " before its first step"
        raise WorkersDied(", ".join(gone) + where, tuple(steps))
    if lost:
        raise WorkersDied(f"the connection between workers broke ({lost[0]})", tuple(steps))


_LOST = 3  # exit code of a worker whose peer is gone: not the one to blame


def _ended(code: int) -> str:
    if code == HUNG:
        return "hung and was ended (its stacks are in logs/ of the run)"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; by the system, if memory ran out)"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"


def _worker(
    jobs: list[Job], rank: int, world: int, meeting: str, results: Any, steps: Any = None, after: str = ""
) -> None:
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
            summary = execute(job, current_comm(), watch=Watch(rank, steps), after=after)
            after = ""
            if summary is not None:
                results.put(pickle.dumps(("summary", summary)))
        dist.destroy_process_group()
    except BaseException as error:
        if not isinstance(error, CounterpoiseError):
            log = Path(jobs[0].run.removeprefix("file://")) / "logs"
            log.mkdir(parents=True, exist_ok=True)
            (log / f"worker-{rank}.log").write_text(traceback.format_exc())
            text = f"{type(error).__name__}: {error}"
            if lost_a_peer(error):
                results.put(pickle.dumps(("lost", text)))
                sys.stdout.flush()
                os._exit(_LOST)
            error = CounterpoiseError(f"worker {rank}: {text} (see {log})")
        results.put(pickle.dumps(("error", error)))
        sys.stdout.flush()
        os._exit(1)
