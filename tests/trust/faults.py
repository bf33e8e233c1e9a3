"""Faults that land where they were aimed, in processes that can be killed, and what is kept of them.

A run is trained by forked processes, so torch is imported once. A fault is aimed at a place of the run (`Aim`), never
at a time; the process that is hit writes down where it was before it is hit. A fault that did not land is an error. A
seed decides every choice. What came of all faults goes to a file of JSON lines, from which `table.py` makes its table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from counterpoise.config import Experiment
from counterpoise.contracts import CounterpoiseError
from counterpoise.engine import checkpoint, loop
from counterpoise.engine.comm import SingleComm, current_comm, join_group
from counterpoise.engine.job import Job, execute, lost_a_peer
from counterpoise.engine.run import RunFolder

LOG = "COUNTERPOISE_TRUST_LOG"  # where results are gathered
SCALE = "COUNTERPOISE_TRUST"  # "full": the counts of the long set
SEED = "COUNTERPOISE_TRUST_SEED"
LOST = 3  # exit code of a worker whose peer is gone
LIMIT_S = 120.0  # for one launch; nothing here takes long


class DidNotLandError(AssertionError):
    """A fault that was planned was never brought about, so that nothing was shown."""


def full() -> bool:
    return os.environ.get(SCALE) == "full"


def count(quick: int, long: int) -> int:
    """How many: of the quick set, or of the long one."""
    return long if full() else quick


def chance(*words: object) -> random.Random:
    """A source of choices for one test: of the seed and of what it is for."""
    return random.Random("/".join(map(str, (os.environ.get(SEED, "0"), *words))))


# --- what is kept


def keep(
    test: str,
    fault: str,
    where: Mapping[str, Any] | None,
    survived: bool,
    *,
    control: bool = False,
    recover_s: float | None = None,
) -> None:
    """Write down a fault and what came of it. where: as the injector reported it; None is an error.

    control: the product was broken on purpose; `survived` says whether that went unnoticed.
    """
    line = {
        "test": test,
        "fault": fault,
        "landed": where is not None,
        "where": dict(where or {}),
        "survived": survived,
        "control": control,
        "recover_s": recover_s,
        "seed": os.environ.get(SEED, "0"),
    }
    place = os.environ.get(LOG) or os.path.join(tempfile.gettempdir(), f"counterpoise-trust-{os.getuid()}.jsonl")
    with open(place, "a") as file:
        file.write(json.dumps(line) + "\n")
    if where is None:
        raise DidNotLandError(f"{test}: {fault} did not land")


# --- where it lands


@dataclass(frozen=True)
class Aim:
    """A fault at a place of a run; it lands once.

    point: step (before batch `at` of the run), read (before a batch is handed over), evaluate, decide, apply, applied,
    stage (all of epoch `at`), finish (before the final test), file (before the `at`-th file operation of checkpoints in
    this process). blow: what happens there; default: SIGKILL.
    """

    name: str
    point: str
    at: int = 0
    rank: int = 0
    blow: Callable[[], None] | None = None

    def place(self, folder: Path) -> Path:
        return folder / f"landed-{self.name}.json"

    def landed(self, folder: Path) -> dict[str, Any] | None:
        place = self.place(folder)
        return dict(json.loads(place.read_text())) if place.exists() else None


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signalled(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def hang() -> None:
    time.sleep(3600)


class Armed:
    """Aims in this process, which is a forked one: nothing is put back."""

    def __init__(self, aims: Sequence[Aim], folder: Path, rank: int) -> None:
        self.aims = [aim for aim in aims if aim.rank == rank and not aim.place(folder).exists()]
        self.folder, self.rank = folder, rank
        self.trainer: loop.Trainer | None = None
        self.files = 0
        self.operations: list[str] = []
        self.going = False
        armed = self

        def wrapped(owner: Any, name: str, point: str, at: Callable[[Any], int], after: str = "") -> None:
            whole = getattr(owner, name)

            def call(*arguments: Any, **options: Any) -> Any:
                if isinstance(arguments[0] if arguments else None, loop.Trainer):
                    armed.trainer = arguments[0]
                armed.reach(point, at(armed.trainer))
                found = whole(*arguments, **options)
                if after:
                    armed.reach(after, at(armed.trainer))
                return found

            setattr(owner, name, call)

        def epoch(trainer: Any) -> int:
            return int(trainer.progress.epoch)

        wrapped(loop.Trainer, "train_batch", "step", lambda t: int(t.progress.step))
        wrapped(loop.Trainer, "_begin_stage", "stage", epoch)
        wrapped(loop.Trainer, "_finish", "finish", lambda t: 0)
        wrapped(loop, "evaluate", "evaluate", epoch)
        begin = loop.Trainer._begin

        def _begin(trainer: loop.Trainer) -> None:
            armed.trainer = trainer
            wrapped(trainer.method, "decide", "decide", epoch)
            wrapped(trainer.method, "apply", "apply", epoch, "applied")
            begin(trainer)

        loop.Trainer._begin = _begin  # type: ignore[method-assign]
        checkpoint._before = self._file

    def _file(self, operation: str) -> None:
        self.operations.append(operation)
        self.reach("file", len(self.operations) - 1)

    def reach(self, point: str, at: int) -> None:
        if point == "step" and not self.going:
            self.going = True
            with open(self.folder / "going.jsonl", "a") as file:
                file.write(json.dumps({"step": at, "clock": time.monotonic(), "rank": self.rank}) + "\n")
        for aim in [aim for aim in self.aims if aim.point == point and aim.at == at]:
            self.aims.remove(aim)
            progress = self.trainer.progress if self.trainer is not None else None
            where = {
                "point": point,
                "at": at,
                "rank": self.rank,
                "step": progress.step if progress else None,
                "epoch": progress.epoch if progress else None,
                "operation": self.operations[-1] if self.operations else None,
                "pid": os.getpid(),
                "clock": time.monotonic(),
            }
            aim.place(self.folder).write_text(json.dumps(where))
            (aim.blow or killed)()


def saving_every(steps: int) -> None:
    """Let this process save after so many steps, and not by the clock."""
    control = loop.Trainer._control

    def _control(self: loop.Trainer, force_save: bool = False) -> None:
        self._last_save = float("-inf") if self.progress.step % steps == 0 else time.monotonic()
        control(self, force_save)

    loop.Trainer._control = _control  # type: ignore[method-assign]


# --- processes


@dataclass
class Ended:
    """How the processes of one launch ended: exit codes (minus the signal's number) and what they wrote, by rank."""

    codes: list[int]
    said: list[str]
    seconds: float
    values: list[Any] = field(default_factory=list)


def forked(calls: Sequence[Callable[[], Any]], folder: Path, limit_s: float = LIMIT_S, rest_s: float = 10.0) -> Ended:
    """Call every function in a process of its own. When one has ended badly, the others get `rest_s` to end too."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    children: dict[int, int] = {}
    for rank, call in enumerate(calls):
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            _child(call, folder / f"said-{rank}.txt", folder / f"value-{rank}.json")
        children[pid] = rank
    codes: dict[int, int] = {}
    end = began + limit_s
    while len(codes) < len(calls):
        for pid in [pid for pid, rank in children.items() if rank not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[children[pid]] = os.waitstatus_to_exitcode(status)
                if codes[children[pid]]:
                    end = min(end, time.monotonic() + rest_s)
        if time.monotonic() > end:
            for pid in [pid for pid, rank in children.items() if rank not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    said = [(folder / f"said-{rank}.txt").read_text() for rank in range(len(calls))]
    values = []
    for rank in range(len(calls)):
        place = folder / f"value-{rank}.json"
        values.append(json.loads(place.read_text()) if codes[rank] == 0 and place.exists() else None)
    return Ended([codes[rank] for rank in range(len(calls))], said, time.monotonic() - began, values)


def _child(call: Callable[[], Any], said: Path, value: Path) -> None:
    """Never comes back."""
    code = 1
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        value.write_text(json.dumps(call()))
        code = 0
    except CounterpoiseError as error:
        print(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except BaseException as error:
        traceback.print_exc()
        code = LOST if lost_a_peer(error) else 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


_warm = False


def warm(job: Job) -> None:
    """Import here, once, what every forked process would import for itself: that takes longer than the runs."""
    global _warm
    if _warm:
        return
    _warm = True
    experiment = Experiment(**job.experiment).model_copy(update={"epochs": 1})
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder.create(root, "warm", experiment_text="", provenance={}, manifest={})
        execute(job_of(experiment, folder.uri), SingleComm())


def train(
    job: Job,
    place: Path,
    world: int = 1,
    aims: Sequence[Aim] = (),
    every: int = 4,
    also: Callable[[int], None] | None = None,
    limit_s: float = LIMIT_S,
    sync: bool = False,
) -> Ended:
    """One launch of a run with `world` processes. also: called in each of them with its rank, before it begins."""
    warm(job)
    meeting = tempfile.mktemp(prefix="meeting-", dir=place)  # a new one for every launch

    def worker(rank: int) -> Callable[[], Any]:
        def call() -> Any:
            if not sync:
                os.fsync = lambda _: None  # type: ignore[assignment]
            loop.CONTROL_INTERVAL_S = 0.0
            Armed(aims, place, rank)
            saving_every(every)
            if also is not None:
                also(rank)
            if world > 1:
                join_group(torch.device("cpu"), rank, world, meeting, timeout_s=60)
            return execute(job, current_comm() if world > 1 else SingleComm())

        return call

    return forked([worker(rank) for rank in range(world)], place, limit_s)


def recovered_s(place: Path, where: Mapping[str, Any], ended: float) -> float:
    """Seconds from a fault to the first step after it, or to the end where there was none."""
    going = [json.loads(line) for line in (place / "going.jsonl").read_text().splitlines()]
    later = [mark["clock"] for mark in going if mark["clock"] > where["clock"]]
    return (min(later) if later else ended) - float(where["clock"])


# --- what must be equal

_TIMES = {"time", "seconds", "data_wait_s", "samples_per_s", "wall_s", "data_wait_share", "run", "seq", "rank_step_s"}
_TIMES |= {"train_s", "epoch_start", "best_name"}


def timeless(value: Any) -> Any:
    """Without what a clock, or a name, put there."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in _TIMES}
    return [timeless(item) for item in value] if isinstance(value, list | tuple) else value


def digests(uri: str) -> dict[str, str]:
    """SHA-256 of everything a finished run consists of, by part, without times."""
    folder = RunFolder.open(uri)
    last = checkpoint.latest(folder.checkpoints)
    best = checkpoint.latest(folder.best)
    assert last is not None and best is not None
    state = {key: last.state[key] for key in ("progress", "architecture", "method", "stages", "sums")}
    rows = [record for record in folder.records() if record["kind"] != "event"]
    predictions = folder.read_predictions()
    return {
        **{f"last/{file}": _of_tensors(tensors) for file, tensors in last.tensors.items()},
        **{f"best/{file}": _of_tensors(tensors) for file, tensors in best.tensors.items()},
        "state": _of(timeless(state)),
        "rows": _of(timeless(rows)),
        "summary": _of(timeless(folder.read_json("summary.json"))),
        "predictions": _of({key: values.tolist() for key, values in predictions.items()}),
    }


def _of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def differences(uri: str, whole: Mapping[str, str]) -> list[str]:
    """What of a run is not as in an undisturbed one: parts by name, rows that are there twice, a broken seal."""
    found = digests(uri)
    wrong = sorted(part for part in {*found, *whole} if found.get(part) != whole.get(part))
    folder = RunFolder.open(uri)
    records = folder.records()
    if [record["seq"] for record in records] != list(range(len(records))):
        wrong.append("numbers of records")
    once = [record["epoch"] for record in records if record["kind"] == "epoch"]
    if len(once) != len(set(once)):
        wrong.append("an epoch twice")
    return wrong + folder.verify()


def job_of(experiment: Experiment, uri: str, resume: bool = False, **more: Any) -> Job:
    return Job(experiment.to_json(), uri, resume, checkpoint_every_s=60.0, threads=1, **more)


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
