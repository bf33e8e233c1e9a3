"""Workers that hang are ended, with the stacks of their threads written down; workers that lag are named.

The loop leaves a note of what it is doing (`Watch`), which costs it a timestamp per step. A thread looks at the note
now and then and ends the process when it has become too old: whoever started the process then starts it again, and the
run goes on from its checkpoint. A thread cannot look while another one holds Python's lock, as a regular expression
may for long; then the other workers, who wait in a collective, are ended, and with them the group.

The same notes tell how much time a step takes on a worker without what it waits for others (`Pace`). Collectives of
NCCL come back before they are done, so there the host's share alone is compared: reading, copying, launching.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from counterpoise import storage
from counterpoise.contracts import Batch, Comm, CounterpoiseError, DataSource

HUNG = 75  # exit code of a worker that was ended: try again
STEP_S = 120.0  # a step may take so long, and STEP_FACTOR times the median, if that is more
STEP_FACTOR = 20.0
_LOG_S = 10.0  # for writing down what hangs; the place may be what hangs
_DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy")


@dataclass(frozen=True)
class Deadlines:
    """Seconds without progress after which a worker is ended, by what it does.

    first: a step before any was timed: compilers and caches of kernels. read: a batch to come; object storage that is
    out of reach is tried again for minutes, and errors of its own come earlier. rest: collectives, in which the others
    wait for one that reads, and what happens between epochs: checkpoints, decisions.
    """

    step: float = STEP_S
    first: float = 7.5 * STEP_S
    read: float = 7.5 * STEP_S
    rest: float = 15 * STEP_S

    @classmethod
    def of(cls, step_s: float) -> Deadlines:
        """The usual ones, all longer or shorter by the same factor."""
        return cls(step_s, 7.5 * step_s, 7.5 * step_s, 15 * step_s)

    def seconds(self, kind: str, median_s: float | None) -> float:
        if kind == "step":
            return self.first if median_s is None else max(self.step, STEP_FACTOR * median_s)
        return self.read if kind == "read" else self.rest


class Watch:
    """What a worker is doing, since when, and what its steps cost it."""

    def __init__(self, rank: int = 0, step_of: Any = None) -> None:
        """step_of: numbers shared with another process, one per rank; the worker's step is kept there."""
        self.rank = rank
        self.now: tuple[str, str, float] = ("rest", "starting", time.monotonic())  # kind, words, since
        self.steps = 0  # that have ended here
        self.where = "before the first step"
        self.waited_s = 0.0  # for other workers, and for checkpoints
        self.own: list[float] = []  # seconds of steps without what was waited, since they were taken
        self._step_of = step_of
        self._began = (0.0, 0.0)

    def enter(self, kind: str, words: str) -> None:
        self.now = (kind, words, time.monotonic())

    @contextlib.contextmanager
    def waiting(self, words: str) -> Iterator[None]:
        """Something that is no work of this worker's steps; nothing is measured against them."""
        kind, before, _ = self.now
        began = time.monotonic()
        self.now = ("rest", words, began)
        try:
            yield
        finally:
            ended = time.monotonic()
            self.waited_s += ended - began
            self.now = (kind, before, ended)

    def place(self) -> str:
        """Where the worker is, in words."""
        return f"{self.where}, {self.now[1]}"

    def begin_reading(self) -> None:
        self.enter("read", "waiting for a batch")
        self._began = (time.monotonic(), self.waited_s)

    def begin_step(self, epoch: int, batch: int) -> None:
        self.where = f"epoch {epoch}, batch {batch}"
        self.enter("step", "training")

    def end_step(self) -> None:
        """The work of a step is done: its own time is from the wait for its batch to now."""
        began, waited = self._began
        self.own.append(time.monotonic() - began - (self.waited_s - waited))
        self.steps += 1

    def at(self, step: int) -> None:
        """Let whoever shares memory with this worker know where it is."""
        if self._step_of is not None:
            self._step_of[self.rank] = step

    def take_own(self) -> float:
        """Median seconds of the steps since the last call; 0 without any."""
        own, self.own = self.own, []
        return statistics.median(own) if own else 0.0


class _WatchedComm:
    """A communicator whose collectives are noted; all else is the communicator's."""

    def __init__(self, comm: Comm, watch: Watch) -> None:
        self._comm, self._watch = comm, watch
        self.rank, self.world = comm.rank, comm.world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def _noted(self, name: str, *arguments: Any) -> Any:
        with self._watch.waiting(f"in the collective {name}"):
            return getattr(self._comm, name)(*arguments)

    def sum(self, tensor: Any) -> Any:
        return self._noted("sum", tensor)

    def sum_gradients(self, parameters: Any, extra: Any) -> Any:
        return self._noted("sum_gradients", parameters, extra)

    def broadcast(self, value: Any) -> Any:
        return self._noted("broadcast", value)

    def broadcast_tensors(self, tensors: Any) -> None:
        self._noted("broadcast_tensors", tensors)

    def gather(self, value: Any) -> Any:
        return self._noted("gather", value)

    def barrier(self) -> None:
        self._noted("barrier")


class _WatchedData:
    """A data source whose batches are noted as they come and go; all else is the source's."""

    def __init__(self, data: DataSource, watch: Watch) -> None:
        self._data, self._watch = data, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._watch.begin_reading()
        for number, batch in enumerate(self._data.train_batches(epoch, start), start):
            self._watch.begin_step(epoch, number)
            yield batch
            self._watch.begin_reading()
        self._watch.enter("rest", f"after the last batch of epoch {epoch}")

    def batches(self, split: str, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        self._watch.enter("read", f"waiting for a batch of {split}")
        for batch in self._data.batches(split, rows):
            self._watch.enter("step", f"going through {split}")
            yield batch
            self._watch.enter("read", f"waiting for a batch of {split}")
        self._watch.enter("rest", f"after the last batch of {split}")


def watched_comm(comm: Comm, watch: Watch) -> Comm:
    """Of one worker alone nothing is waited for."""
    return cast(Comm, _WatchedComm(comm, watch)) if comm.world > 1 else comm


def watched_data(data: DataSource, watch: Watch) -> DataSource:
    if hasattr(data, "on_progress"):  # while a cache is filled, before the first batch
        data.on_progress = lambda: watch.enter("read", "decoding into memory")
    return cast(DataSource, _WatchedData(data, watch))


# --- hanging


class Watchdog:
    """Looks at a watch until `end`; ends the process when nothing has moved for longer than it may.

    run: the folder of the run, for `logs/hang-rank-R.log`. end_process: called with the exit code at last.
    """

    def __init__(
        self, watch: Watch, deadlines: Deadlines, run: str, end_process: Callable[[int], None] = os._exit
    ) -> None:
        self._watch, self._deadlines, self._run, self._end_process = watch, deadlines, run, end_process
        self._every_s = min(1.0, deadlines.step / 10)
        self._durations: deque[float] = deque(maxlen=101)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watchdog", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _look_on(self) -> None:
        looked = counted = not_before = time.monotonic()
        steps = self._watch.steps
        while not self._over.wait(self._every_s):
            now = time.monotonic()
            if now - looked > max(2.0, 3 * self._every_s):  # the whole process was stopped, or the machine asleep
                not_before = now
            looked = now
            if self._watch.steps > steps:
                self._durations.append((now - counted) / (self._watch.steps - steps))
                steps, counted = self._watch.steps, now
            kind, _, since = self._watch.now
            median = statistics.median(self._durations) if self._durations else None
            allowed = self._deadlines.seconds(kind, median)
            silent = now - max(since, not_before)
            if silent <= allowed:
                continue
            if _debugged():
                not_before = now
                continue
            self._bark(silent, allowed)
            return

    def _bark(self, silent: float, allowed: float) -> None:
        watch = self._watch
        text = (
            f"rank {watch.rank} on {socket.gethostname()}, process {os.getpid()}: nothing has moved for {silent:.0f} s "
            f"({watch.place()}; allowed: {allowed:.0f} s). The process is ended with code {HUNG}, to be started "
            "again; the run goes on from its last checkpoint. Its threads, each with the latest call first:\n\n"
        ) + _stacks()
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
        writing = threading.Thread(target=self._write, args=(text,), daemon=True)
        writing.start()
        writing.join(_LOG_S)
        self._end_process(HUNG)

    def _write(self, text: str) -> None:
        with contextlib.suppress(CounterpoiseError, OSError), storage.limits(deadline_s=_LOG_S):
            storage.write_text(hang_log(self._run, self._watch.rank), text, durable=False)


def hang_log(run: str, rank: int) -> str:
    """Where the stacks of a worker that hung are written."""
    return storage.join(run, "logs", f"hang-rank-{rank}.log")


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _debugged() -> bool:
    """Whether somebody has stopped a thread in a debugger."""
    for frame in sys._current_frames().values():
        here: Any = frame
        while here is not None:
            if str(here.f_globals.get("__name__", "")).split(".")[0] in _DEBUGGERS:
                return True
            here = here.f_back
    return False


@contextlib.contextmanager
def guarded(watch: Watch, hang_s: float | None, run: str) -> Iterator[None]:
    """A watchdog for the time of the block. hang_s: the deadline of a step; None or 0: no watchdog."""
    if not hang_s:
        yield
        return
    dog = Watchdog(watch, Deadlines() if hang_s == STEP_S else Deadlines.of(hang_s), run)
    try:
        yield
    finally:
        dog.end()


# --- lagging

WINDOW = 20  # steps between two comparisons
SLOW = 1.3  # times the median of the others ...
SLOW_S = 0.01  # ... and so much more; less is noise


class Pace:
    """Compares, on rank 0, how long steps take on each worker. One that is slow in two windows running is named."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of the last window, by rank
        self._slow_before: set[int] = set()
        self._named: set[int] = set()

    def compare(self, seconds: Sequence[float]) -> list[dict[str, Any]]:
        """Events about workers that have become stragglers. seconds: the median own time of a step, by rank."""
        self.seconds = list(seconds)
        events: list[dict[str, Any]] = []
        slow: set[int] = set()
        for rank, own in enumerate(seconds):
            others = statistics.median(s for r, s in enumerate(seconds) if r != rank)
            if own > SLOW * others and own - others > SLOW_S:
                slow.add(rank)
                if rank in self._slow_before and rank not in self._named:
                    facts = {"rank": rank, "step_ms": round(1000 * own, 1), "others_ms": round(1000 * others, 1)}
                    events.append({"event": "straggler", **facts})
        self._named = (self._named | {e["rank"] for e in events}) & slow
        self._slow_before = slow
        return events
