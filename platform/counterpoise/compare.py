"""`counterpoise compare`: methods on equal terms, and which of their differences are more than luck of the seed.

    <runs>/<name>/comparison.json    what was asked, and in the end what came out
                  aug-seed0/ ...     one ordinary run folder per trial: a method, a seed and, if tuned, a value

Every method gets the same corpus, encoders, batches and epochs. A setting that is tuned gets the same small grid for
every method, is chosen on valid, and the test split is looked at once: in the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from counterpoise import storage
from counterpoise.cli import say
from counterpoise.config import Experiment, changed_fields, parse_method, parse_set, read_yaml, resolve
from counterpoise.contracts import (
    ConfigError,
    CounterpoiseError,
    Interrupted,
    RefusedError,
    ResourceError,
)
from counterpoise.engine.job import experiment_card
from counterpoise.engine.run import MANIFEST, RunFolder, check_name, redact, safe_name
from counterpoise.methods import METHODS
from counterpoise.reports.html import write_report
from counterpoise.reports.records import FUSED, RunData, read_run
from counterpoise.reports.tables import CHOSEN, Table, best_label, compared, fused_by_seed, text_table
from counterpoise.start import (
    Preview,
    Settings,
    StopRequest,
    check_same_data,
    in_use,
    make_job,
    new_run,
    preview,
    publisher,
    reopened,
    run_jobs,
)
from counterpoise.storage import join
from counterpoise.telemetry.emitter import Options, emitting
from counterpoise.wording import duration, flatten, pretty_json

COMPARISON = "comparison.json"
SEEDS = 5


# --- what is asked


@dataclass(frozen=True)
class Tune:
    """A grid of one setting, the same for every method. values: as given. seeds: those that choose."""

    key: str
    values: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    label: str
    seed: int
    value: str | None  # of the tuned setting
    name: str  # of the run folder


@dataclass(frozen=True)
class Asked:
    """A comparison as it was asked for. experiment: content of the file. methods: labels, e.g. "aug:lam=0.2"."""

    experiment: dict[str, Any]
    source: str
    sets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    tune: Tune | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Asked:
        tune = data["tune"] and Tune(data["tune"]["key"], *(tuple(data["tune"][k]) for k in ("values", "seeds")))
        lists = {key: tuple(data[key]) for key in ("sets", "methods", "seeds")}
        return cls(data["experiment"], data["source"], **lists, tune=tune or None)

    def resolved(
        self, label: str, seed: int | None = None, value: str | None = None
    ) -> tuple[Experiment, dict[str, dict[str, Any]]]:
        """The experiment of a trial, and where its values came from."""
        name, own = parse_method(label)
        sets = [*self.sets, f"method.name={name}", *own]
        if self.tune and value is not None:
            sets.append(f"{self.tune.key}={value}")
        if seed is not None:
            sets.append(f"seed={seed}")
        try:
            return resolve(self.experiment, sets, self.source)
        except ConfigError as error:
            raise ConfigError(f"comparing {label}: {error}") from None

    def trial(self, label: str, seed: int, value: str | None = None) -> Trial:
        parts = [safe_name(label)]
        if self.tune:
            parts.append(safe_name(self.tune.key.rsplit(".", 1)[-1] + (value or "")))
        return Trial(label, seed, value, "-".join([*parts, f"seed{seed}"]))

    @property
    def tuning(self) -> list[Trial]:
        """The trials that choose, seed by seed, so that a comparison that is cut short is even."""
        if self.tune is None:
            return []
        values, seeds = self.tune.values, self.tune.seeds
        return [self.trial(label, seed, value) for seed in seeds for label in self.methods for value in values]

    def remaining(self, chosen: Mapping[str, str | None] | None = None) -> list[Trial]:
        """The trials after tuning, or what is known of them before. Methods that lost every value have none."""
        if self.tune is None:
            return [self.trial(label, seed) for seed in self.seeds for label in self.methods]
        values = dict.fromkeys(self.methods, "-CHOSEN") if chosen is None else chosen
        seeds = [seed for seed in self.seeds if seed not in self.tune.seeds]
        return [
            self.trial(label, seed, value) for seed in seeds for label, value in values.items() if value is not None
        ]


def parse_tune(text: str) -> tuple[str, tuple[str, ...]]:
    """`optim.lr=0.01,0.1` as (key, values as text)."""
    key, _, values = text.partition("=")
    grid = tuple(value.strip() for value in values.split(","))
    if not key.startswith("optim.") or not all(grid):
        raise ConfigError(
            f"--tune {text!r}: give a setting of the optimizer and its values, e.g. optim.lr=0.01,0.03,0.1; "
            "everything else is the same for every method"
        )
    if len({repr(parse_set(f"{key}={value}")[1]) for value in grid}) < max(2, len(grid)):
        raise ConfigError(f"--tune {text!r}: give two values or more, each once")
    return key, grid


def _labels(text: str, experiment: Mapping[str, Any], sets: Sequence[str]) -> list[str]:
    """The methods of --methods; `all` is every method there is, unimodal once per modality."""
    if text != "all":
        return [part.strip() for part in text.split(",") if part.strip()]
    base, _ = resolve(experiment, [*sets, "method.name=joint"])
    modalities = experiment_card(base).select(list(base.modalities) or None)
    found = []
    for name, method in METHODS.items():
        field = method.Config.model_fields.get("modality")
        alone = field is not None and field.is_required()
        found += [f"{name}:modality={m}" for m in modalities] if alone else [name]
    return found


def ask(
    old: Asked | None,
    experiment: str | None,
    sets: Sequence[str],
    seeds: int | None,
    first_seed: int | None,
    tune: str | None,
    tune_seeds: int | None,
) -> Asked:
    """What is asked for, still without methods. old: what --resume goes on with; what is left out is taken from it."""
    for text in sets:
        key = parse_set(text)[0]
        if key.split(".")[0] == "method":
            raise ConfigError(f"--set {text}: settings of one method are given in --methods, e.g. aug:lam=0.2")
        if key == "seed":
            raise ConfigError(f"--set {text}: seeds are given with --seeds and --first-seed")
    if experiment is not None:
        given, source = read_yaml(experiment), experiment
    elif old is not None:
        given, source = old.experiment, old.source
        sets = [*old.sets, *(text for text in sets if text not in old.sets)]
    else:
        raise ConfigError("name an experiment file, e.g. counterpoise compare trainables/experiments/av_digits.yaml")
    first = first_seed if first_seed is not None else old.seeds[0] if old else 0
    all_seeds = tuple(range(first, first + (seeds or (len(old.seeds) if old else SEEDS))))
    grid = old.tune if old else None
    if tune is not None:
        key, values = parse_tune(tune)
        grid = Tune(key, values, grid.seeds if grid else all_seeds[:1])
    if tune_seeds is not None:
        if grid is None:
            raise ConfigError("--tune-seeds needs --tune, e.g. --tune optim.lr=0.01,0.1")
        if tune_seeds > len(all_seeds):
            raise ConfigError(f"--tune-seeds {tune_seeds}: there are only {len(all_seeds)} seeds")
        grid = replace(grid, seeds=all_seeds[:tune_seeds])
    return Asked(json.loads(json.dumps(given, default=str)), source, tuple(sets), (), all_seeds, grid)


def check_extends(old: Asked, new: Asked) -> None:
    """RefusedError unless `new` is `old` with more seeds or methods at most."""
    wrong = []
    if lost := [label for label in old.methods if label not in new.methods]:
        wrong.append(f"methods: without {', '.join(lost)}, which it began with")
    if not set(old.seeds) <= set(new.seeds):
        wrong.append(f"{_span(old.seeds)} -> {_span(new.seeds)}; they can only become more")
    if old.tune != new.tune:
        wrong.append(f"tune: {_tune_text(old.tune)} -> {_tune_text(new.tune)}")
    for label in [label for label in old.methods if label in new.methods]:
        changes = changed_fields(old.resolved(label, 0)[0], new.resolved(label, 0)[0])
        wrong += [f"{key}: {before!r} -> {after!r}" for key, (before, after) in changes.items()]
    if wrong:
        raise RefusedError(
            "this is not the comparison that was started; start another one under a new --name:\n"
            + "\n".join(f"  {line}" for line in dict.fromkeys(wrong))
        )


def _span(seeds: Sequence[int]) -> str:
    """Consecutive seeds in words."""
    return f"seeds {seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def _tune_text(tune: Tune | None) -> str:
    return f"{tune.key}={','.join(tune.values)} on {_span(tune.seeds)}" if tune else "nothing"


# --- the plan


@dataclass(frozen=True)
class Entry:
    """One method, checked: what its runs would be, and where the values come from."""

    seen: Preview
    provenance: dict[str, dict[str, Any]]


def prepare(asked: Asked, labels: Sequence[str], settings: Settings, skip: bool) -> dict[str, Entry]:
    """Check every method before anything starts. skip: leave out those that cannot run on this corpus, saying so."""
    entries: dict[str, Entry] = {}
    skipped: list[ConfigError] = []
    for label in labels:
        try:
            _, own = parse_method(label)
            if asked.tune and any(parse_set(text)[0] == asked.tune.key for text in own):
                raise ConfigError(f"--methods {label} sets {asked.tune.key}, which --tune varies")
            value = asked.tune.values[0] if asked.tune else None
            for other in asked.tune.values[1:] if asked.tune else ():
                asked.resolved(label, value=other)
            experiment, provenance = asked.resolved(label, asked.seeds[0], value)
            seen = preview(experiment, settings)
        except ConfigError as error:
            if not skip:
                raise
            skipped.append(error)
            say(f"left out    {label}: {str(error).splitlines()[-1].strip()}")
            continue
        if asked.tune and not seen.samples["valid"]:
            raise ConfigError(
                f"--tune chooses on the valid split, and corpus {experiment.corpus} has none; carve one on its card"
            )
        if asked.tune and seen.selects_on == "test":
            raise ConfigError(
                f"--tune would choose on test, as protocol {experiment.protocol} selects epochs; "
                "take a protocol that selects on valid"
            )
        for other, entry in entries.items():
            if entry.seen.experiment.digest == experiment.digest:
                raise ConfigError(f"--methods: {other} and {label} are the same experiment")
            if safe_name(other) == safe_name(label):
                raise ConfigError(f"--methods: {other} and {label} would share the folder {safe_name(label)}")
        entries[label] = Entry(seen, provenance)
    if not entries:
        raise skipped[0] if skipped else ConfigError("--methods: name methods, e.g. --methods joint,aug, or all")
    return entries


def plan_lines(asked: Asked, entries: Mapping[str, Entry]) -> list[str]:
    """What would be done: the common budget, a line per method, the number of trials."""
    seen = max((entry.seen for entry in entries.values()), key=lambda seen: len(seen.encoders))
    values = {label: dict(flatten(entry.seen.experiment.to_json())) for label, entry in entries.items()}
    keys = {key for own in values.values() for key in own if not key.startswith(("method.", "seed"))}
    differing = sorted(key for key in keys if len({repr(own.get(key)) for own in values.values()}) > 1)
    width = max(map(len, entries))
    lines = [
        seen.lines()[0],
        seen.lines()[1].split(";")[0],
        f"training    {seen.experiment.epochs} epochs of {seen.batches} batches of up to {seen.experiment.batch_size}, "
        "the same for every method",
        seen.lines()[-1],
    ]
    for label, entry in entries.items():
        own = [k for k, p in entry.provenance.items() if k.startswith("method.") and p["origin"] != "default"]
        shown = [
            f"{k.removeprefix('method.')}={values[label].get(k)}" for k in [*own, *differing] if k != "method.name"
        ]
        lines.append(
            f"method      {label:{width}}  {', '.join(shown) or 'defaults'}; {entry.seen.parameters:,} parameters"
        )
    count = len(asked.tuning) + len(asked.remaining())
    tuned = f", {_tune_text(asked.tune)}" if asked.tune else ""
    return [
        *lines,
        f"trials      {count}: {len(entries)} method{'s' if len(entries) > 1 else ''}, {_span(asked.seeds)}{tuned}",
    ]


# --- training


def pick(accuracies: Mapping[str, Sequence[float | None]]) -> str | None:
    """The value with the best mean valid accuracy over its runs, the first of equals. A failed run (None) loses."""
    means = {value: statistics.fmean(a for a in own if a is not None) for value, own in accuracies.items()
             if own and None not in own}  # fmt: skip
    return max(means, key=lambda value: means[value]) if means else None


@dataclass
class Runner:
    """Trains the trials of a comparison, one after the other."""

    asked: Asked
    entries: Mapping[str, Entry]
    root: str
    stop: StopRequest
    seconds: dict[str, list[float]] = field(default_factory=dict)  # per method, of its finished trials
    count: int = 0  # trials met so far
    opened: bool = False  # the engine

    def run(self) -> tuple[dict[str, str | None], dict[str, dict[str, list[float | None]]]]:
        """The value chosen for every method that is tuned, and the valid accuracies that chose it."""
        asked, tune = self.asked, self.asked.tune
        chosen: dict[str, str | None] = {}
        valid: dict[str, dict[str, list[float | None]]] = {}
        with contextlib.ExitStack() as engine:
            self._train_all(asked.tuning, asked.remaining(), engine)
            for label in asked.methods if tune else ():
                assert tune is not None
                valid[label] = {v: [self._valid(asked.trial(label, s, v)) for s in tune.seeds] for v in tune.values}
                chosen[label] = pick(valid[label])
                say(tuning_note(tune.key, label, chosen[label], valid[label]))
            self._train_all(asked.remaining(chosen), [], engine)
        return chosen, valid

    def _train_all(self, trials: Sequence[Trial], later: Sequence[Trial], engine: contextlib.ExitStack) -> None:
        done = [self._finished(trial) for trial in trials]
        total = self.count + len(trials) + len(later)
        for i, trial in enumerate(trials):
            self.count += 1
            if done[i]:
                continue
            if self.stop.reason:
                self._raise_stopped(
                    f"stopped ({self.stop.reason}) before it began; continue with --resume", total, trial
                )
            waiting = [t.label for t, finished in zip(trials[i:], done[i:], strict=True) if not finished]
            left = self._left([*waiting, *(t.label for t in later)])
            value = f", {self.asked.tune.key} {trial.value}" if self.asked.tune else ""
            say(f"trial {self.count} of {total}: {trial.label} seed {trial.seed}{value}{left}")
            try:
                self._open(engine)
                self._train(trial)
            except Interrupted as error:
                self._raise_stopped(str(error), total, trial, error.exit_code)

    def _open(self, engine: contextlib.ExitStack) -> None:
        """Start Ray once for all trials: inside its block, every trial finds it running."""
        settings = next(iter(self.entries.values())).seen.settings
        if settings.engine == "ray" and not self.opened:
            from counterpoise.launch.cluster import cluster

            tasks = max(2, os.cpu_count() or 1)
            engine.enter_context(cluster(settings.workers, tasks, address=settings.address, verbose=settings.verbose))
        self.opened = True

    def _raise_stopped(self, text: str, total: int, trial: Trial, code: int | None = None) -> None:
        name = self.root.rsplit("/", 1)[-1]
        error = Interrupted(f"trial {self.count} of {total}, {trial.name}: {text} --name {name}")
        error.exit_code = self.stop.exit_code if code is None else code
        raise error from None

    def _left(self, labels: Sequence[str]) -> str:
        """An estimate from the trials that are done: of the same method, else of any."""
        known = [s for own in self.seconds.values() for s in own]
        if not known:
            return ""
        return f", about {duration(sum(statistics.fmean(self.seconds.get(label) or known) for label in labels))} left"

    def _preview(self, trial: Trial) -> tuple[Preview, dict[str, dict[str, Any]]]:
        experiment, provenance = self.asked.resolved(trial.label, trial.seed, trial.value)
        return replace(self.entries[trial.label].seen, experiment=experiment), provenance

    def _finished(self, trial: Trial) -> bool:
        """Whether the trial has been done before; RefusedError if its folder holds something else."""
        uri = join(self.root, trial.name)
        if not storage.exists(join(uri, MANIFEST)):
            return False
        folder, (seen, _) = RunFolder.open(uri), self._preview(trial)
        if (before := folder.manifest.get("digest")) != seen.experiment.digest:
            raise RefusedError(
                f"{storage.show(uri)} was started from another experiment (digest {before}, now "
                f"{seen.experiment.digest}); start the comparison under a new --name"
            )
        check_same_data(folder, seen)
        if folder.state() != "finished":
            return False
        self.seconds.setdefault(trial.label, []).append(float(folder.read_json("summary.json")["wall_s"]))
        return True

    def _train(self, trial: Trial) -> None:
        """Train one trial, or go on with it. If it fails, its folder says why and the next one may start."""
        seen, provenance = self._preview(trial)
        uri = join(self.root, trial.name)
        begun = storage.exists(join(uri, MANIFEST))
        folder = RunFolder.open(uri) if begun else new_run(seen, provenance, self.root, trial.name, sys.argv[1:])
        began = time.monotonic()
        try:
            run_jobs([make_job(seen, folder, begun)], seen.settings, stop=self.stop)
        except (Interrupted, RefusedError, ResourceError):  # the last two would meet the next trial too
            raise
        except Exception as error:
            text = str(error) if isinstance(error, CounterpoiseError) else f"{type(error).__name__}: {error}"
            say(f"{trial.name}: {text}; going on with the next")
            if folder.state() != "failed":
                with contextlib.suppress(CounterpoiseError, OSError), folder:
                    folder.write_status({"state": "failed", "error": text}, force=True)
            return
        self.seconds.setdefault(trial.label, []).append(time.monotonic() - began)

    def _valid(self, trial: Trial) -> float | None:
        """Fused accuracy on valid at the selected epoch; None if the trial failed."""
        summary = read_run(join(self.root, trial.name)).summary or {}
        return summary.get("valid", {}).get("accuracy", {}).get(FUSED)


# --- what came out


def tuning_note(key: str, label: str, value: str | None, valid: Mapping[str, Sequence[float | None]]) -> str:
    """Which value was chosen for a method, and from which accuracies."""
    means = {v: None if None in own else statistics.fmean(a for a in own if a is not None) for v, own in valid.items()}
    seen = ", ".join(f"{v} {'failed' if mean is None else f'{mean:.3f}'}" for v, mean in means.items())
    what = f"{key} {value} chosen" if value is not None else f"no {key} could be trained, left out"
    return f"{label}: {what}; mean fused accuracy on valid: {seen}."


def tabulate(
    asked: Asked,
    root: str,
    chosen: Mapping[str, str | None],
    valid: Mapping[str, Mapping[str, Sequence[float | None]]],
) -> tuple[Table, str]:
    """The table of a comparison, and the method that the others are compared to."""
    groups: dict[str, list[RunData]] = {}
    for label in asked.methods:
        value = chosen.get(label)
        trials = [asked.trial(label, seed, value) for seed in asked.seeds]
        if asked.tune and value is None:
            trials = [trial for trial in asked.tuning if trial.label == label]
        groups[label] = [read_run(join(root, trial.name)) for trial in trials]
    names = {label: parse_method(label)[0] for label in asked.methods}
    reference = next((label for label in ("joint", *asked.methods) if label in names and names[label] == "joint"),
                     asked.methods[0])  # fmt: skip
    key = asked.tune.key if asked.tune else ""
    notes = [tuning_note(key, label, chosen[label], own) for label, own in valid.items()]
    if asked.tune:
        notes.append(f"Chosen on valid alone, with {_span(asked.tune.seeds)}.")
        if any(run.summary and not run.summary.get("test") for group in groups.values() for run in group):
            notes.append("The corpus has no test split: values were chosen by the numbers that are shown.")
    shown = {label: value for label, value in chosen.items() if value is not None}
    return compared(groups, reference, tuned=key, chosen=shown, remarks=notes), reference


def result_json(
    asked: Asked,
    table: Table,
    reference: str,
    valid: Mapping[str, Mapping[str, Sequence[float | None]]],
) -> dict[str, Any]:
    """The result for machines: accuracies in 0..1, p corrected by Holm, times as ratios to the reference."""
    rows = []
    for row in table.rows:
        numbers: dict[str, Any] = {}
        for key in table.columns:
            cell = row.cells[key]
            if key == CHOSEN:
                numbers[key] = cell.text or None
            else:
                several = key == FUSED or key.startswith("accuracy/") or key in ("gap", "difference")
                numbers[key] = {"mean": cell.mean, "std": cell.std} if several else cell.mean
        failed = {run.name: run.status.get("error") for run in row.others}
        rows.append(
            {"label": row.label, "method": parse_method(row.label)[0], "n": len(row.finished), "split": row.split}
            | numbers
            | {
                "fused_by_seed": {str(k): v for k, v in fused_by_seed(row.finished).items()},
                "runs": row.runs,
                "failed": failed,
            }
            | ({"tuning": valid[row.label]} if row.label in valid else {})
        )
    best = best_label({row.label: fused_by_seed(row.finished) for row in table.rows})
    tune = asdict(asked.tune) if asked.tune else None
    return {"reference": reference, "best": best, "tune": tune, "methods": rows, "notes": table.notes}


def compare(
    *,
    experiment: str | None,
    methods: str | None,
    settings: Settings,
    runs: str,
    name: str | None,
    sets: Sequence[str] = (),
    seeds: int | None = None,
    first_seed: int | None = None,
    tune: str | None = None,
    tune_seeds: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    out: str | None = None,
    as_json: bool = False,
    metrics: Options | None = None,
) -> bool:
    """Check, train what is not there yet, print and write the results; whether every run of the table is finished.

    Raises ConfigError for what cannot be compared, RefusedError for a name in use or a changed comparison, and
    Interrupted when stopped; the running trial has written a checkpoint then.
    """
    old = None
    saved: dict[str, Any] = {}
    if name is not None:
        check_name(name)
    if resume:
        if name is None:
            raise ConfigError("--resume needs the --name of the comparison to continue")
        old, saved = _reopen(runs, name)
    elif name is not None and storage.list_names(join(runs, name)):
        raise in_use(runs, name)
    asked = ask(old, experiment, sets, seeds, first_seed, tune, tune_seeds)
    if methods is None and old is None:
        raise ConfigError(f"--methods: name what to compare, e.g. joint,aug, or all (known: {', '.join(METHODS)})")
    labels = list(old.methods) if old and methods is None else _labels(methods or "", asked.experiment, asked.sets)
    entries = prepare(asked, labels, settings, skip=methods == "all")
    asked = replace(asked, methods=tuple(entries))
    if old:
        check_extends(old, asked)
    for line in plan_lines(asked, entries):
        say(line)
    if dry_run:
        listed = [t.name for t in (*asked.tuning, *asked.remaining())]
        say("\n".join(f"  {trial}" for trial in listed))
        say("dry run: everything that could be checked is in order; nothing was started")
        if as_json:
            print(json.dumps({"asked": asdict(asked), "trials": listed}, indent=2))
        return True

    corpus = Path(next(iter(entries.values())).seen.experiment.corpus.rstrip("/")).stem
    name = name or f"{corpus}-compare-{datetime.now():%Y%m%d-%H%M%S}"
    root = join(runs, name)
    content = {
        "format": 1,
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
    }
    content = redact({**content, **saved, "asked": asdict(asked), "result": None})
    if old is None:
        if not storage.write_new(join(root, COMPARISON), pretty_json(content)):
            raise in_use(runs, name)
    elif old != asked:
        storage.write_bytes(join(root, COMPARISON), pretty_json(content))
    say(f"comparison  {storage.show(root)}")

    with emitting(metrics, runs, name, publish=publisher(settings)):
        with StopRequest().installed() as stop:
            chosen, valid = Runner(asked, entries, root, stop).run()
        table, reference = tabulate(asked, root, chosen, valid)
        content["result"] = result_json(asked, table, reference, valid)
        storage.write_bytes(join(root, COMPARISON), pretty_json(content))
        say()
        print(json.dumps(content, indent=2) if as_json else text_table(table))
        if out or storage.is_local(runs):
            uris = [run.uri for row in table.rows for run in (*row.finished, *row.others)]
            say(f"report in {write_report(uris, out or join(root, 'report.html'), table=table)}")
    return not any(row.others or len(row.finished) < len(asked.seeds) for row in table.rows)


def _reopen(runs: str, name: str) -> tuple[Asked, dict[str, Any]]:
    return reopened(join(runs, name), COMPARISON, "comparison", Asked.from_json)
