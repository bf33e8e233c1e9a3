"""SWEEP.yaml: what is varied or searched, with which seeds, scheduler and resources, and the trials this makes."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from counterpoise import storage
from counterpoise.config import Experiment, explain, parse_method, parse_set, read_yaml, resolve
from counterpoise.contracts import ConfigError
from counterpoise.data.plan import generator
from counterpoise.engine.run import safe_name
from counterpoise.wording import did_you_mean, flatten

MOST_TRIALS = 10_000
WEAK = "{weak}"  # in a sweep file, the name of the modality that joint training leaves behind
DIGITS = 4  # of numbers that are drawn: what can be read can be written again


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Domain(_Section):
    """What one value may be: exactly one of these."""

    uniform: tuple[float, float] | None = Field(None, description="least and largest")
    log_uniform: tuple[float, float] | None = Field(None, description="least and largest, both above 0")
    integers: tuple[int, int] | None = Field(None, description="least and largest, both included")
    choice: list[Any] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> Domain:
        if len(self.to_json()) != 1:
            raise ValueError("give one of uniform, log_uniform, integers, choice, e.g. {log_uniform: [1e-3, 0.1]}")
        [(kind, values)] = self.to_json().items()
        if kind != "choice" and values[0] >= values[1]:
            raise ValueError(f"{kind} {list(values)}: the first number has to be smaller than the second")
        if kind == "log_uniform" and values[0] <= 0:
            raise ValueError(f"log_uniform {list(values)}: both numbers have to be above 0")
        return self

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in self.model_dump(mode="json").items() if value is not None}

    def draw(self, rng: np.random.Generator) -> Any:
        [(kind, values)] = self.to_json().items()
        if kind == "choice":
            return values[int(rng.integers(len(values)))]
        low, high = values
        if kind == "integers":
            return int(rng.integers(low, high + 1))
        if kind == "uniform":
            return readable(rng.uniform(low, high), low, high)
        return readable(math.exp(rng.uniform(math.log(low), math.log(high))), low, high)

    def near(self, value: Any, rng: np.random.Generator, factors: Sequence[float]) -> Any:
        """A value beside this one: times one of the factors within the bounds, or the next of a choice."""
        [(kind, values)] = self.to_json().items()
        if kind == "choice":
            at = values.index(value) + int(rng.choice([-1, 1])) if value in values else 0
            return values[min(max(at, 0), len(values) - 1)]
        low, high = values
        moved = float(value) * float(rng.choice(list(factors)))
        return int(min(max(round(moved), low), high)) if kind == "integers" else readable(moved, low, high)


def readable(value: float, low: float, high: float) -> float:
    """The number with a few digits, within its bounds."""
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


class Search(_Section):
    """Where points come from. random and optuna try `trials` points of `space` for every combination of `vary`."""

    name: Literal["grid", "random", "optuna"] = "grid"
    trials: int | None = Field(None, gt=0, description="random, optuna: points")
    space: dict[str, Domain] = Field({}, description="random, optuna: key -> what it may be")
    seed: int = Field(0, ge=0, description="random, optuna: of the drawing")
    batch: int = Field(
        4, gt=0, description="optuna: points that are asked for at a time; the next wait for all of them"
    )

    @model_validator(mode="after")
    def _fits(self) -> Search:
        if self.name == "grid" and (self.trials is not None or self.space):
            raise ValueError("a grid has no trials and no space; give its values under vary, or search: {name: random}")
        if self.name != "grid" and (self.trials is None or not self.space):
            raise ValueError(
                f"search {self.name} needs trials and space, e.g. "
                f"{{name: {self.name}, trials: 20, space: {{optim.lr: {{log_uniform: [1e-3, 0.1]}}}}}}"
            )
        return self


class NoScheduler(_Section):
    name: Literal["none"] = "none"


class Asha(_Section):
    """Asynchronous successive halving: at epochs grace, grace * factor, ... only the best 1 / factor go on."""

    name: Literal["asha"] = "asha"
    grace: int = Field(1, gt=0, description="epochs that every trial gets")
    factor: float = Field(4, gt=1, description="one of so many goes on")


class Median(_Section):
    """A trial ends when its best epoch so far is below the median of what the others had on average."""

    name: Literal["median"] = "median"
    grace: int = Field(1, gt=0, description="epochs that every trial gets")
    least: int = Field(3, gt=0, description="other trials that must have got as far")


class Pbt(_Section):
    """Population-based training: every `interval` epochs the worst go on from the best, with values changed."""

    name: Literal["pbt"] = "pbt"
    interval: int = Field(gt=0, description="epochs between rounds")
    mutate: dict[str, Domain] = Field(min_length=1, description="key -> what it may be")
    quantile: float = Field(0.25, gt=0, le=0.5, description="part of the trials that is replaced, and that replaces")
    resample: float = Field(0.25, ge=0, le=1, description="probability that a value is drawn anew")
    factors: tuple[float, ...] = Field((0.8, 1.2), min_length=1, description="else it is multiplied by one of these")
    seed: int = Field(0, ge=0)

    @field_validator("mutate")
    @classmethod
    def _may(cls, value: dict[str, Domain]) -> dict[str, Domain]:
        fixed = [key for key in value if key not in MUTABLE and (not key.startswith("method.") or key == "method.name")]
        if fixed:
            raise ValueError(
                f"{', '.join(fixed)} cannot change within a run; what can: {', '.join(MUTABLE)}, settings of the method"
            )
        return value


MUTABLE = ("optim.lr", "optim.momentum", "optim.weight_decay")
SCHEDULERS: dict[str, type[_Section]] = {"none": NoScheduler, "asha": Asha, "median": Median, "pbt": Pbt}


class Resources(_Section):
    """Of one trial. A worker has as many torch threads as it has CPUs."""

    workers: int = Field(1, gt=0, description="processes that share every batch of a trial")
    cpus: float = Field(1, gt=0, description="per worker")
    gpus: float = Field(0, ge=0, description="per worker; a part of one, such as 0.5, shares it")

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


class Sweep(_Section):
    """A sweep as it is asked for."""

    experiment: str | None = Field(None, description="experiment file that is varied, relative to this file")
    title: str = Field("", description="shown on the report")
    vary: dict[str, list[Any]] = Field({}, description="key -> values; all combinations. `method` takes aug:lam=0.2")
    search: Search = Search()
    seeds: list[int] = Field([0], min_length=1)
    scheduler: Any = NoScheduler()
    resources: Resources = Resources()
    report: dict[str, Any] = Field({}, description="for the report of this sweep")

    @field_validator("scheduler", mode="before")
    @classmethod
    def _scheduler(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, _Section):
            return value
        name = value.get("name") if isinstance(value, dict) else None
        if name not in SCHEDULERS:
            known = ", ".join(SCHEDULERS)
            raise ValueError(f"unknown scheduler {name!r}{did_you_mean(name, SCHEDULERS)} (known: {known})")
        return SCHEDULERS[name](**value)

    @field_validator("vary", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        for key, values in value.items() if isinstance(value, dict) else ():
            if not isinstance(values, list) or not values:
                raise ValueError(
                    f"{key}: give a list of values, e.g. [{values if values not in ([], None) else '...'}]"
                )
            if len({json.dumps(v, sort_keys=True, default=str) for v in values}) < len(values):
                raise ValueError(f"{key}: give every value once")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("give every seed once, and none below 0")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Sweep:
        for key in (*self.vary, *self.search.space):
            if key == "seed":
                raise ValueError("seeds are given under seeds")
            if key == "method.name":
                raise ValueError("vary method instead of method.name; it takes settings too: aug:lam=0.2")
        if both := sorted(set(self.vary) & set(self.search.space)):
            raise ValueError(f"{', '.join(both)}: either under vary or under search.space")
        if isinstance(self.scheduler, Pbt) and self.search.name == "optuna":
            raise ValueError("pbt changes values itself; take search grid or random for the first ones")
        return self

    def to_json(self) -> dict[str, Any]:
        found = self.model_dump(mode="json")
        found["scheduler"] = self.scheduler.model_dump(mode="json")
        found["search"]["space"] = {key: domain.to_json() for key, domain in self.search.space.items()}
        if isinstance(self.scheduler, Pbt):
            found["scheduler"]["mutate"] = {key: domain.to_json() for key, domain in self.scheduler.mutate.items()}
        return found

    @property
    def decides(self) -> str | None:
        """What looks at accuracies while the sweep goes on; None for a plain grid or random points."""
        if not isinstance(self.scheduler, NoScheduler):
            return f"scheduler {self.scheduler.name}"
        return "search optuna" if self.search.name == "optuna" else None


def read_sweep(data: Mapping[str, Any], source: str) -> Sweep:
    """A sweep from the content of its file; ConfigError with a line for every problem."""
    tree = {str(key): value for key, value in data.items()}
    try:
        return Sweep(**tree)
    except ValidationError as error:
        origins = dict.fromkeys((key for key, _ in flatten(tree)), f"file {Path(source).name}")
        raise ConfigError(explain(error, source, tree, origins, known=_known_keys)) from None


def _known_keys(location: Sequence[str], tree: Mapping[str, Any]) -> list[str]:
    """The keys allowed at `location` of a sweep; empty where any may stand."""
    model: Any = Sweep
    for part in location:
        if part == "scheduler":
            given = tree["scheduler"]
            model = SCHEDULERS[given if isinstance(given, str) else given["name"]]
        elif part in ("space", "mutate"):
            model = dict
        elif model is dict:
            model = Domain
        else:
            model = model.model_fields[part].annotation if part in getattr(model, "model_fields", ()) else None
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


# --- the experiment that is varied


@dataclass(frozen=True)
class Asked:
    """A sweep with everything that makes its trials. experiment: content of the file that is varied."""

    sweep: Sweep
    source: str
    experiment: dict[str, Any]
    sets: tuple[str, ...] = ()
    name: str = "sweep"

    def to_json(self) -> dict[str, Any]:
        return {
            "sweep": self.sweep.to_json(),
            "source": self.source,
            "experiment": self.experiment,
            "sets": list(self.sets),
            "name": self.name,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Asked:
        sweep = read_sweep(data["sweep"], "sweep.json")
        return cls(sweep, data["source"], data["experiment"], tuple(data["sets"]), data["name"])

    def resolved(self, vary: Mapping[str, Any], seed: int) -> tuple[Experiment, dict[str, dict[str, Any]]]:
        """The experiment of a trial, and where its values came from."""
        sets = list(self.sets)
        own: list[str] = []
        method = vary.get("method")
        if isinstance(method, str):
            name, own = parse_method(method, "method")
            sets += [f"method.name={name}", *own]
        for key, value in vary.items():
            if key == "method" and isinstance(method, str):
                continue
            if any(parse_set(text)[0] == key for text in own):
                raise ConfigError(f"method {method} sets {key}, which is varied too")
            sets.append(f"{key}={json.dumps(value)}")
        try:
            return resolve(self.experiment, [*sets, f"seed={seed}"], self.source)
        except ConfigError as error:
            raise ConfigError(f"{label_of(vary) or 'the experiment'}: {error}") from None


def ask(
    path: str,
    corpus: str | None,
    sets: Sequence[str],
    workers: int | None,
    seeds: Sequence[int] | None,
    weak: str | None = None,
) -> Asked:
    """What a sweep file asks for, with what the command line changes.

    corpus: in place of the experiment of the file: NAME.yaml beside it, or that experiment on a prepared corpus with
    the usual encoder of every modality.
    weak: the modality that {weak} stands for; default: the one that the card of the corpus names.
    """
    tree = read_yaml(path)
    sweep = read_sweep(tree, path)
    if sweep.experiment is None and corpus is None:
        raise ConfigError(f"{path}: name the experiment that is varied, e.g. experiment: ../av_digits.yaml")
    base = Path(os.path.normpath(Path(path).parent / (sweep.experiment or f"../{corpus}.yaml")))
    if corpus is None:
        content, source = read_yaml(base), str(base)
    else:
        content, source = _on_corpus(base, corpus)
    if weak is not None or any(WEAK in text for text in _texts(tree)):
        places = sweep.vary.get("corpus")
        choices = [[*sets, f"corpus={json.dumps(place)}"] for place in places] if places else [sets]
        names = {_weak(weak, tree, path, content, chosen, source) for chosen in choices}
        if len(names) > 1:
            raise ConfigError(
                f"{path} varies corpus, and {WEAK} would be {' or '.join(sorted(names))}; give one corpus at a time"
            )
        sweep = read_sweep(_filled(tree, names.pop(), path), path)
    for text in sets:
        key = parse_set(text)[0]
        if key == "seed":
            raise ConfigError(f"--set {text}: seeds are given under seeds of the sweep")
        if key in sweep.vary or key in sweep.search.space:
            raise ConfigError(f"--set {text}: the sweep varies {key}; change it in {path}")
    if workers is not None:
        sweep = sweep.model_copy(update={"resources": sweep.resources.model_copy(update={"workers": workers})})
    if seeds is not None:
        sweep = sweep.model_copy(update={"seeds": list(seeds)})
    stem = Path(path).stem + (f"-{Path(corpus.rstrip('/')).stem}" if corpus else "")
    return Asked(sweep, source, json.loads(json.dumps(content, default=str)), tuple(sets), safe_name(stem))


def _on_corpus(base: Path, corpus: str) -> tuple[dict[str, Any], str]:
    """The experiment of another corpus, or this one on it."""
    from counterpoise.data.card import load_card

    own = base.parent / f"{corpus}.yaml"
    if "/" not in corpus and own.is_file():
        return read_yaml(own), str(own)
    load_card(corpus)  # says what is prepared, if this is not
    if not base.is_file():
        return {"corpus": corpus, "method": "joint"}, corpus
    content = read_yaml(base)
    dropped = ("modalities", "protocol", "preprocess")  # they are about the other corpus
    return {key: value for key, value in content.items() if key not in dropped} | {"corpus": corpus}, str(base)


def _weak(
    given: str | None, tree: Mapping[str, Any], path: str, content: Mapping[str, Any], sets: Sequence[str], source: str
) -> str:
    """The modality of the experiment that {weak} stands for: the one given, else the one its card names."""
    from counterpoise.data.recipes import card_of

    about = ("corpus", "modalities")
    own = {key: value for key, value in content.items() if key in about} | {"method": "joint"}
    experiment, _ = resolve(own, [text for text in sets if parse_set(text)[0].split(".")[0] in about], source)
    card = card_of(experiment.corpus)
    names = list(card.select(list(experiment.modalities) or None))
    if given is not None and given not in names:
        raise ConfigError(
            f"--weak is {given!r}{did_you_mean(given, names)}; modalities of corpus {card.name} that are trained: "
            f"{', '.join(names)}"
        )
    if given is None and card.weak not in names:
        said = "does not say which one is weak" if card.weak is None else f"says {card.weak}, which is not trained"
        where = dict.fromkeys(repr(text) for text in _texts(tree) if WEAK in text)
        raise ConfigError(
            f"{path} names the weak modality in {', '.join(where)}, and the card of corpus {card.name} {said}; give "
            f"--weak NAME, or write weak: NAME into {storage.show(card.location)} (one of: {', '.join(names)})"
        )
    return str(given or card.weak)


def _texts(tree: Any) -> Iterator[str]:
    """Every text of a file, keys included."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list):
        for part in itertools.chain.from_iterable(tree.items()) if isinstance(tree, Mapping) else tree:
            yield from _texts(part)


def _filled(tree: Any, weak: str, path: str) -> Any:
    """The content of a file with {weak} replaced in every text."""
    if isinstance(tree, str):
        return tree.replace(WEAK, weak)
    if isinstance(tree, list):
        return [_filled(part, weak, path) for part in tree]
    if not isinstance(tree, Mapping):
        return tree
    found: dict[Any, Any] = {}
    for key, value in tree.items():
        if (new := _filled(key, weak, path)) in found:
            raise ConfigError(f"{path}: {WEAK} is {weak} here, and {new!r} is then given twice")
        found[new] = _filled(value, weak, path)
    return found


# --- trials


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. vary: the values it has, by key. point: number of the values, equal for all seeds."""

    name: str
    vary: dict[str, Any]
    seed: int
    point: int

    @property
    def label(self) -> str:
        return label_of(self.vary)


def label_of(vary: Mapping[str, Any]) -> str:
    """The values in words, the method first."""
    own = [str(vary["method"])] if isinstance(vary.get("method"), str) else []
    return ", ".join([*own, *(f"{k}={show(v)}" for k, v in vary.items() if not (own and k == "method"))])


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    return value if isinstance(value, str) else json.dumps(value)


def combinations(vary: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last key fastest."""
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def trials_of(sweep: Sweep, combination: Mapping[str, Any], number: int, drawn: Mapping[str, Any]) -> list[Trial]:
    """The trials of one point, one per seed. number: of the point; drawn: what a search found for it."""
    parts = [combination["method"]] if isinstance(combination.get("method"), str) else []
    keys = [key for key in combination if not (parts and key == "method")]
    short = {key: key.rsplit(".", 1)[-1] for key in keys}
    if len(set(short.values())) < len(short):
        short = {key: key for key in keys}
    parts += [f"{short[key]}{show(combination[key])}" for key in keys]
    parts += [f"p{number:03d}"] if drawn else []
    name = safe_name("-".join(parts)) or "run"
    return [Trial(f"{name}-seed{seed}", {**combination, **drawn}, seed, number) for seed in sweep.seeds]


def plan(sweep: Sweep) -> list[Trial]:
    """All trials of a grid or of random points, seed by seed, so that a sweep that is cut short is even.

    Random points depend on the seed of the search and their number alone, and are the same for every combination.
    """
    points = []
    for index, combination in enumerate(combinations(sweep.vary)):
        if sweep.search.name == "grid":
            points.append(trials_of(sweep, combination, index, {}))
            continue
        for number in range(sweep.search.trials or 0):
            rng = generator("sweep", sweep.search.seed, number)
            drawn = {key: domain.draw(rng) for key, domain in sweep.search.space.items()}
            points.append(trials_of(sweep, combination, number, drawn))
    if len(points) * len(sweep.seeds) > MOST_TRIALS:
        raise ConfigError(f"{len(points) * len(sweep.seeds):,} trials; a sweep has {MOST_TRIALS:,} at most")
    found = [trials[i] for i in range(len(sweep.seeds)) for trials in points]
    return [replace(trial, name=name) for trial, name in zip(found, _unique([t.name for t in found]), strict=True)]


def _unique(names: Sequence[str]) -> list[str]:
    """Names that differ, also where the characters they differ in cannot be in a file name."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        head, _, seed = name.rpartition("-")
        found.append(name if seen[name] == 1 else f"{head}-{seen[name]}-{seed}")
    return found
