"""From an experiment and a run folder to a finished run: what every worker executes, whoever started it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from counterpoise import storage
from counterpoise.config import Experiment
from counterpoise.contracts import Comm, ConfigError, CounterpoiseError, DataSource, Interrupted, ResourceError
from counterpoise.data.card import Card, load_card
from counterpoise.data.loader import LocalData
from counterpoise.engine.loop import Progress, RunOptions, Trainer
from counterpoise.engine.memory import explained, reuse_memory
from counterpoise.engine.run import RunFolder
from counterpoise.engine.watchdog import Watch, guarded, watched_comm, watched_data
from counterpoise.methods import METHODS

# How collectives of gloo and NCCL say that a peer is gone.
_PEER_GONE = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "socket",
    "gloo",
    "nccl",
    "timed out waiting",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run to be done; plain data, so that it can travel to a worker."""

    experiment: dict[str, Any]
    run: str  # URI of a run folder that exists
    resume: bool = False
    checkpoint_every_s: float = 60.0
    threads: int = 1  # torch threads of one worker; part of what makes bits equal
    device: str = "cpu"
    data: dict[str, Any] = field(default_factory=dict)  # preprocessing state, as the starting process found it
    until: int | None = None  # the epoch after which the run is interrupted
    hang_s: float | None = None  # the deadline of a step, see `engine/watchdog.py`; None: no watchdog


def chosen_device(name: str) -> str:
    """The torch device that `--device NAME` means: auto is a GPU if there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("--device cuda: this machine has no CUDA device; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


OpenData = Callable[..., DataSource]


def experiment_card(experiment: Experiment) -> Card:
    """The card of an experiment's corpus, as its protocol and its own preprocessing have it."""
    return load_card(experiment.corpus).under(experiment.protocol, experiment.preprocess)


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed, most likely because another worker died."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _PEER_GONE)


def open_data(
    experiment: Experiment,
    rank: int = 0,
    world: int = 1,
    state: dict[str, Any] | None = None,
    kind: OpenData = LocalData,
    **more: Any,
) -> DataSource:
    """The corpus of an experiment as one worker sees it, limited to the modalities that are trained."""
    card = experiment_card(experiment)
    names = list(card.select(list(experiment.modalities) or None))
    used = METHODS[experiment.method_name].uses(experiment.method, names)
    return kind(
        card,
        used,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        rank=rank,
        world=world,
        options=experiment.data,
        state=state,
        **more,
    )


def execute(
    job: Job,
    comm: Comm,
    *,
    stop: Callable[[], str | None] | None = None,
    data: DataSource | None = None,
    on_epoch: Callable[[Progress], None] | None = None,
    move: Callable[[], str | None] | None = None,
    after: str = "",
    watch: Watch | None = None,
) -> dict[str, Any] | None:
    """Train, test and leave a finished run folder; the summary, on rank 0.

    data: an open corpus to use (it is not closed); otherwise this worker opens and closes its own.
    on_epoch: called after every epoch but the last, when its checkpoint is written; what it raises ends the run there.
    move: asked, on rank 0, for a reason to go on with other workers; a checkpoint is written and Moved raised then.
    after: why this is a continuation, for the records.
    watch: gets to know what this worker is doing; default: one of its own.
    """
    torch.set_num_threads(job.threads)
    reuse_memory(job.device)
    if job.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    experiment = Experiment(**job.experiment)
    folder = RunFolder.open(job.run) if comm.rank == 0 else None
    if folder is not None:
        folder.acquire()
        folder.clear_stop()
    opened = data if data is not None else open_data(experiment, comm.rank, comm.world, job.data)
    try:
        watch = watch or Watch(comm.rank)
        options = RunOptions(
            job.device, job.checkpoint_every_s, job.resume, stop, job.until, on_epoch, move, after, watch
        )
        seen, together = watched_data(opened, watch), watched_comm(comm, watch)
        with storage.patience():
            with guarded(watch, job.hang_s, job.run), explained(experiment, job.device, watch.place, comm.world):
                summary = Trainer(experiment, seen, together, folder, options).run()
            if folder is not None and summary is not None:
                summary = {"run": folder.name, **summary}
                folder.write_json("summary.json", summary)
                folder.write_status({"state": "finished", "method": experiment.method_name, "eta_s": None}, force=True)
                folder.seal()
        return summary
    except Interrupted:
        raise
    except Exception as error:
        if folder is not None and not lost_a_peer(error):  # without a peer the run goes on, if somebody starts it again
            _note_failure(folder, error)
        raise
    finally:
        if data is None:
            opened.close()
        if folder is not None:
            _release(folder)


def _note_failure(folder: RunFolder, error: Exception) -> None:
    """Write down why a run failed. If that cannot be written either, the first reason stays the one that is told."""
    text = str(error) if isinstance(error, CounterpoiseError) else f"{type(error).__name__}: {error}"
    try:
        folder.append({"kind": "event", "event": "failed", "error": text, "type": type(error).__name__})
    except (CounterpoiseError, OSError) as further:
        _log.warning("run %s: its failure could not be written down: %s", folder.name, further)
    folder.write_status({"state": "failed", "error": text, "eta_s": None}, force=True)


def _release(folder: RunFolder) -> None:
    try:
        folder.release()
    except (CounterpoiseError, OSError) as error:  # a full disk; who comes next takes the lock of a dead process over
        _log.warning("run %s: %s", folder.name, error)
