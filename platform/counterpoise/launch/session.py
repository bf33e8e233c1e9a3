"""One trial of a sweep: an ordinary run, trained by `engine/job.execute`, that tells after every epoch how it stands.

A trial of one worker trains in the process of the trial: a Ray Train run inside it would start four more processes,
half a minute each time, for nothing. It waits at the end of an epoch until it may go on, so a scheduler that stops it
there stops it there. A trial of several workers is a Ray Train run; it is watched through its folder and does not
wait, so one that is stopped may have begun the next epoch. What schedulers compare are equal epochs in both cases.

This module does not need Ray for one worker. Whoever starts trials talks to them through their folders: a stop file
ends them with a checkpoint, and the reason in it says whether they are to be gone on with (`SCHEDULER`).
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from counterpoise import storage
from counterpoise.config import parse_yaml, resolve
from counterpoise.contracts import ConfigError, CounterpoiseError, Interrupted, NonFiniteLossError
from counterpoise.engine import checkpoint
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import Job, execute
from counterpoise.engine.loop import Progress
from counterpoise.engine.run import MANIFEST, STOP, RunFolder
from counterpoise.engine.watchdog import STEP_S
from counterpoise.telemetry.display import FUSED, LOCAL_POLL_S, REMOTE_POLL_S, Tail

SCHEDULER = "scheduler "  # how the reason of a stop for good begins; its name follows
# A stop file in the folder of the sweep keeps trials that have not begun from beginning.
HALT = "the sweep is ending"
FINAL = (ConfigError, NonFiniteLossError)  # would only come again: the same seed takes the same steps
_BACKOFF_MAX_S = 60.0


@dataclass(frozen=True)
class Order:
    """What is to be run; plain data, so that it can travel to any machine.

    content: what `RunFolder.create` puts into a new folder. place: the working directory that relative paths are of.
    interval: epochs between two rounds of a population; 0 without one. retries: of a trial that failed.
    """

    root: str
    name: str
    content: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1
    checkpoint_every_s: float = 60.0
    retries: int = 2
    backoff_s: float = 2.0
    interval: int = 0
    place: str = ""
    verbose: bool = False

    @property
    def uri(self) -> str:
        return storage.join(self.root, self.name)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


class Session:
    """Trains one trial in a thread. `next` waits for the next thing it has to say.

    What it says: {"state": "running", "epoch", "valid", "selected", "tries"} after an epoch: fused accuracies on valid,
    now and of the epoch that is selected so far; {"state": "retrying", "error", "tries"} after a failure that is tried
    again; and at the end, with "done": True, one whose state is finished, stopped, interrupted, failed or waiting (it
    did not begin, because the sweep is ending).
    """

    def __init__(self, order: Order, released: int = 0, tries_before: int = 0) -> None:
        """released: the last round of the population that has been decided. tries_before: by processes that died."""
        self.order = order
        self.tries = tries_before
        self._died = tries_before > 0  # whoever has the lock of the run
        self._folder = RunFolder(order.uri)
        self._released = released
        self._out: queue.Queue[dict[str, Any]] = queue.Queue()
        self._go, self._halted = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._tail: Tail | None = None
        self._looked = float("-inf")
        self._accuracy: dict[int, float] = {}

    def next(self) -> dict[str, Any]:
        """The next result. The trial goes on, or begins, when this is called."""
        if self._thread is None:
            if os.path.isdir(self.order.place):
                os.chdir(self.order.place)
            self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
            self._thread.start()
        self._go.set()
        return self._out.get()

    def halt(self, seconds: float | None = None) -> None:
        """End here; the last checkpoint is where it goes on."""
        self._halted.set()
        if self._thread is not None:
            self._thread.join(seconds)

    # --- in the thread

    def _run(self) -> None:
        try:
            found = self._attempts()
        except BaseException as error:  # whatever it is, somebody waits for a word
            found = {"state": "failed", "error": _text(error)}
        self._out.put({**found, "tries": self.tries, "done": True})

    def _attempts(self) -> dict[str, Any]:
        if storage.exists(storage.join(self.order.root, STOP)):
            return {"state": "waiting"}
        last = self.order.retries + 1
        wait = self.order.backoff_s
        while True:
            self.tries += 1
            try:
                return self._attempt()
            except Interrupted:
                return self._ended()
            except Exception as error:
                text = _text(error)
                if isinstance(error, FINAL) or self.tries >= last:
                    self._note_failure(text)
                    return {"state": "failed", "error": text}
            self._out.put({"state": "retrying", "error": text, "tries": self.tries})
            end = time.monotonic() + wait
            while time.monotonic() < end:
                if self._wish():
                    return self._ended()
                time.sleep(min(0.1, wait))
            wait = min(2 * wait, _BACKOFF_MAX_S)

    def _attempt(self) -> dict[str, Any]:
        order, folder = self.order, self._folder
        begun = storage.exists(folder.at(MANIFEST))
        if not begun:
            RunFolder.create(order.root, order.name, **order.content)
        if folder.state() == "finished":
            return _finished(folder.read_json("summary.json"))
        died, self._died = self._died, False
        folder.await_lock(lambda owner: True if died else None)
        experiment, _ = resolve(parse_yaml(folder.experiment_text, folder.at("experiment.yaml")))
        until = None
        if order.interval and self._released + order.interval < experiment.epochs:
            until = self._released + order.interval  # the first round that has not been decided
            if begun and self._stands_at(folder, until):
                raise Interrupted(f"waits for the others at epoch {until}")
        job = Job(
            experiment=experiment.to_json(),
            run=order.uri,
            resume=begun,
            checkpoint_every_s=order.checkpoint_every_s,
            threads=order.threads,
            device=order.device,
            data=order.data,
            until=until,
            hang_s=STEP_S,
        )
        if order.workers == 1:
            summary = execute(job, SingleComm(), stop=self._wish, on_epoch=self._on_epoch)
        else:
            summary = self._distributed(job)
        assert summary is not None
        return _finished(summary)

    def _distributed(self, job: Job) -> dict[str, Any] | None:
        from counterpoise.launch.train import run_ray

        self._tail = Tail(self.order.uri)
        if job.resume:
            self._tail.skip_past(True)
            self._look_back()
        try:
            [summary] = run_ray(
                [job],
                workers=self.order.workers,
                use_gpu=self.order.gpus > 0,
                cpus=self.order.cpus,
                gpus=self.order.gpus,
                verbose=self.order.verbose,
                stop=self._watch,
                max_failures=self.order.retries,
            )
        finally:
            self._look()
        return summary

    # --- epochs

    def _on_epoch(self, progress: Progress) -> None:
        """Called by the loop after an epoch that is not the last."""
        now = progress.history[-1]
        best = next(h for h in progress.history if h.epoch == progress.best_epoch) if progress.best_epoch else now
        self._tell(now.epoch, _fused(now.held_out.accuracy), _fused(best.held_out.accuracy))
        if self.order.interval and now.epoch % self.order.interval == 0:
            return  # `until` ends it here
        self._go.clear()
        while not self._go.wait(0.05):
            if reason := self._wish():
                raise Interrupted(f"stopped ({reason}) after epoch {now.epoch}")

    def _tell(self, epoch: int, valid: float, selected: float) -> None:
        self._out.put({"state": "running", "epoch": epoch, "valid": valid, "selected": selected, "tries": self.tries})

    def _watch(self) -> str | None:
        """Asked often while a distributed run goes on: tell of its epochs, and whether it is to stop."""
        pause = LOCAL_POLL_S if storage.is_local(self.order.uri) else REMOTE_POLL_S
        if time.monotonic() - self._looked > pause:
            self._looked = time.monotonic()
            self._look()
        return HALT if self._halted.is_set() else None

    def _look(self) -> None:
        assert self._tail is not None
        for record in self._tail.poll():
            if record.get("kind") == "epoch" and record["epoch"] < (self._tail.epochs or 0):
                self._accuracy[record["epoch"]] = _fused((record.get("valid") or record["train"])["accuracy"])
                now = self._accuracy[record["epoch"]]
                self._tell(record["epoch"], now, self._accuracy.get(record["best_epoch"], now))

    def _look_back(self) -> None:
        for record in self._folder.records():
            if record["kind"] == "epoch":
                self._accuracy[record["epoch"]] = _fused((record.get("valid") or record["train"])["accuracy"])

    # --- rounds of a population

    def _stands_at(self, folder: RunFolder, epoch: int) -> bool:
        """Whether a checkpoint of an earlier process lies at the end of that epoch; then say again how it stands."""
        last = checkpoint.latest(folder.checkpoints)
        if last is None:
            return False
        progress = Progress.from_json(last.state["progress"])
        if progress.epoch != epoch + 1 or progress.batch:
            return False
        self._on_epoch(progress)
        return True

    # --- the end

    def _wish(self) -> str | None:
        """Why to stop, if somebody wants it."""
        return HALT if self._halted.is_set() else self._folder.stop_requested()

    def _ended(self) -> dict[str, Any]:
        """After an interruption: stopped for good by a scheduler, or to be gone on with."""
        place = self._folder.at(STOP)
        reason = storage.read_text(place).strip() if storage.exists(place) else ""
        if reason.startswith(SCHEDULER):
            mark_stopped(self._folder, reason)
            return {"state": "stopped"}
        return {"state": "interrupted"}

    def _note_failure(self, text: str) -> None:
        """Write into the folder why the trial failed, if the run itself could not."""
        with contextlib.suppress(CounterpoiseError, OSError):
            if self._folder.state() != "failed":
                with self._folder as folder:
                    folder.write_status({**folder.read_status(), "state": "failed", "error": text}, force=True)


def mark_stopped(folder: RunFolder, reason: str) -> None:
    """Say in a run's folder that a scheduler has ended it; its numbers stay."""
    with folder:
        if folder.state() != "stopped":
            status = folder.read_status()
            folder.append({"kind": "event", "event": "stopped", "by": reason.removeprefix(SCHEDULER),
                           "epoch": epochs_done(folder)})  # fmt: skip
            folder.write_status({**status, "state": "stopped"}, force=True)
    folder.clear_stop()


def epochs_done(folder: RunFolder) -> int:
    """The last epoch that a run has records of; 0 before the first."""
    return max((record["epoch"] for record in folder.records() if record["kind"] == "epoch"), default=0)


def _finished(summary: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = _fused(summary["valid"]["accuracy"])
    return {"state": "finished", "epoch": summary["epochs"], "valid": accuracy, "selected": accuracy}


def _fused(accuracy: Mapping[str, float]) -> float:
    return float(accuracy[FUSED])


def _text(error: BaseException) -> str:
    """An error in one line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, CounterpoiseError) and line else f"{type(error).__name__}: {line}"
