"""`counterpoise sweep`: many runs of one experiment, on Ray Tune, and what became of every one of them.

    <runs>/<name>/sweep.json         what was asked; per trial its values, seed, state, tries, error and time
                  aug-lr0.01-seed0/  one ordinary run folder per trial
                  report.html

The run folders are the truth. sweep.json can be made again from them, except for what is not about one run: what was
asked, how often a trial was tried, and the rounds of a population. With --resume a finished trial is left alone, an
interrupted one goes on from its checkpoint, and a failed one is tried again.

Whatever decides while a sweep goes on, a search or a scheduler, sees the fused accuracy on valid and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from counterpoise import storage
from counterpoise.cli import say
from counterpoise.config import Experiment, changed_fields, parse_yaml, resolve
from counterpoise.contracts import ConfigError, Interrupted, RefusedError, ResourceError
from counterpoise.data.plan import generator
from counterpoise.engine.exploit import exploit
from counterpoise.engine.job import chosen_device
from counterpoise.engine.run import EXPERIMENT, MANIFEST, RunFolder, check_name, find_runs, redact
from counterpoise.launch.session import SCHEDULER, Order, mark_stopped
from counterpoise.reports.records import FUSED, read_run, series
from counterpoise.reports.spec import parse_spec
from counterpoise.reports.tables import Table, comparison, text_table
from counterpoise.reuse import Reuse
from counterpoise.start import (
    Preview,
    Settings,
    StopRequest,
    check_same_data,
    in_use,
    keep_changes,
    preview,
    publisher,
    reopened,
    run_content,
)
from counterpoise.storage import join
from counterpoise.sweepfile import Asked, Pbt, Resources, Sweep, Trial, combinations, label_of, plan, show, trials_of
from counterpoise.telemetry.board import Board
from counterpoise.telemetry.emitter import Options, emitting
from counterpoise.telemetry.feed import current
from counterpoise.wording import duration, pretty_json

if TYPE_CHECKING:
    from counterpoise.launch.cluster import Cluster

SWEEP = "sweep.json"
MOST_ROWS = 20  # of the table on the terminal
LOCAL_SAVE_S, REMOTE_SAVE_S = 1.0, 10.0  # between two sweep.json
LOCKED_S = 30.0  # so long we wait for processes of a killed command to end
ENDED = ("finished", "stopped", "failed")


# --- the plan


class Prepared:
    """The experiments of a sweep, checked. A preview is made once for all that differ in seed or optimizer only."""

    def __init__(self, asked: Asked, settings: Settings) -> None:
        self.asked, self._settings = asked, settings
        self._previews: dict[str, Preview] = {}

    def get(self, trial: Trial) -> tuple[Preview, dict[str, dict[str, Any]]]:
        """What the run would be, and where its values come from; errors that can be found early are raised here."""
        experiment, provenance = self.asked.resolved(trial.vary, trial.seed)
        content = experiment.to_json()
        key = json.dumps({**content, "seed": 0, "optim": 0}, sort_keys=True)
        if key not in self._previews:
            seen = preview(experiment, self._settings)
            self._check(seen)
            self._previews[key] = seen
        return replace(self._previews[key], experiment=experiment), provenance

    def _check(self, seen: Preview) -> None:
        if not (decides := self.asked.sweep.decides):
            return
        corpus = seen.experiment.corpus
        if not seen.samples["valid"]:
            raise ConfigError(
                f"{decides} decides on the valid split, and corpus {corpus} has none; carve one from train on its card"
            )
        if seen.selects_on == "test":
            raise ConfigError(
                f"{decides} would decide on test, as protocol {seen.experiment.protocol} selects epochs; take a "
                "protocol that selects on valid"
            )


def check(asked: Asked, prepared: Prepared, trials: Sequence[Trial]) -> None:
    """ConfigError for trials that cannot be, or that are the same run twice."""
    digests: dict[str, Trial] = {}
    experiments: list[Experiment] = []
    for trial in trials:
        experiment = prepared.get(trial)[0].experiment
        experiments.append(experiment)
        if (other := digests.setdefault(experiment.digest, trial)) is not trial and asked.sweep.search.name == "grid":
            raise ConfigError(f"{trial.label} and {other.label} are the same experiment")
        check_name(trial.name)
    # Points that a search draws have no labels before.
    labels = list(dict.fromkeys(trial.label for trial in trials)) if asked.sweep.search.name == "grid" else None
    parse_spec(asked.sweep.report, labels)
    if isinstance(pbt := asked.sweep.scheduler, Pbt):
        if len(trials) < 2:
            raise ConfigError("pbt needs two trials or more; give more under vary, search or seeds")
        for experiment in experiments[1:]:
            differing = [k for k in changed_fields(experiments[0], experiment) if k not in (*pbt.mutate, "seed")]
            differing = [k for k in differing if not k.startswith("optim.") or k in ("optim.name", "optim.betas")]
            if differing:
                raise ConfigError(
                    f"pbt copies weights between trials, so all must be alike but for optimizer and seed; they differ "
                    f"in {', '.join(differing)}"
                )
        for key in pbt.mutate:
            asked.resolved({key: pbt.mutate[key].draw(generator("check", key))}, 0)


def first_points(sweep: Sweep) -> list[Trial]:
    """One trial for every combination that a search will be done for, to check it: with values out of the space."""
    found = []
    for index, combination in enumerate(combinations(sweep.vary)):
        rng = generator("check", index)
        drawn = {key: domain.draw(rng) for key, domain in sweep.search.space.items()}
        found.append(trials_of(sweep, combination, 0, drawn)[0])
    return found


def fits(resources: Resources, cpus: float, gpus: float) -> int:
    """How many trials run at once on so many CPUs and GPUs."""
    counts = [cpus / (resources.workers * resources.cpus)] if resources.cpus else []
    if resources.gpus:
        counts.append(gpus / (resources.workers * resources.gpus))
    return int(min(counts) + 1e-9)


def plan_lines(asked: Asked, seen: Preview, total: int, at_once: str) -> list[str]:
    sweep, resources = asked.sweep, asked.sweep.resources
    varied = [f"{key} [{', '.join(map(show, values))}]" for key, values in sweep.vary.items()]
    lines = [
        *seen.lines()[:2],
        f"experiment  {asked.source}: {seen.experiment.epochs} epochs of {seen.batches} batches",
    ]
    lines += [f"vary        {'; '.join(varied)}"] if varied else []
    if sweep.search.name != "grid":
        space = [f"{key} {kind} {values}" for key, domain in sweep.search.space.items()
                 for kind, values in domain.to_json().items()]  # fmt: skip
        lines.append(
            f"search      {sweep.search.name}, {sweep.search.trials} points"
            f"{' per combination' if varied else ''}, seed {sweep.search.seed}: {'; '.join(space)}"
        )
    if sweep.scheduler.name != "none":
        facts = ", ".join(f"{k} {v}" for k, v in sweep.to_json()["scheduler"].items() if k not in ("name", "mutate"))
        lines.append(f"scheduler   {sweep.scheduler.name}: {facts}")
    each = f"{resources.workers} worker{'s' if resources.workers > 1 else ''} of {resources.cpus:g} CPU"
    each += f" and {resources.gpus:g} GPU" if resources.gpus else ""
    return [
        *lines,
        f"trials      {total}, seeds {', '.join(map(str, sweep.seeds))}; each {each}; {at_once}",
    ]


def step_seconds(experiment: Experiment, settings: Settings, steps: int = 5) -> dict[str, float]:
    """Seconds of one training step and of one forward pass of a batch, measured here on the first batches of epoch 1.

    The medians of a few, after two that are left out; reading and decoding included.
    """
    import torch

    from counterpoise.contracts import Batch
    from counterpoise.engine.comm import SingleComm
    from counterpoise.engine.feed import on_device
    from counterpoise.engine.job import open_data
    from counterpoise.engine.loop import RunOptions, Trainer
    from counterpoise.engine.memory import reuse_memory

    device = settings.resolved_device
    torch.set_num_threads(settings.resolved_threads)
    reuse_memory(device)
    data = open_data(experiment)
    times: list[float] = []
    forwards: list[float] = []

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    try:
        with tempfile.TemporaryDirectory(prefix="counterpoise-") as root:
            folder = RunFolder.create(root, "step", experiment_text="", provenance={}, manifest={})
            trainer = Trainer(experiment, data, SingleComm(), folder, RunOptions(device))
            trainer.net.train()
            trainer.method.begin_epoch(trainer.net, trainer._context())
            batches = iter(on_device(data, data.train_batches(1), trainer.device))
            for _ in range(steps + 2):
                start = now()
                batch: Batch | None = next(batches, None)
                if batch is None:
                    break
                trainer.train_batch(batch)
                trainer.progress.batch += 1
                times.append(now() - start)
                with torch.no_grad():
                    start = now()
                    trainer.net(batch)
                    forwards.append(now() - start)
    finally:
        data.close()
    kept = slice(2 if len(times) > 3 else 0, None)
    return {"step_s": statistics.median(times[kept]), "forward_s": statistics.median(forwards[kept])}


def estimate(prepared: Prepared, trials: Sequence[Trial], total: int, settings: Settings, at_once: int) -> list[str]:
    """What the sweep would take, from steps measured now: of every method, or of the first five."""
    groups: dict[str, tuple[Preview, list[Trial]]] = {}
    for trial in trials:
        seen, _ = prepared.get(trial)
        groups.setdefault(seen.experiment.method_name, (seen, []))[1].append(trial)
    measured: dict[str, float] = {}
    lines = []
    for method, (seen, _) in list(groups.items())[:5]:
        found = step_seconds(seen.experiment, settings)
        size = seen.experiment.batch_size
        evaluation = math.ceil(seen.samples["valid"] / size) * found["forward_s"]
        test = math.ceil(seen.samples["test"] / size) * found["forward_s"]
        epochs = seen.experiment.epochs
        measured[method] = epochs * (seen.batches * found["step_s"] + evaluation) + test
        lines.append(
            f"measured    {method}: {1e3 * found['step_s']:.1f} ms a step, {1e3 * found['forward_s']:.1f} ms a forward "
            f"pass; {duration(measured[method])} a trial of {epochs} epochs"
        )
    fallback = statistics.fmean(measured.values())
    share = total / max(len(trials), 1)
    work = share * sum(measured.get(method, fallback) * len(own) for method, (_, own) in groups.items())
    rest = f"; methods beyond {', '.join(measured)} are taken as their mean" if len(groups) > len(measured) else ""
    early = ", if no trial is stopped early" if prepared.asked.sweep.scheduler.name in ("asha", "median") else ""
    lines.append(
        f"estimate    {duration(work / at_once)}: {duration(work)} of training, {at_once} at a time{early}; by one "
        f"worker, without starting Ray (some seconds){rest}"
    )
    return lines


# --- the ledger


class Ledger:
    """sweep.json: what was asked, and what became of every trial."""

    def __init__(self, root: str, content: dict[str, Any]) -> None:
        self.root, self.content = root, content
        self.entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in content["trials"]}
        self._saved = float("-inf")
        self._dirty = False

    def add(self, trial: Trial) -> dict[str, Any]:
        """The entry of a trial; a new one is waiting."""
        if trial.name not in self.entries:
            self.entries[trial.name] = {
                "name": trial.name, "vary": trial.vary, "seed": trial.seed, "point": trial.point, "state": "waiting",
                "tries": 0, "error": None, "time_s": None, "epoch": 0, "selected": None,
            }  # fmt: skip
            self._dirty = True
        return self.entries[trial.name]

    def update(self, name: str, **facts: Any) -> None:
        self.entries[name].update(facts)
        self._dirty = True

    def touch(self) -> None:
        self._dirty = True

    def save(self, force: bool = False) -> None:
        """Write it, if something has changed, and not too often unless `force`."""
        pause = LOCAL_SAVE_S if storage.is_local(self.root) else REMOTE_SAVE_S
        if self._dirty and (force or time.monotonic() - self._saved > pause):
            self.content["trials"] = list(self.entries.values())
            storage.write_bytes(join(self.root, SWEEP), pretty_json(self.content), durable=force)
            self._saved, self._dirty = time.monotonic(), False

    def count(self, *states: str) -> int:
        return sum(entry["state"] in states for entry in self.entries.values())


def look(root: str, trial: Trial, prepared: Prepared, changed: bool) -> dict[str, Any]:
    """What the folder of a trial says about it; RefusedError if it holds another experiment.

    changed: a population has changed values of it, so its digest is another one.
    """
    uri = join(root, trial.name)
    if not storage.exists(join(uri, MANIFEST)):
        return {"state": "waiting"}
    folder, (seen, _) = RunFolder.open(uri), prepared.get(trial)
    before = folder.manifest.get("digest")
    if before != seen.experiment.digest and not changed:
        raise RefusedError(
            f"{storage.show(uri)} was started from another experiment (digest {before}, now {seen.experiment.digest}); "
            "start the sweep under a new --name"
        )
    check_same_data(folder, seen)
    folder.await_lock(tell=say, dying_s=LOCKED_S)
    state, run = folder.state(), read_run(uri)
    facts: dict[str, Any] = {"state": "interrupted" if state in ("created", "running") else state}
    facts["epoch"] = run.epochs[-1]["epoch"] if run.epochs else 0
    if state == "finished":
        assert run.summary is not None
        facts |= {"selected": _selected(run.summary), "time_s": run.summary["wall_s"]}
    elif run.epochs:
        facts["selected"] = _best_so_far(run.epochs)
    if state == "failed":
        facts["error"] = run.status.get("error")
    return facts


def _selected(summary: Mapping[str, Any]) -> float | None:
    return summary.get("valid", {}).get("accuracy", {}).get(FUSED)


def _best_so_far(epochs: Sequence[Mapping[str, Any]]) -> float | None:
    """Fused accuracy on valid of the epoch that is selected so far."""
    best = epochs[-1].get("best_epoch")
    record = next((r for r in epochs if r["epoch"] == best), epochs[-1])
    return ((record.get("valid") or {}).get("accuracy") or {}).get(FUSED)


# --- searching


class Suggestions:
    """Points that Optuna asks for, per combination of `vary`, until every one has had its number.

    A point is scored by the mean over its seeds; one of which a seed failed has no score. What earlier processes found
    is told in the same order as it was then, so a search that was interrupted goes on to the same points.
    """

    def __init__(self, sweep: Sweep, study: Callable[[], Any], known: Callable[[Trial], tuple[bool, float | None]],
                 order: Callable[[Trial], Order], digest: Callable[[Trial], str]) -> None:  # fmt: skip
        """known(trial) -> (whether it has ended, accuracy on valid), and enters it into the ledger."""
        self._sweep, self._known, self._order, self._digest = sweep, known, order, digest
        self._combinations = combinations(sweep.vary)
        self._studies = [study() for _ in self._combinations]
        self._asked = [0] * len(self._studies)
        self._open: list[dict[int, list[str]]] = [{} for _ in self._studies]  # number -> names, of the batch
        self._scores: dict[str, float | None] = {}
        self._names: dict[str, str] = {}  # digest -> the trial that is it
        self._queue: deque[Trial] = deque()

    def next(self) -> Order | None:
        while not self._queue and any(self._may_ask(i) for i in range(len(self._studies))):
            for index in range(len(self._studies)):
                if self._may_ask(index):
                    self._ask(index)
        return self._order(self._queue.popleft()) if self._queue else None

    def exhausted(self) -> bool:
        wanted = self._sweep.search.trials
        return not self._queue and all(n == wanted for n in self._asked) and not any(self._open)

    def done(self, name: str, selected: float | None) -> None:
        self._scores[name] = selected
        for index in range(len(self._studies)):
            self._settle(index)

    def _may_ask(self, index: int) -> bool:
        return not self._open[index] and self._asked[index] < (self._sweep.search.trials or 0)

    def _ask(self, index: int) -> None:
        first = self._asked[index]
        self._asked[index] = min(first + self._sweep.search.batch, self._sweep.search.trials or 0)
        for number in range(first, self._asked[index]):
            drawn = self._studies[index].ask(number)
            names = []
            for trial in trials_of(self._sweep, self._combinations[index], number, drawn):
                name = self._names.setdefault(self._digest(trial), trial.name)
                names.append(name)
                if name != trial.name:
                    continue  # the same experiment once more
                ended, selected = self._known(trial)
                if ended:
                    self._scores[name] = selected
                else:
                    self._queue.append(trial)
            self._open[index][number] = names
        self._settle(index)

    def _settle(self, index: int) -> None:
        """Tell the results of a batch in order, once all are there."""
        batch = self._open[index]
        if not batch or not all(name in self._scores for names in batch.values() for name in names):
            return
        for number, names in batch.items():
            scores = [self._scores[name] for name in names]
            whole = [score for score in scores if score is not None]
            self._studies[index].tell(number, statistics.fmean(whole) if len(whole) == len(scores) else None)
        self._open[index] = {}


# --- populations


class PbtRounds:
    """The rounds of a population: each a function of (seed, epoch, accuracies), written down before it is done."""

    def __init__(self, pbt: Pbt, ledger: Ledger, tell: Callable[[str], None]) -> None:
        self.pbt, self.interval, self._ledger, self._tell = pbt, pbt.interval, ledger, tell
        self.rounds: list[dict[str, Any]] = ledger.content.setdefault("rounds", [])
        if self.rounds and not self.rounds[-1]["done"]:
            self._carry_out(self.rounds[-1])

    @property
    def decided(self) -> int:
        return int(self.rounds[-1]["epoch"]) if self.rounds else 0

    def decide(self, epoch: int, valid: Mapping[str, float]) -> None:
        names = [name for name in self._ledger.entries if name in valid]
        exploits = [
            {"run": loser, "from": winner, "changes": self._changes(epoch, loser, winner)}
            for loser, winner in pairs(self.pbt, epoch, {name: valid[name] for name in names}).items()
        ]
        made = {"epoch": epoch, "valid": {name: valid[name] for name in names}, "exploits": exploits, "done": False}
        self.rounds.append(made)
        self._ledger.touch()
        self._ledger.save(force=True)
        self._carry_out(made)

    def _changes(self, epoch: int, loser: str, winner: str) -> dict[str, Any]:
        """What the loser goes on with: the winner's values, explored."""
        theirs = self._experiment(winner).to_json()
        found = {}
        for key, domain in self.pbt.mutate.items():
            value: Any = theirs
            for part in key.split("."):
                value = value[part]
            rng = generator("pbt", self.pbt.seed, epoch, loser, key)
            anew = rng.random() < self.pbt.resample
            found[key] = domain.draw(rng) if anew else domain.near(value, rng, self.pbt.factors)
        return found

    def _experiment(self, name: str) -> Experiment:
        folder = RunFolder.open(join(self._ledger.root, name))
        return resolve(parse_yaml(folder.experiment_text, folder.at(EXPERIMENT)))[0]

    def _carry_out(self, made: dict[str, Any]) -> None:
        for step in made["exploits"]:
            target, donor = (RunFolder.open(join(self._ledger.root, step[key])) for key in ("run", "from"))
            old = self._experiment(step["run"])
            sets = [f"{key}={json.dumps(value)}" for key, value in step["changes"].items()]
            new, _ = resolve(old.to_json(), sets)
            exploit(target, donor, new, step["changes"])
            lines = [f"{key}: {was!r} -> {now!r}" for key, (was, now) in changed_fields(old, new).items()]
            keep_changes(target, new, lines)
            changes = ", ".join(f"{key} {show(value)}" for key, value in step["changes"].items())
            self._tell(f"epoch {made['epoch']}  {step['run']} goes on from {step['from']}, with {changes}")
        made["done"] = True
        self._ledger.touch()
        self._ledger.save(force=True)


def pairs(pbt: Pbt, epoch: int, valid: Mapping[str, float]) -> dict[str, str]:
    """{trial of the worst: the one of the best that it goes on from}; equals in the order they are given."""
    ranked = sorted(valid, key=lambda name: -valid[name])
    count = min(max(1, int(len(ranked) * pbt.quantile)), len(ranked) // 2)
    best, worst = ranked[:count], ranked[len(ranked) - count :]
    return {
        loser: best[int(generator("pbt", pbt.seed, epoch, loser, "from").integers(count))]
        for loser in worst
        if valid[loser] < valid[best[-1]]
    }


# --- running


class Runner:
    """Runs what is missing of a sweep, and keeps the ledger and the display."""

    def __init__(
        self,
        asked: Asked,
        prepared: Prepared,
        ledger: Ledger,
        settings: Settings,
        retries: int,
        stop: StopRequest,
        reuse: Reuse,
    ) -> None:
        self.asked, self.sweep, self.prepared, self.ledger = asked, asked.sweep, prepared, ledger
        self.settings, self.retries, self.stop, self.reuse = settings, retries, stop, reuse
        self.name = ledger.content["name"]
        self.total = total_of(self.sweep)
        self.board = Board(ledger.root, self.total)
        self._began: dict[str, float] = {}
        self._before: dict[str, float] = {}  # time_s of earlier processes
        self._seconds: list[float] = []
        self._at_once = 1

    def run(self, trials: Sequence[Trial], max_concurrent: int | None) -> None:
        """trials: all of them, or none where a search finds them."""
        changed = isinstance(self.sweep.scheduler, Pbt)
        for trial in trials:
            self._enter(trial, changed)
        self.ledger.save(force=True)
        waiting = [trial for trial in trials if self.ledger.entries[trial.name]["state"] not in ENDED]
        if trials and not waiting:
            return
        from counterpoise.launch.cluster import cluster

        resources, cores = self.sweep.resources, os.cpu_count() or 1
        need = resources.workers * resources.cpus
        wanted = max_concurrent or max(1, fits(replace_gpus(resources), cores, 0))
        own = max(1, min(wanted, max(len(waiting), 1) if trials else wanted))
        tasks = own * max(2, cores) if resources.workers > 1 else 1
        opened = cluster(math.ceil(own * need), tasks, address=self.settings.address, verbose=self.settings.verbose)
        with self.board.opened(), opened as found:
            self._at_once = min(self._room(found), max_concurrent or 10**9)
            self._fit(waiting if trials else None, found)

    def _room(self, cluster: Cluster) -> int:
        """How many trials the cluster holds; ResourceError if none."""
        resources = self.sweep.resources
        cpus = cluster.cpus - (1 if resources.workers > 1 or cluster.own else 0)
        room = fits(resources, max(cpus, 0), cluster.gpus)
        if room < 1:
            raise ResourceError(
                f"a trial takes {resources.workers * resources.cpus:g} CPUs and {resources.workers * resources.gpus:g} "
                f"GPUs, and the Ray cluster has {cluster.cpus:g} and {cluster.gpus:g}; ask for less under resources"
            )
        return room

    def _fit(self, waiting: Sequence[Trial] | None, found: Cluster) -> None:
        from counterpoise.launch import tune
        from counterpoise.launch.cluster import Cluster

        resources, scheduler = self.sweep.resources, self.sweep.scheduler
        rounds = PbtRounds(scheduler, self.ledger, self.board.line) if isinstance(scheduler, Pbt) else None
        ended = [name for name, entry in self.ledger.entries.items() if entry["state"] in ENDED]
        known = {name: _results(join(self.ledger.root, name)) for name in self.ledger.entries}
        epochs = max([self.prepared.get(trial)[0].experiment.epochs for trial in waiting or first_points(self.sweep)])
        spare = (found.cpus - self._at_once * resources.workers * resources.cpus) / self._at_once
        each = resources.workers * resources.cpus + max(spare, 0.5 if resources.workers > 1 else 0)
        single = resources.workers == 1
        reserved = {"CPU": resources.cpus if single else 0.01}
        if single and resources.gpus:
            reserved["GPU"] = resources.gpus
        source: Any = waiting and [self._order(trial) for trial in waiting]
        if waiting is None:
            study = lambda: tune.OptunaStudy(self.sweep.to_json()["search"]["space"], self.sweep.search.seed)  # noqa: E731
            digest = lambda trial: self.prepared.get(trial)[0].experiment.digest  # noqa: E731
            source = Suggestions(self.sweep, study, self._known, self._order, digest)
        tune.run_trials(
            source,
            self.ledger.root,
            found,
            resources=reserved,
            at_once=self._at_once,
            shared=Cluster(found.own, found.folder, each, resources.workers * resources.gpus),
            scheduler=tune.make_scheduler(scheduler.model_dump(), epochs, known, ended, rounds),
            scheduler_name=scheduler.name,
            retries=self.retries,
            observe=self._observe,
            tick=self._tick,
            stop=self.stop,
        )
        self._settle()

    def _enter(self, trial: Trial, changed: bool = False) -> dict[str, Any]:
        """The ledger's entry of a trial, with what its folder says."""
        entry = self.ledger.add(trial)
        self._take_over(trial)
        facts = look(self.ledger.root, trial, self.prepared, changed)
        if entry["state"] == "stopped" and facts["state"] in ("interrupted", "waiting"):
            facts["state"] = "stopped"  # decided, and the command killed before the folder said so
        if entry["time_s"] is not None:
            facts.pop("time_s", None)  # measured from its start, with what the run does not see of itself
        if facts["state"] == "failed":  # is tried again
            facts["state"], entry["tries"] = "interrupted", 0
        self.ledger.update(trial.name, **facts)
        self._before[trial.name] = 0.0 if facts["state"] in ENDED else float(entry["time_s"] or 0.0)
        if facts["state"] == "finished" and entry["time_s"]:
            self._seconds.append(entry["time_s"])
        return entry

    def _take_over(self, trial: Trial) -> None:
        """Copy the run of a trial that is not there yet from where it has been done already."""
        target = join(self.ledger.root, trial.name)
        if not self.reuse or storage.exists(join(target, MANIFEST)):
            return
        source, refused = self.reuse.take(self._order(trial).content["manifest"], target)
        if source:
            self.ledger.update(trial.name, reused=storage.show(source))
            say(f"reused      {trial.name} from {storage.show(source)}")
        else:
            for reason in refused:
                say(f"not reused  {trial.name} from {reason}")

    def _known(self, trial: Trial) -> tuple[bool, float | None]:
        entry = self._enter(trial)
        return entry["state"] in ENDED, entry["selected"]

    def _order(self, trial: Trial) -> Order:
        seen, provenance = self.prepared.get(trial)
        content = run_content(seen, provenance, trial.name, sys.argv[1:])
        content["manifest"]["device"] = "cuda" if self.sweep.resources.gpus else "cpu"
        content["manifest"]["sweep"] = {"name": self.name, "trial": trial.name, "vary": trial.vary}
        resources = self.sweep.resources
        return Order(
            root=self.ledger.root,
            name=trial.name,
            content=content,
            data=seen.state,
            workers=resources.workers,
            cpus=resources.cpus,
            gpus=resources.gpus,
            threads=resources.threads,
            checkpoint_every_s=self.settings.checkpoint_every_s,
            retries=self.retries,
            interval=self.sweep.scheduler.interval if isinstance(self.sweep.scheduler, Pbt) else 0,
            place=os.getcwd(),
            verbose=self.settings.verbose,
        )

    def _observe(self, what: str, name: str, facts: dict[str, Any]) -> None:
        entry, now = self.ledger.entries[name], time.monotonic()
        if what == "start" and self.stop.reason:
            return  # it will not begin
        if what == "start":
            self._began.setdefault(name, now)
            self.ledger.update(name, state="running", tries=max(entry["tries"], 1))
            self.board.begin(name, label_of(entry["vary"]), entry["seed"])
            if feed := current():
                feed.follow(join(self.ledger.root, name), resuming=True)
            return
        taken = self._before[name] + now - self._began.get(name, now)
        if what == "stopped":
            self.ledger.update(name, state="stopped", time_s=round(taken, 3))
            self._end(name, "stopped", f"by {facts['by']} after epoch {facts['epoch']}")
        elif what == "died" or facts["state"] == "retrying":
            self.ledger.update(name, tries=facts["tries"], error=facts["error"])
            self.board.line(
                f"{name}: {facts['error']}; try {facts['tries'] + 1} of {self.retries + 1} goes on from there"
            )
        elif facts.get("done") and facts["state"] != "running":  # a scheduler's stop makes an epoch the last
            self._done(name, facts, taken)
        else:
            found = {key: facts[key] for key in ("tries", "epoch", "selected")}
            self.ledger.update(name, **found, time_s=round(taken, 3))
        self.ledger.save()

    def _done(self, name: str, facts: Mapping[str, Any], taken: float) -> None:
        state = str(facts["state"])
        found = {"state": state, "tries": facts["tries"], "time_s": round(taken, 3)}
        if state == "failed":
            found["error"] = facts["error"]
        if state == "finished":
            found |= {"epoch": facts["epoch"], "selected": facts["selected"]}
            self._seconds.append(taken)
        if state == "interrupted" and isinstance(self.sweep.scheduler, Pbt) and not self.stop.reason:
            found["state"] = "running"  # waits for a round
        self.ledger.update(name, **found)
        if state == "waiting":
            self.board.drop(name)
        elif found["state"] != "running":
            self._end(name, state, str(facts.get("error") or ""))

    def _end(self, name: str, state: str, detail: str) -> None:
        self.board.end(name, state, detail)
        if feed := current():
            feed.leave(join(self.ledger.root, name))

    def _tick(self) -> None:
        self.board.refresh(self.ledger.count(*ENDED), self._left())
        self.ledger.save()

    def _left(self) -> float | None:
        """Seconds until the end, from trials that have finished and from how far those that run have got."""
        shares = [self.board.share(name) for name, e in self.ledger.entries.items() if e["state"] == "running"]
        missing = self.total - self.ledger.count(*ENDED)
        if self._seconds:
            each = statistics.fmean(self._seconds)
        else:
            guesses = [
                (time.monotonic() - self._began[name]) / share
                for name, entry in self.ledger.entries.items()
                if entry["state"] == "running" and name in self._began and (share := self.board.share(name)) > 0.05
            ]
            if not guesses:
                return None
            each = statistics.fmean(guesses)
        return each * max(missing - sum(shares), 0) / max(1, min(self._at_once, missing))

    def _settle(self) -> None:
        """Bring folders and ledger together after the last process has ended."""
        for name, entry in self.ledger.entries.items():
            folder = RunFolder(join(self.ledger.root, name))
            if not storage.exists(folder.at(MANIFEST)):
                if entry["state"] == "running":
                    entry["state"] = "waiting"
                continue
            if entry["state"] == "stopped" and folder.state() != "stopped" and not folder.is_locked():
                mark_stopped(folder, f"{SCHEDULER}{self.sweep.scheduler.name}")
            elif entry["state"] in ("running", "waiting"):
                entry["state"] = "interrupted"
        self.ledger.touch()
        self.ledger.save(force=True)


def replace_gpus(resources: Resources) -> Resources:
    """The resources without GPUs, whose number is known only to Ray."""
    return resources.model_copy(update={"gpus": 0.0})


def _results(uri: str) -> list[dict[str, Any]]:
    """What a scheduler saw of a run, epoch by epoch; nothing of one that has not begun."""
    if not storage.exists(join(uri, MANIFEST)):
        return []
    epochs, values = series(read_run(uri), "valid", "accuracy", FUSED)
    return [{"epoch": e, "valid": v, "state": "running"} for e, v in zip(epochs, values, strict=True)]


def total_of(sweep: Sweep) -> int:
    return len(combinations(sweep.vary)) * len(sweep.seeds) * (sweep.search.trials or 1)


# --- what came out


def tabulate(ledger: Ledger, sweep: Sweep, with_stopped: bool = False) -> Table:
    """A row per point, in the order of the plan, or the best on valid first where points were searched.

    A point of which a scheduler has stopped a seed is left out: the mean of those that survived would be too good.
    with_stopped: keep it, with the seeds that have finished.
    """
    points: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in ledger.entries.values():
        points.setdefault((label_of(entry["vary"]) or "run", entry["point"]), []).append(entry)
    stopped = [key for key, own in points.items() if any(entry["state"] == "stopped" for entry in own)]
    kept = {key: own for key, own in points.items() if with_stopped or key not in stopped}
    remarks = []
    if stopped and not with_stopped:
        count = sum(entry["state"] == "stopped" for own in points.values() for entry in own)
        remarks.append(
            f"{count} {'trial was' if count == 1 else 'trials were'} stopped early by {sweep.scheduler.name}. Their "
            "points are left out (--with-stopped shows what has finished of them); their numbers are in their folders."
        )
    if count := sum("reused" in entry for entry in ledger.entries.values()):
        remarks.append(
            f"{count} {'run was' if count == 1 else 'runs were'} trained elsewhere and taken over (--reuse)."
        )
    if sweep.search.name != "grid":
        scores = {key: _mean([entry["selected"] for entry in own]) for key, own in kept.items()}
        kept = dict(sorted(kept.items(), key=lambda item: -(scores[item[0]] or 0.0)))
        if kept and (best := next(iter(kept))) and scores[best] is not None:
            remarks.append(f"Best on valid: {best[0]}, mean fused accuracy {scores[best]:.3f}.")
        if len(kept) > MOST_ROWS:
            remarks.append(
                f"The best {MOST_ROWS} of {len(kept)} points on valid; all are in sweep.json and the report."
            )
    labels = [key[0] for key in kept]
    groups = {
        key[0] if labels.count(key[0]) == 1 else f"{key[0]} (point {key[1]})": [
            read_run(join(ledger.root, entry["name"]))
            for entry in sorted(own, key=lambda entry: entry["seed"])
            if storage.exists(join(ledger.root, entry["name"], MANIFEST))
        ]
        for key, own in list(kept.items())[: MOST_ROWS if sweep.search.name != "grid" else None]
    }
    table = comparison([run for group in groups.values() for run in group], groups)
    absent = [e for own in points.values() for e in own if e["state"] == "failed"
              and not storage.exists(join(ledger.root, e["name"], MANIFEST))]  # fmt: skip
    table.remarks = [*remarks, *(f"{entry['name']} is failed: {entry['error']}" for entry in absent)]
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    """None unless all are there."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


# --- the command


def run_sweep(
    *,
    asked: Asked | None,
    settings: Settings,
    runs: str,
    name: str | None,
    resume: bool = False,
    dry_run: bool = False,
    max_concurrent: int | None = None,
    retries: int = 2,
    with_stopped: bool = False,
    out: str | None = None,
    as_json: bool = False,
    metrics: Options | None = None,
    reuse: Sequence[str] = (),
) -> bool:
    """Check, run what is not there yet, print and write the results; whether no trial has failed.

    asked: None with --resume goes on with what the sweep was started with. reuse: places with runs of which finished
    ones of the same experiments are taken over. Raises ConfigError for what cannot be run,
    RefusedError for a name in use or a changed sweep, Interrupted when stopped: running trials have checkpoints then.
    """
    if name is not None:
        check_name(name)
    saved: dict[str, Any] = {}
    if resume:
        if name is None:
            raise ConfigError("--resume needs the --name of the sweep to continue")
        before, saved = reopen(runs, name)
        if asked is not None:
            check_extends(before, asked)
        asked = asked or before
    elif asked is None:
        raise ConfigError("name a sweep file, e.g. counterpoise sweep trainables/experiments/sweeps/av_digits_lr.yaml")
    elif name is not None and storage.list_names(join(runs, name)):
        raise in_use(runs, name)
    sweep = asked.sweep
    resources = sweep.resources
    device = "cuda" if resources.gpus and not settings.address else "cpu"  # here; a cluster's GPUs are there
    if device == "cuda" and chosen_device("auto") == "cpu":
        raise ResourceError(
            f"resources.gpus is {resources.gpus:g}, and this machine has no CUDA device; set it to 0, or name a Ray "
            "cluster that has some with --address"
        )
    settings = replace(settings, workers=resources.workers, threads=resources.threads, device=device)
    earlier = [place for place in saved.get("reuse", []) if find_runs([place])]  # what is gone is not needed again
    reuse = list(dict.fromkeys([*earlier, *reuse]))
    if reuse and isinstance(sweep.scheduler, Pbt):
        raise ConfigError("--reuse takes whole runs over, and those of a population change on their way; leave it out")
    others = Reuse(reuse)
    prepared = Prepared(asked, settings)
    trials = [] if sweep.search.name == "optuna" else plan(sweep)
    checked = trials or first_points(sweep)
    check(asked, prepared, checked)
    total = total_of(sweep)
    here = max_concurrent or max(1, fits(replace_gpus(sweep.resources), os.cpu_count() or 1, 0))
    here = min(here, total)
    known_here = settings.address is None and not sweep.resources.gpus
    at_once = (
        f"{here} at a time" if known_here or max_concurrent else "as many at a time as the Ray cluster has room for"
    )
    for line in plan_lines(asked, prepared.get(checked[0])[0], total, at_once):
        say(line)
    if dry_run:
        for trial in trials:
            say(f"  {trial.name:{max(len(t.name) for t in trials)}}  {trial.label}, seed {trial.seed}")
        for line in estimate(prepared, checked, total, settings, here):
            say(line)
        say("dry run: everything that could be checked is in order; nothing was started")
        if as_json:
            listed = [{"name": t.name, "vary": t.vary, "seed": t.seed} for t in trials]
            print(json.dumps({"asked": asked.to_json(), "trials": listed, "total": total}, indent=2))
        return True

    name = name or f"{asked.name}-{datetime.now():%Y%m%d-%H%M%S}"
    root = join(runs, name)
    content = {
        "format": 1,
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
        "trials": [],
        **saved,
        "reuse": reuse,
        "title": sweep.title,
        "report": sweep.report,
        "asked": asked.to_json(),
    }
    content = redact(content)
    if not resume and not storage.write_new(join(root, SWEEP), pretty_json(content)):
        raise in_use(runs, name)
    say(f"sweep       {storage.show(root)}")
    ledger = Ledger(root, content)
    with emitting(metrics, runs, name, publish=publisher(settings)):
        with StopRequest(
            "stopping: every running trial writes a checkpoint; once more quits at once"
        ).installed() as stop:
            runner = Runner(asked, prepared, ledger, settings, retries, stop, others)
            try:
                runner.run(trials, max_concurrent)
            except Interrupted as error:
                error.exit_code = stop.exit_code
                raise
            if stop.reason and ledger.count(*ENDED) < total:
                stopped = Interrupted(
                    f"stopped ({stop.reason}) with {ledger.count(*ENDED)} of {total} trials ended; go on with "
                    f"--resume --name {name}" + ("" if runs == "runs" else f" --runs {storage.show(runs)}")
                )
                stopped.exit_code = stop.exit_code
                raise stopped
        table = tabulate(ledger, sweep, with_stopped)
        say()
        print(json.dumps(ledger.content, indent=2) if as_json else text_table(table))
        failed = [entry for entry in ledger.entries.values() if entry["state"] == "failed"]
        for entry in failed:
            tries = f"{entry['tries']} {'try' if entry['tries'] == 1 else 'tries'}"
            say(f"failed: {entry['name']} after {tries}: {entry['error']}")
        if (out or storage.is_local(runs)) and table.rows:
            from counterpoise.report import write

            write([root], out=out or join(root, "report.html"), device=settings.device, show=False)
    return not failed


def reopen(runs: str, name: str) -> tuple[Asked, dict[str, Any]]:
    """What a sweep was asked for, and the content of its file."""
    return reopened(join(runs, name), SWEEP, "sweep", Asked.from_json)


def check_extends(old: Asked, new: Asked) -> None:
    """RefusedError unless `new` is `old` with more values, seeds or points at most, or other resources."""
    wrong = []
    before, now = old.to_json(), new.to_json()
    if old.experiment != new.experiment or old.sets != new.sets:
        wrong.append("the experiment, or --set")
    for key in ("scheduler", "search"):
        mine, theirs = (dict(tree["sweep"][key]) for tree in (before, now))
        fewer = (theirs.pop("trials", None) or 0) < (mine.pop("trials", None) or 0)
        if mine != theirs or fewer:
            wrong.append(key)
    if list(old.sweep.vary) != list(new.sweep.vary) or any(
        value not in new.sweep.vary[key] for key, values in old.sweep.vary.items() for value in values
    ):
        wrong.append("vary")
    if not set(old.sweep.seeds) <= set(new.sweep.seeds):
        wrong.append("seeds")
    if wrong:
        raise RefusedError(
            f"this is not the sweep that was started: {', '.join(wrong)} changed; values, seeds and points can only "
            "become more. Leave the file out to go on as before, or start another sweep under a new --name"
        )
