"""Trackers: a run's records as they come, handed to TensorBoard, MLflow or Weights & Biases.

Records stay the truth; a tracker is a view of them. It lives in the process that started the run and reads the run
folder, so that the loop, its workers and their numbers know nothing of it. A tracker that fails is left out with one
warning, and never ends a run. What each has been told is kept in trackers.json of the run, so that a resumed run goes
on where it stopped, in the same run of the tracker.

Addresses and keys come from the environment as the tools themselves read it (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from counterpoise import storage
from counterpoise.contracts import ConfigError, CounterpoiseError, Record, ResourceError
from counterpoise.plain import read_yaml
from counterpoise.telemetry.display import Tail, decision_line
from counterpoise.wording import did_you_mean, flatten

STATE = "trackers.json"
LOCAL_POLL_S, REMOTE_POLL_S = 1.0, 10.0
PATIENCE_S = 60.0  # for the last numbers to arrive after a run's end


@dataclass(frozen=True)
class Subject:
    """The run that is tracked. settings: {dotted key: value} of its experiment."""

    uri: str
    name: str
    id: str
    settings: Mapping[str, Any]

    @property
    def parent(self) -> str | None:
        """The local folder that holds the run; None for one in object storage."""
        return os.path.dirname(storage.local_path(self.uri)) if storage.is_local(self.uri) else None


class Tracker(Protocol):
    """One run in one tool. Made when there is something to say about the run; every call may raise anything."""

    def numbers(self, epoch: int, values: Mapping[str, float]) -> None: ...

    def note(self, epoch: int, kind: str, text: str) -> None:
        """Something that happened: a decision or an event, in a line."""
        ...

    def close(self, state: str) -> None:
        """state: finished, failed or interrupted."""
        ...


class TensorBoard:
    """Event files in <runs>/tensorboard/<run>, or below COUNTERPOISE_TENSORBOARD."""

    def __init__(self, run: Subject, last_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        root = os.environ.get("COUNTERPOISE_TENSORBOARD") or os.path.join(run.parent or ".", "tensorboard")
        place = os.path.join(root, run.name)
        fresh = last_epoch == 0
        self._writer: Any = SummaryWriter(place, purge_step=None if fresh else last_epoch + 1)
        if fresh:
            table = "\n".join(f"| {key} | {value} |" for key, value in run.settings.items())
            self._writer.add_text("run", f"{storage.show(run.uri)}\n\n| setting | value |\n| --- | --- |\n{table}", 0)

    def numbers(self, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def note(self, epoch: int, kind: str, text: str) -> None:
        self._writer.add_text(kind, text, epoch)
        self._writer.flush()

    def close(self, state: str) -> None:
        self._writer.close()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in <runs>/mlflow.db, in MLFLOW_EXPERIMENT_NAME or "counterpoise"."""

    def __init__(self, run: Subject, last_epoch: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        for logger in ("mlflow", "alembic"):  # they tell of the tables they make
            logging.getLogger(logger).setLevel(logging.WARNING)
        place = os.path.join(run.parent or os.getcwd(), "mlflow.db")
        self._client: Any = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "counterpoise"
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`counterpoise.id` = '{run.id}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"counterpoise.id": run.id, "counterpoise.folder": storage.show(run.uri)}
            self._id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
            for key, value in run.settings.items():
                self._client.log_param(self._id, key, str(value)[:500])

    def numbers(self, epoch: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, epoch) for name, value in values.items()])

    def note(self, epoch: int, kind: str, text: str) -> None:
        existing = self._client.get_run(self._id).data.tags
        number = sum(key.startswith("note.") for key in existing)
        self._client.set_tag(self._id, f"note.{number:04d}", f"{kind}: {text}")

    def close(self, state: str) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED"}.get(state, "KILLED")
        self._client.set_terminated(self._id, status)


class WandB:
    """A run of Weights & Biases; without a key or with WANDB_MODE=offline in <runs>/wandb, for `wandb sync` later."""

    def __init__(self, run: Subject, last_epoch: int) -> None:
        import wandb

        # never a question on the terminal: without a key from environment or netrc, offline
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "counterpoise",
            id=run.id,
            name=run.name,
            resume="allow",
            config={**run.settings, "run_folder": storage.show(run.uri)},
            dir=run.parent or os.getcwd(),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
            ),
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def numbers(self, epoch: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "epoch": epoch})

    def note(self, epoch: int, kind: str, text: str) -> None:
        self._run.summary[f"{kind}s"] = [*self._run.summary.get(f"{kind}s", []), text]

    def close(self, state: str) -> None:
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state == "finished" else 1)


# The tracker, and the modules it needs.
TRACKERS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "tensorboard": (TensorBoard, ("tensorboard",)),
    "mlflow": (MLflow, ("mlflow", "sqlalchemy", "alembic")),
    "wandb": (WandB, ("wandb",)),
}


def chosen(words: Sequence[str]) -> tuple[str, ...]:
    """Names of trackers, out of words that may hold several (`tensorboard,mlflow`); an error for one that is unknown
    or not installed."""
    names = list(dict.fromkeys(name for word in words for name in word.replace(",", " ").split()))
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"track: no tracker {name!r}{did_you_mean(name, TRACKERS)}; known: {', '.join(TRACKERS)}")
        absent = [module for module in TRACKERS[name][1] if importlib.util.find_spec(module) is None]
        if absent:
            raise ResourceError(
                f"--track {name} needs {', '.join(absent)}; install it with `uv sync --extra track`, or leave it out"
            )
    return tuple(names)


# --- records as numbers and lines


def epoch_numbers(record: Record) -> dict[str, float]:
    """The numbers of an epoch's record by name, such as valid/accuracy/audio; those that are absent are left out."""
    found: dict[str, Any] = {key: record.get(key) for key in ("lr", "gap", "seconds", "samples_per_s", "data_wait_s")}
    for split in ("train", "valid"):
        part = record.get(split) or {}
        found[f"{split}/loss"] = part.get("loss")
        for kind in ("losses", "accuracy", "score"):
            found |= {f"{split}/{kind}/{name}": value for name, value in (part.get(kind) or {}).items()}
    for kind in ("classifiers", "coefficients"):
        found |= {f"{kind}/{name}": value for name, value in (record.get(kind) or {}).items()}
    for name, weights in (record.get("classifier_weights") or {}).items():
        found |= {f"classifier_weights/{name}/{number}": value for number, value in enumerate(weights, start=1)}
    return _only_numbers(found)


def summary_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the tested epoch, such as test/accuracy/fused."""
    found: dict[str, Any] = {"selected_epoch": summary.get("selected_epoch"), "wall_s": summary.get("wall_s")}
    for split in ("test", "valid", "train"):
        if "samples" in (part := summary.get(split) or {}):
            found |= {f"{split}/{key}": part.get(key) for key in ("gap", "samples")}
            for kind in ("accuracy", "map", "macro_f1"):
                found |= {f"{split}/{kind}/{name}": value for name, value in (part.get(kind) or {}).items()}
            break
    return _only_numbers(found)


def _only_numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def event_line(record: Record) -> str:
    rest = {k: v for k, v in record.items() if k not in ("kind", "event", "seq", "time", "epoch", "batch", "step")}
    where = f" in epoch {record['epoch']}" if "epoch" in record else ""
    return str(record["event"]).replace("_", " ") + where + (f": {json.dumps(rest)}" if rest else "")


# --- following runs


@dataclass
class _Told:
    """What a tracker has been told of a run."""

    epoch: int = 0
    decision: int = 0
    time: float = 0.0  # of the last event
    summary: bool = False


@dataclass
class _Followed:
    run: Subject
    tail: Tail
    told: dict[str, _Told]
    trackers: dict[str, Tracker] = field(default_factory=dict)
    state: str = "interrupted"


class _Follower:
    """Tells trackers about runs, from a thread of its own."""

    def __init__(self, uris: Sequence[str], names: Sequence[str]) -> None:
        self._uris, self._names = list(uris), list(names)
        self._failed: set[str] = set()
        self._over = threading.Event()
        local = all(storage.is_local(uri) for uri in uris)
        self._poll_s = LOCAL_POLL_S if local else REMOTE_POLL_S
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            _warn(f"trackers have not taken everything within {PATIENCE_S:.0f} s and are left behind")

    def _work(self) -> None:
        left, current = list(self._uris), None
        while True:
            last_round = self._over.is_set()
            try:
                while left:
                    current = current or self._opened(left[0])
                    self._look(current)
                    if current.state != "finished":
                        break
                    self._close(current)
                    left.pop(0)
                    current = None
            except (CounterpoiseError, OSError, ValueError) as error:  # of the run folder; the next look may work
                if last_round:
                    _warn(f"the run's records cannot be read: {error}")
                    return
            if last_round or not left:
                if current is not None:
                    self._close(current)
                return
            self._over.wait(self._poll_s)

    def _opened(self, uri: str) -> _Followed:
        manifest = json.loads(storage.read_text(storage.join(uri, "run.json")))
        tree = read_yaml(storage.read_text(storage.join(uri, "experiment.yaml")))
        settings = {k: v for k, v in flatten(tree) if v is not None} | {"digest": manifest.get("digest")}
        name = str(manifest.get("name") or uri.rstrip("/").rsplit("/", 1)[-1])
        place = storage.join(uri, STATE)
        before = json.loads(storage.read_text(place)) if storage.exists(place) else {}
        told = {tracker: _Told(**before.get(tracker, {})) for tracker in self._names}
        return _Followed(Subject(uri, name, str(manifest.get("id", name)), settings), Tail(uri), told)

    def _look(self, followed: _Followed) -> None:
        news = False
        for record in followed.tail.poll():
            if record.get("kind") == "event" and record.get("event") in ("failed", "resumed"):
                followed.state = "failed" if record["event"] == "failed" else "interrupted"
            if record.get("kind") == "end":
                followed.state = "finished"
            for name in self._names:
                if name not in self._failed:
                    news |= self._tell(followed, name, record)
        if news:
            state = {name: told.__dict__ for name, told in followed.told.items()}
            storage.write_text(storage.join(followed.run.uri, STATE), json.dumps(state) + "\n", durable=False)

    def _tell(self, followed: _Followed, name: str, record: Record) -> bool:
        """Whether the record was news to the tracker."""
        told, kind = followed.told[name], record.get("kind")
        epoch = int(record.get("epoch") or 0)
        if kind == "epoch" and epoch > told.epoch:
            if self._safely(name, lambda: self._tracker(followed, name).numbers(epoch, epoch_numbers(record))):
                told.epoch = epoch
        elif kind == "decision" and epoch > told.decision:
            if self._safely(name, lambda: self._tracker(followed, name).note(epoch, "decision", decision_line(record))):
                told.decision = epoch
        elif kind == "event" and float(record.get("time") or 0) > told.time:
            if self._safely(name, lambda: self._tracker(followed, name).note(epoch, "event", event_line(record))):
                told.time = float(record.get("time") or 0)
        elif kind == "end" and not told.summary:
            summary = record.get("summary") or {}
            at = int(summary.get("epochs") or told.epoch)
            if self._safely(name, lambda: self._tracker(followed, name).numbers(at, summary_numbers(summary))):
                told.summary = True
        else:
            return False
        return True

    def _tracker(self, followed: _Followed, name: str) -> Tracker:
        if name not in followed.trackers:
            followed.trackers[name] = TRACKERS[name][0](followed.run, followed.told[name].epoch)
        return followed.trackers[name]

    def _close(self, followed: _Followed) -> None:
        for name, tracker in followed.trackers.items():
            if name not in self._failed:
                self._safely(name, lambda tracker=tracker: tracker.close(followed.state))

    def _safely(self, name: str, call: Any) -> bool:
        try:
            call()
        except Exception as error:  # whatever a tool raises: the run is worth more than its picture
            self._failed.add(name)
            text = " ".join(storage.show(str(error)).split())[:300] or type(error).__name__
            _warn(f"{name} failed and is told nothing more ({text}); records.jsonl has everything")
            return False
        return True


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def tracking(uris: Sequence[str], names: Sequence[str]) -> Iterator[None]:
    """Tell trackers, by name, what runs record within the block; the runs are done one after another."""
    if not names or not uris:
        yield
        return
    follower = _Follower(uris, chosen(names))
    follower.begin()
    try:
        yield
    finally:
        follower.end()
