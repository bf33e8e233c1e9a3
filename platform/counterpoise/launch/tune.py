"""Trials of a sweep on Ray Tune: searching, early stopping, populations, and processes that are used again.

A trial is a `Session`, which trains an ordinary run folder; Tune decides what runs when and what is stopped, and knows
nothing else. Its own checkpoints are empty, its state is thrown away at the end, and `Tuner.restore` is not used: what
a sweep has done is in the run folders, and whoever calls this asks only for what is missing.

Schedulers and searchers see the fused accuracy on valid. Their imports are slow, so this module is imported late.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher

from counterpoise import storage
from counterpoise.contracts import CounterpoiseError
from counterpoise.engine.run import STOP, RunFolder
from counterpoise.launch.cluster import Cluster, adopt
from counterpoise.launch.session import SCHEDULER, Order, Session

METRIC, SELECTED, TIME = "valid", "selected", "epoch"
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no accuracy
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # Tune's own state is never read again
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_STATE = ".tune"  # of a sweep on somebody else's cluster, in its folder; removed at the end
_POLL_S = 0.1


class Source(Protocol):
    """Where trials come from when what is tried next depends on what came out so far."""

    def next(self) -> Order | None:
        """The next trial; None while results have to be waited for."""
        ...

    def exhausted(self) -> bool: ...

    def done(self, name: str, selected: float | None) -> None:
        """A trial has ended, with its accuracy on valid; None if it failed."""
        ...


class Rounds(Protocol):
    """A population: what happens when all of its trials stand at the end of the same epoch."""

    interval: int

    @property
    def decided(self) -> int:
        """The epoch of the last round, 0 before the first."""
        ...

    def decide(self, epoch: int, valid: Mapping[str, float]) -> None:
        """Copy and change trials, by their accuracies on valid; all of them are at rest."""
        ...


# --- in the process of a trial


class SweepTrial(tune.Trainable):
    """Tune's view of a session. One process has one after another."""

    def setup(self, config: dict[str, Any]) -> None:
        self._session = _session(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._session.halt()
        self._session = _session(new_config)
        return True

    def step(self) -> dict[str, Any]:
        return self._session.next()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune saves what it pauses. The run folder has it all."""
        self._session.halt()
        Path(checkpoint_dir, "none").touch()

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

    def cleanup(self) -> None:
        self._session.halt()


def _session(config: Mapping[str, Any]) -> Session:
    order, shared = Order(**json.loads(config["order"])), json.loads(config["cluster"])
    adopt(Cluster(**shared))
    return Session(order, config["released"], config["tries"])


# --- schedulers


class _Here:
    """Lives in the process of the command: a copy that Tune makes is the same, and what Tune writes down is empty."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        return object, ()


class _Past:
    """Stands for a trial of an earlier process, towards Tune's schedulers."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


class _Remembering:
    """Mixed in before one of Tune's schedulers: it knows what earlier processes saw."""

    def recall(self, past: Mapping[str, Sequence[Mapping[str, Any]]], ended: Sequence[str]) -> None:
        """past: name of a trial -> its results so far. ended: trials that will not be run again."""
        self._past = dict(past)
        for name in ended:
            self._replay(_Past(name), self._past.pop(name, ()))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._replay(trial, self._past.pop(name_of(trial), ()))

    def _replay(self, trial: Any, results: Sequence[Mapping[str, Any]]) -> None:
        nobody = SimpleNamespace(get_live_trials=lambda: [])
        super().on_trial_add(nobody, trial)  # type: ignore[misc]
        for result in results:
            super().on_trial_result(nobody, trial, dict(result))  # type: ignore[misc]

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if METRIC in result:  # a trial that failed has none
            super().on_trial_complete(tune_controller, trial, result)  # type: ignore[misc]


class Halving(_Remembering, ASHAScheduler):
    """Asynchronous successive halving (Li et al., MLSys 2020)."""


class Median(_Remembering, MedianStoppingRule):
    """The median rule of Vizier (Golovin et al., KDD 2017): best so far below the median of the others' means."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        return TrialScheduler.CONTINUE  # Tune would pause it, to let others catch up


class Population(_Here, FIFOScheduler):
    """Lets all trials train to the end of the same epoch, then has a round decided, and so on.

    Nothing depends on which trial is faster, as it does in Tune's own PBT, so a population that was interrupted goes
    on to the same result.
    """

    _metric = METRIC

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self.rounds = rounds
        self._valid: dict[str, tuple[int, float]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result["state"] != "running":
            return str(TrialScheduler.CONTINUE)
        self._valid[name_of(trial)] = (result[TIME], result[METRIC])
        due = trial.config["released"] + self.rounds.interval
        return str(TrialScheduler.PAUSE if result[TIME] >= due else TrialScheduler.CONTINUE)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        live = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if live and all(trial.status == Trial.PAUSED and not trial.is_saving for trial in live):
            at = {name_of(trial): self._valid[name_of(trial)] for trial in live}
            if all(at[name_of(trial)][0] > trial.config["released"] for trial in live):
                epoch = min(epoch for epoch, _ in at.values())
                self.rounds.decide(epoch, {name: valid for name, (_, valid) in at.items()})
                for trial in live:
                    trial.config["released"] = epoch
        for trial in live:
            if trial.status == Trial.PENDING:
                return trial
        for trial in live:
            if trial.status == Trial.PAUSED and trial.config["released"] >= self._valid[name_of(trial)][0]:
                return trial
        return None


def make_scheduler(
    asked: Mapping[str, Any],
    epochs: int,
    past: Mapping[str, Sequence[Mapping[str, Any]]],
    ended: Sequence[str],
    rounds: Rounds | None,
) -> TrialScheduler:
    """The scheduler of a sweep. asked: its name and settings; epochs: of the longest trial."""
    common: dict[str, Any] = {"time_attr": TIME, "metric": METRIC, "mode": "max"}
    if rounds is not None:
        return Population(rounds)
    if asked["name"] == "asha":
        limits = {"max_t": max(epochs, asked["grace"]), "grace_period": asked["grace"]}
        found: Any = Halving(**common, **limits, reduction_factor=asked["factor"], stop_last_trials=False)
    elif asked["name"] == "median":
        found = Median(**common, grace_period=asked["grace"], min_samples_required=asked["least"])
    else:
        return FIFOScheduler()
    found.recall(past, ended)
    return found


# --- searching


class _Asking(_Here, Searcher):
    """Gives Tune the trials of a source, and the source their results."""

    def __init__(self, source: Source, config: Callable[[Order], dict[str, Any]], stopping: Callable[[], bool]) -> None:
        super().__init__(metric=SELECTED, mode="max")
        self._source, self._config, self._stopping = source, config, stopping
        self._names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        if self._stopping():
            return Searcher.FINISHED
        order = self._source.next()
        if order is None:
            return Searcher.FINISHED if self._source.exhausted() else None
        self._names[trial_id] = order.name
        return self._config(order)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        result = result or {}
        if result.get("state") not in ("interrupted", "waiting"):
            self._source.done(self._names[trial_id], None if error else result.get(SELECTED))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the source is made again from the run folders."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep does not restore Tune's state")


class OptunaStudy:
    """Points of one search by Optuna's TPE sampler, through Tune, in batches.

    A batch is asked for when the one before has been told completely, so that what is tried next does not depend on
    which trial was faster. With the same seed and results it asks for the same points.
    """

    def __init__(self, space: Mapping[str, Mapping[str, Any]], seed: int) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        logging.getLogger("optuna").setLevel(logging.ERROR)
        self._choices = {key: domain["choice"] for key, domain in space.items() if "choice" in domain}
        kinds: dict[str, Any] = {}
        for key, domain in space.items():
            [(kind, values)] = domain.items()
            if kind == "choice":
                kinds[key] = optuna.distributions.CategoricalDistribution(range(len(values)))  # may hold lists
            elif kind == "integers":
                kinds[key] = optuna.distributions.IntDistribution(values[0], values[1])
            else:
                kinds[key] = optuna.distributions.FloatDistribution(values[0], values[1], log=kind == "log_uniform")
        self._search = OptunaSearch(space=kinds, metric=SELECTED, mode="max", seed=seed)

    def ask(self, number: int) -> dict[str, Any]:
        found = self._search.suggest(str(number)) or {}
        return {key: self._choices[key][value] if key in self._choices else value for key, value in found.items()}

    def tell(self, number: int, selected: float | None) -> None:
        result = None if selected is None else {SELECTED: selected}
        self._search.on_trial_complete(str(number), result, error=selected is None)


# --- in the process of the command


class _Telling(_Here, tune.Callback):
    """Hands on what Tune says, with the names of the runs, and asks trials that a scheduler ends to stop."""

    def __init__(self, told: queue.Queue[tuple[str, str, dict[str, Any]]], scheduler: str) -> None:
        self._told, self._scheduler = told, scheduler

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._told.put(("start", name_of(trial), {}))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._told.put(("result", name_of(trial), result))
        trial.config["tries"] = result["tries"] - (result["state"] != "retrying")  # should this process die

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if (trial.last_result or {}).get("state") == "running":
            order = order_of(trial)
            RunFolder(order.uri).request_stop(f"{SCHEDULER}{self._scheduler}")
            self._told.put(("stopped", order.name, {"by": self._scheduler, TIME: trial.last_result[TIME]}))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        trial.config["tries"] += 1
        self._told.put(("died", name_of(trial), {"tries": trial.config["tries"], "error": DIED}))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        tries = trial.config["tries"] + 1
        self._told.put(("result", name_of(trial), {"state": "failed", "tries": tries, "error": DIED, "done": True}))


DIED = "the process of the trial died (killed, or out of memory)"


def order_of(trial: Trial) -> Order:
    return Order(**json.loads(trial.config["order"]))


def name_of(trial: Trial) -> str:
    return str(json.loads(trial.config["order"])["name"])


class _Stopper(_Here, tune.Stopper):
    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stopping.is_set()


def run_trials(
    trials: Sequence[Order] | Source,
    root: str,
    cluster: Cluster,
    *,
    resources: Mapping[str, float],
    at_once: int,
    shared: Cluster,
    scheduler: TrialScheduler,
    scheduler_name: str,
    retries: int,
    observe: Callable[[str, str, dict[str, Any]], None],
    tick: Callable[[], None],
    stop: Callable[[], str | None],
) -> None:
    """Run trials until all have ended, or until `stop` gives a reason; then every running one writes a checkpoint.

    resources: of a trial, as Tune reserves them. shared: the cluster as one trial may use it.
    observe(what, name, facts): start, result, stopped or died. tick: called often. Both in the caller's thread.
    """
    told: queue.Queue[tuple[str, str, dict[str, Any]]] = queue.Queue()
    stopping = threading.Event()
    population = scheduler if isinstance(scheduler, Population) else None
    common = {
        "cluster": json.dumps(asdict(shared)),
        "released": population.rounds.decided if population else 0,
        "tries": 0,
    }

    def config(order: Order) -> dict[str, Any]:  # as text: Tune evaluates some mappings it finds in a config
        return {"order": json.dumps(asdict(order)), **common}

    if isinstance(trials, Sequence):
        # A population needs all of its trials at once; what there is no room for is paused.
        search: Any = BasicVariantGenerator(max_concurrent=0 if population else at_once)
        space: dict[str, Any] = {"order": tune.grid_search([config(order)["order"] for order in trials]), **common}
        samples = 1
    else:
        search = tune.search.ConcurrencyLimiter(_Asking(trials, config, stopping.is_set), max_concurrent=at_once)
        space, samples = {}, 10**9
    place, options = _state_place(cluster, root)
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    box: list[BaseException] = []

    def fit() -> None:
        try:
            tuner = tune.Tuner(
                tune.with_resources(SweepTrial, PlacementGroupFactory([dict(resources)])),
                param_space=space,
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=samples,
                    reuse_actors=True,
                    trial_name_creator=name_of,
                    trial_dirname_creator=name_of,
                ),
                run_config=tune.RunConfig(
                    name="sweep",
                    verbose=0,
                    stop=_Stopper(stopping),
                    callbacks=[_Telling(told, scheduler_name)],
                    failure_config=tune.FailureConfig(max_failures=retries),
                    **options,
                ),
            )
            tuner.fit()
        except BaseException as error:  # handed to the waiting thread, whatever it is
            box.append(error)

    storage.delete(storage.join(root, STOP))
    thread = threading.Thread(target=fit, name="ray-tune", daemon=True)
    thread.start()
    running: set[str] = set()
    asked = float("-inf")
    try:
        while True:
            alive = thread.is_alive()
            while not told.empty():
                what, name, facts = told.get()
                if what == "start":
                    running.add(name)
                elif facts.get("done") or what == "stopped":
                    running.discard(name)
                observe(what, name, facts)
            tick()
            if not alive:
                break
            if (reason := stop()) and time.monotonic() - asked > 1.0:  # again and again: a run that begins clears it
                asked = time.monotonic()
                storage.write_text(storage.join(root, STOP), reason + "\n")  # what has not begun stays so
                folders = [RunFolder(storage.join(root, name)) for name in running]
                busy = [folder for folder in folders if folder.is_locked()]
                for folder in busy:
                    folder.request_stop(reason)
                if not busy:
                    stopping.set()
            thread.join(_POLL_S)
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        storage.delete(place)
        storage.delete(storage.join(root, STOP))
    if box:
        if isinstance(box[0], CounterpoiseError) or not isinstance(box[0], Exception):
            raise box[0]
        line = (str(box[0]).strip().splitlines() or [""])[-1]
        raise CounterpoiseError(f"Ray Tune failed: {type(box[0]).__name__}: {line}; go on with --resume") from box[0]


def _state_place(cluster: Cluster, root: str) -> tuple[str, dict[str, Any]]:
    """Where Tune keeps files of its own meanwhile: every machine must reach it. And how Tune is told so."""
    if cluster.own:
        place = os.path.join(cluster.folder, "tune")
        return place, {"storage_path": place}
    place = storage.join(root, _STATE)
    if storage.is_local(root):
        place = os.path.abspath(storage.local_path(place))
        return place, {"storage_path": place}
    import pyarrow.fs

    files, path = storage.filesystem(place)
    handler = pyarrow.fs.FSSpecHandler(files)  # knows no credentials: those are in the environment
    return place, {"storage_path": path, "storage_filesystem": pyarrow.fs.PyFileSystem(handler)}
