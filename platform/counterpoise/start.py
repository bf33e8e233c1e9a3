"""From an experiment to running workers: check, make the run folder, start an engine, show progress, end cleanly."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from counterpoise import storage
from counterpoise.config import Experiment, check_changes, parse_yaml, resolve
from counterpoise.contracts import ConfigError, DataError, Interrupted, RefusedError, ResourceError
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import Job, chosen_device, open_data
from counterpoise.engine.loop import encoder_configs, make_method, make_network
from counterpoise.engine.run import EXPERIMENT, MANIFEST, RunFolder, check_name
from counterpoise.engine.watchdog import STEP_S
from counterpoise.storage import join

if TYPE_CHECKING:
    from counterpoise.telemetry.emitter import Samples

T = TypeVar("T")
CHANGES = "changes.json"
VERSIONS_OF = ("torch", "torchvision", "numpy", "ray", "pyarrow", "scikit-learn", "s3fs")


@dataclass(frozen=True)
class Settings:
    """Where and how a run is executed; the flags of `counterpoise train`. None of them changes what is trained."""

    engine: str = "local"  # local | ray
    workers: int = 1
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # torch threads per worker; default: cores / workers
    checkpoint_every_s: float = 60.0
    address: str | None = None  # of a running Ray cluster
    max_failures: int = 2
    min_workers: int | None = None  # go on with so many while there is no room for all; None: with all or not at all
    wait_s: float | None = None  # for room for the workers; None: as `run_ray` has it
    verbose: bool = False
    track: tuple[str, ...] = ()  # trackers, beside those of the experiment
    hang_s: float | None = STEP_S  # a worker whose step takes longer is ended and started again; None or 0: never

    @property
    def span(self) -> str:
        """How many workers, in words."""
        least = self.min_workers or self.workers
        return f"{least} to {self.workers}" if least < self.workers else str(self.workers)

    @property
    def resolved_device(self) -> str:
        """Of the workers. In a cluster that was there before they need not be on this machine: `cuda` is believed then,
        and the cluster says whether it has GPUs."""
        if self.device == "cuda" and self.engine == "ray" and self.address:
            return "cuda"
        return chosen_device(self.device)

    @property
    def resolved_threads(self) -> int:
        return self.threads or max(1, (os.cpu_count() or 1) // self.workers)


@dataclass(frozen=True)
class Preview:
    """What a run would be: found by opening the corpus and building the network, before anything starts."""

    experiment: Experiment
    settings: Settings
    samples: dict[str, int]
    selects_on: str
    classes: int
    encoders: dict[str, str]
    parameters: int
    batches: int
    fingerprint: str
    state: dict[str, Any]

    def lines(self) -> list[str]:
        experiment, settings = self.experiment, self.settings
        protocol = f", protocol {experiment.protocol}" if experiment.protocol else ""
        splits = ", ".join(f"{split} {count:,}" for split, count in self.samples.items() if count)
        modalities = ", ".join(f"{name} ({encoder})" for name, encoder in self.encoders.items())
        return [
            f"corpus      {experiment.corpus}{protocol}: {splits} samples, {self.classes} classes, "
            f"data {self.fingerprint[:12]}",
            f"modalities  {modalities}; {self.parameters:,} parameters",
            f"method      {experiment.method_name}",
            f"training    {experiment.epochs} epochs of {self.batches} batches of up to {experiment.batch_size}, "
            f"{experiment.optim.name} lr {experiment.optim.lr}, seed {experiment.seed}, digest {experiment.digest}",
            *self._warning(),
            f"engine      {settings.engine}, {settings.span} worker{'s' if settings.workers > 1 else ''} on "
            f"{settings.resolved_device}, {settings.resolved_threads} threads each",
        ]

    def _warning(self) -> list[str]:
        if self.selects_on == "valid" or self.experiment.select == "last":
            return []
        return ["selection   on test, as the paper does: its accuracy is the best of all epochs, and too high"]


def preview(experiment: Experiment, settings: Settings) -> Preview:
    """Check config, data and resources; every user error that can be found early is raised here."""
    from counterpoise.telemetry.track import chosen

    device = settings.resolved_device
    _check_engine(settings)
    chosen([*settings.track, *experiment.track])
    data = open_data(experiment, world=settings.workers)
    try:
        net = make_network(experiment, data, make_method(experiment, data, SingleComm()))
        samples = {split: data.num_samples(split) for split in ("train", "valid", "test")}
        if not samples["valid"] and experiment.select == "best_valid":
            raise DataError(
                f"corpus {experiment.corpus} has no valid split to select the epoch on; "
                "carve one from train on its card, or set select: last"
            )
        return Preview(
            experiment,
            replace(settings, device=device),
            samples,
            data.selects_on,
            len(data.classes),
            {name: encoder.name for name, encoder in encoder_configs(experiment, data).items()},
            sum(p.numel() for p in net.parameters()),
            len(data.bounds()) - 1,
            data.fingerprint,
            data.preprocessing_state(),
        )
    finally:
        data.close()


def _check_engine(settings: Settings) -> None:
    if settings.min_workers is not None:
        if settings.engine != "ray":
            raise ConfigError("--min-workers needs --engine ray: processes of one machine do not come and go")
        if not 1 <= settings.min_workers <= settings.workers:
            raise ConfigError(f"--min-workers is {settings.min_workers}; choose 1 to {settings.workers} (--workers)")
    if settings.max_failures < -1:
        raise ConfigError(f"--max-failures is {settings.max_failures}; choose 0 or more, or -1 for no limit")
    if settings.engine == "ray":
        try:
            metadata.version("ray")
        except metadata.PackageNotFoundError:
            raise ResourceError(
                "--engine ray needs Ray; install it with `uv sync --extra ray`, or use --engine local"
            ) from None
    if settings.resolved_device.startswith("cuda") and settings.engine == "local":
        import torch

        if settings.workers > torch.cuda.device_count():
            raise ResourceError(f"{settings.workers} workers, but {torch.cuda.device_count()} GPUs on this machine")


def new_run(
    seen: Preview, provenance: Mapping[str, Any], runs: str, name: str | None, argv: Sequence[str] = ()
) -> RunFolder:
    """A new run folder with everything that says what this run is."""
    name = name or default_name(seen.experiment)
    return RunFolder.create(runs, name, **run_content(seen, provenance, name, argv))


def default_name(experiment: Experiment) -> str:
    """The name of a run that was given none."""
    corpus = Path(experiment.corpus.rstrip("/")).stem
    return f"{corpus}-{experiment.method_name}-seed{experiment.seed}-{datetime.now():%Y%m%d-%H%M%S}"


def run_content(seen: Preview, provenance: Mapping[str, Any], name: str, argv: Sequence[str]) -> dict[str, Any]:
    """What `RunFolder.create` puts into the folder of a run."""
    text = yaml.safe_dump(seen.experiment.to_json(), sort_keys=False)
    return {"experiment_text": text, "provenance": provenance, "manifest": manifest(seen, name, argv)}


def manifest(seen: Preview, name: str, argv: Sequence[str]) -> dict[str, Any]:
    import torch

    return {
        "run": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(argv),
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **versions()},
        "seed": seen.experiment.seed,
        "workers": seen.settings.workers,
        "engine": seen.settings.engine,
        "device": seen.settings.device,
        "threads": seen.settings.resolved_threads,
        "data_fingerprint": seen.fingerprint,
        "digest": seen.experiment.digest,
        "group": seen.experiment.group,
        "preprocessing": seen.state,
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def versions() -> dict[str, str]:
    found = {}
    for package in ("counterpoise", *VERSIONS_OF):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, with "+changes" if files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return (commit + ("+changes" if git("status", "--porcelain") else "")) or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def make_job(seen: Preview, folder: RunFolder, resume: bool = False) -> Job:
    return Job(
        experiment=seen.experiment.to_json(),
        run=folder.uri,
        resume=resume,
        checkpoint_every_s=seen.settings.checkpoint_every_s,
        threads=seen.settings.resolved_threads,
        device=str(seen.settings.device),
        data=seen.state,
        hang_s=seen.settings.hang_s,
    )


def reopen(
    runs: str,
    name: str,
    given: Mapping[str, Any] | None,
    source: str,
    sets: Sequence[str],
    allowed: Sequence[str],
    finished: bool = False,
) -> tuple[RunFolder, Experiment, list[str]]:
    """A run to be continued, its experiment, and the changes that were asked for and named.

    given: the content of an experiment file, or None for the one the run was started with. finished: it may be.
    """
    folder = RunFolder.open(join(runs, name))
    if folder.state() == "finished" and not finished:
        raise RefusedError(f"run {name!r} is finished; look at it with `counterpoise report {folder.uri}`")
    saved = parse_yaml(folder.experiment_text, folder.at("experiment.yaml"))
    old, _ = resolve(saved, source=f"{name}/experiment.yaml")
    new, _ = resolve(saved if given is None else given, sets, source)
    changes = check_changes(old, new, allowed)
    if changes and folder.state() == "finished":
        raise RefusedError(f"run {name!r} is finished, so {changes[0]} comes too late; start a new run")
    return folder, new, changes


def existing(runs: str, name: str) -> RunFolder | None:
    """The run of that name, if there is one."""
    check_name(name)
    place = join(runs, name)
    return RunFolder(place) if storage.exists(join(place, MANIFEST)) else None


def in_use(runs: str, name: str) -> RefusedError:
    """For a name of a comparison or a sweep that is there already."""
    return RefusedError(f"{name!r} exists in {storage.show(runs)}; choose another --name, or continue it with --resume")


def reopened(folder: str, file: str, what: str, asked: Callable[[Any], T]) -> tuple[T, dict[str, Any]]:
    """What a comparison or a sweep was asked for, and the content of its file."""
    place = join(folder, file)
    if not storage.exists(place):
        raise DataError(f"{storage.show(folder)} is not a {what}: it has no {file}")
    try:
        saved = json.loads(storage.read_bytes(place))
        return asked(saved["asked"]), saved
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{storage.show(place)} is damaged: {error}; restore it from a copy") from error


def check_same_data(folder: RunFolder, seen: Preview) -> None:
    """Refuse to continue a run on other data."""
    before = folder.manifest.get("data_fingerprint")
    if before != seen.fingerprint:
        raise RefusedError(
            f"corpus {seen.experiment.corpus} is not the one this run was started with "
            f"(fingerprint {str(before)[:12]}, now {seen.fingerprint[:12]}); start a new run"
        )


def keep_changes(folder: RunFolder, experiment: Experiment, changes: Sequence[str]) -> None:
    """Make a changed experiment the run's own; what changed, and when, is added to changes.json."""
    if not changes:
        return
    with folder:
        before = folder.read_json(CHANGES) if storage.exists(folder.at(CHANGES)) else []
        now = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "changes": list(changes)}
        folder.write_json(CHANGES, [*before, now])
        storage.write_text(folder.at(EXPERIMENT), yaml.safe_dump(experiment.to_json(), sort_keys=False))


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a polite wish to stop; the second one quits at once."""

    def __init__(self, promise: str = "stopping after a checkpoint; once more quits at once") -> None:
        self.reason: str | None = None
        self._promise = promise

    def __call__(self) -> str | None:
        return self.reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name
        print(f"\n{self.reason}: {self._promise}", file=sys.stderr, flush=True)

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """130 as shells have it for Ctrl-C; 75 (try again) for a notice from a scheduler or a stop file."""
        return 130 if self.reason == "SIGINT" else 75


def run_jobs(
    jobs: Sequence[Job], settings: Settings, *, show: bool = True, stop: StopRequest | None = None
) -> list[dict[str, Any]]:
    """Execute jobs one after another with the chosen engine, showing what happens; their summaries.

    stop: of a caller that has more to do afterwards, and must know too.
    """
    from counterpoise.telemetry.feed import following
    from counterpoise.telemetry.track import tracking

    stop = stop or StopRequest()
    trackers = tuple(dict.fromkeys([*settings.track, *(t for job in jobs for t in job.experiment.get("track", ()))]))
    done = threading.Event()
    followed = following({job.run: job.resume for job in jobs})
    viewer = None
    if show:
        from counterpoise.telemetry.display import follow

        viewer = threading.Thread(
            target=follow, args=([job.run for job in jobs],), kwargs={"stop": done}, name="display", daemon=True
        )
        viewer.start()
    try:
        with stop.installed(), followed, tracking([job.run for job in jobs], trackers):
            if settings.engine == "ray":
                from counterpoise.launch.train import run_ray

                found = run_ray(
                    jobs,
                    workers=settings.workers,
                    use_gpu=str(settings.resolved_device).startswith("cuda"),
                    address=settings.address,
                    verbose=settings.verbose,
                    stop=stop,
                    max_failures=settings.max_failures,
                    min_workers=settings.min_workers,
                    wait_s=settings.wait_s,
                    tell=_tell,
                )
                return [summary for summary in found if summary is not None]
            from counterpoise.engine.local import run_local

            for job in (job for job in jobs if job.resume):
                RunFolder.open(job.run).await_lock(tell=_tell)
            return run_local(jobs, settings.workers, stop, settings.max_failures, _tell)
    except Interrupted as error:
        error.exit_code = stop.exit_code
        raise
    finally:
        done.set()
        if viewer is not None:
            viewer.join(timeout=10)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def publisher(settings: Settings) -> Callable[[Samples], None] | None:
    """Another way for metrics beside their endpoint: that of a Ray cluster, where one is used that was there before."""
    if settings.engine != "ray" or not settings.address:
        return None
    from counterpoise.launch.metrics import RayMetrics

    return RayMetrics()


def elapsed(since: float) -> str:
    seconds = time.monotonic() - since
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
