"""Experiments: what is trained, on what, how long. Read from YAML, changed by --set, validated, given a digest.

Nothing here says where it runs: workers, devices and folders are flags of the command, and change no number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from counterpoise import plain
from counterpoise.contracts import ConfigError, RefusedError
from counterpoise.data.options import DataOptions
from counterpoise.methods import METHODS, Method, MethodConfig
from counterpoise.models.compute import Compute
from counterpoise.models.encoders import ENCODERS, EncoderConfig
from counterpoise.wording import did_you_mean, flatten, shortened

# Fields that say how fast, never what: they are no part of the digest and may differ on resume.
HARMLESS = ("track", "data.cache", "data.cache_limit_gib", "data.decode_threads", "data.prefetch")
# Fields that a resumed run may change when --allow-change names them; any other change is another run.
CHANGEABLE = ("epochs", "optim.lr", "optim.schedule", "optim.weight_decay", "select", "data.bad_samples", "compute")
# Fields that came later: saved, and in the digest, once they are set, so that older runs keep theirs.
LATER = ("protocol", "preprocess", "compute")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Schedule(_Section):
    """The learning rate over epochs, a pure function of the epoch."""

    name: Literal["constant", "step", "cosine"] = Field("constant", description="shape of the decay")
    every: int = Field(70, gt=0, description="step: epochs between decays (released AUG code: 70)")
    factor: float = Field(0.1, gt=0, le=1, description="step: factor of each decay")
    warmup: int = Field(0, ge=0, description="epochs of linear warm-up before the schedule")


class Optim(_Section):
    """The optimizer. Defaults are those of the released audio-visual code."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.01, gt=0, description="learning rate of the first epoch after warm-up")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adam and adamw only")
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Schedule = Schedule()
    legacy_zero_grad_step: bool = Field(
        False,
        description="leave zero gradients instead of none, as torch 1.11 did: parameters of other modalities then "
        "keep moving by momentum and decay in every modality's step (to study released numbers)",
    )


class Experiment(_Section):
    """One run, resolved. The digest of this object names what was trained."""

    corpus: str = Field(description="name of a prepared corpus, or path or URI of a card")
    modalities: dict[str, EncoderConfig] = Field(
        {},
        description="encoder per modality; empty: every modality of the card with the usual encoder of its kind",
    )
    protocol: str | None = Field(
        None,
        description="name on the card, such as valid-v1: splits, preprocessing, what selects the epoch; null: the card",
    )
    preprocess: dict[str, dict[str, Any]] = Field(
        {}, description="per modality, preprocessing that differs from card and protocol, e.g. {audio: {seconds: 3}}"
    )
    method: Any = Field(description="name and settings of the method")
    optim: Optim = Optim()
    batch_size: int = Field(64, gt=0, description="samples per update, over all workers together")
    epochs: int = Field(20, gt=0)
    seed: int = Field(0, ge=0)
    batch_norm: Literal["sync", "local"] = Field(
        "sync",
        description="statistics of the global batch (any number of workers gives the same), or of each worker",
    )
    select: Literal["best_valid", "last"] = Field(
        "best_valid",
        description="the epoch that is tested: best fused accuracy on valid (the first of equals), or the last",
    )
    compute: Compute = Compute()
    data: DataOptions = DataOptions()
    track: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (), description="trackers that are told about the run, as with --track"
    )

    @field_validator("modalities", mode="before")
    @classmethod
    def _encoders(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("give a mapping from modality to encoder, e.g. {audio: resnet18, visual: cnn}")
        if not isinstance(value, dict):
            return value
        encoders = {m: {"name": e} if isinstance(e, str) else e for m, e in value.items()}
        for encoder in encoders.values():
            name = encoder.get("name") if isinstance(encoder, dict) else getattr(encoder, "name", None)
            if isinstance(name, str) and name not in ENCODERS:
                raise ValueError(_unknown("encoder", name, ENCODERS))
        return encoders

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        if isinstance(value, MethodConfig):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or "name" not in value:
            raise ValueError("give a name and settings, e.g. {name: aug, lam: 0.5}")
        kind = known_method(str(value["name"]))
        return kind.Config(**{k: v for k, v in value.items() if k != "name"})

    @field_serializer("method")
    def _method_out(self, value: MethodConfig) -> dict[str, Any]:
        return {"name": self.method_name, **value.model_dump(mode="json")}

    @model_validator(mode="after")
    def _enough(self) -> Experiment:
        if self.modalities and len(self.modalities) < METHODS[self.method_name].min_modalities:
            raise ValueError(f"method {self.method_name} needs at least two modalities")
        return self

    @property
    def method_name(self) -> str:
        return next(name for name, method in METHODS.items() if method.Config is type(self.method))

    def to_json(self) -> dict[str, Any]:
        data = self.model_dump(mode="json")
        return {key: value for key, value in data.items() if value or key not in LATER}

    @property
    def digest(self) -> str:
        """16 hex digits over every resolved value."""
        return _digest(self._significant())

    @property
    def group(self) -> str:
        """The digest without the seed: runs that may be averaged share it."""
        return _digest(self._significant() | {"seed": None})

    def _significant(self) -> dict[str, Any]:
        data = self.to_json()
        for key in HARMLESS:
            *sections, field = key.split(".")
            place = data
            for section in sections:
                place = place[section]
            del place[field]
        return data


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def known_method(name: str) -> type[Method[Any]]:
    """The method of that name; ConfigError, with the nearest name, if there is none."""
    if name not in METHODS:
        raise ConfigError(_unknown("method", name, METHODS))
    return METHODS[name]


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    return f"unknown {what} {shortened(repr(name))}{did_you_mean(name, known)} (known: {', '.join(sorted(known))})"


# --- reading


def parse_set(text: str) -> tuple[str, Any]:
    """`a.b=value` as (key, value); the value is YAML, so numbers, lists and mappings work."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {text!r}: write it as key=value, e.g. --set optim.lr=0.05")
    try:
        parsed = plain.read_yaml(value)
    except plain.NotPlain as error:
        raise ConfigError(f"--set {text[:200]!r}: the value is not valid YAML ({error})") from None
    if isinstance(parsed, str) and parsed == value.strip():  # YAML 1.1 takes 1e-3 for a word; quoted words stay
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    return key.strip(), parsed


def parse_method(text: str, where: str = "--methods") -> tuple[str, list[str]]:
    """A method with settings as (name, what it sets): "aug:lam=0.2:optim.lr=0.1" sets method.lam and optim.lr."""
    name, *settings = text.split(":")
    known_method(name)
    sets = []
    for setting in settings:
        try:
            key, _ = parse_set(setting)
        except ConfigError:
            raise ConfigError(f"{where} {text}: write settings as name:key=value:key=value, e.g. aug:lam=0.2") from None
        section = key.split(".")[0]
        if "." in key and section in Experiment.model_fields and section != "optim":
            raise ConfigError(f"{where} {text}: {key} is the same for every method; change it with --set {setting}")
        sets.append(setting if key.startswith("optim.") else f"method.{setting}")
    return name, sets


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a mapping; plain data only."""
    file = Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else None
        near = get_close_matches(file.name, [p.name for p in folder.glob("*.y*ml")], 1) if folder else []
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise ConfigError(f"no experiment file {str(path)!r}{hint}")
    if file.stat().st_size > plain.MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {plain.MAX_YAML_BYTES:,} bytes, this is no experiment")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text, this is no experiment") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        data = plain.read_yaml(text)
    except plain.NotPlain as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: an experiment is a mapping of keys to values")
    return data


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    for part in parts[:-1]:
        below = tree.get(part)
        if isinstance(below, str):  # the short form {audio: cnn} opened up by audio.width=64
            below = {"name": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {_one_line(key)}: {part!r} is a single value and has no settings below it")
        tree[part] = below = dict(below)
        tree = below
    if isinstance(value, str) and isinstance(tree.get(parts[-1]), dict) and "name" in tree[parts[-1]]:
        value = {"name": value}  # method=joint drops the settings of the old method, it does not inherit them
    tree[parts[-1]] = value


def _plain(value: Any) -> Any:
    """What JSON can hold: keys are words, dates and the like are text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int) and value.bit_length() > 63:  # nothing here takes it, and 4300 digits cannot be printed
        return f"an integer of {value.bit_length():,} bits"
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def resolve(
    data: Mapping[str, Any], sets: Sequence[str] = (), source: str = "experiment"
) -> tuple[Experiment, dict[str, dict[str, Any]]]:
    """The experiment that a file and --set values make, and where each value came from.

    Provenance: {dotted key: {"value": ..., "origin": "default" | "file NAME" | "command line"}}.
    """
    tree: dict[str, Any] = _plain(data)
    origins: dict[str, str] = {key: f"file {Path(source).name}" for key, _ in flatten(tree)}
    for text in sets:
        key, value = parse_set(text)
        value = _plain(value)
        if key == "method.name" and isinstance(tree.get("method"), dict) and tree["method"].get("name") != value:
            _put(tree, "method", {"name": value})
            origins = {k: o for k, o in origins.items() if not k.startswith("method.")}
        _put(tree, key, value)
        origins = {k: o for k, o in origins.items() if k != key and not k.startswith(f"{key}.")}
        origins.update(dict.fromkeys((k for k, _ in flatten({key: value})), "command line"))
    if len(json.dumps(tree)) > plain.MAX_YAML_BYTES // 2:  # what is saved with a run has to be readable again
        raise ConfigError(f"{source}: longer than {plain.MAX_YAML_BYTES // 2:,} characters, this is no experiment")
    try:
        experiment = Experiment(**tree)
    except ValidationError as error:
        raise ConfigError(explain(error, source, tree, origins)) from None
    provenance = {}
    for key, value in flatten(experiment.to_json()):
        origin = next((origins[k] for k in (key, key.removesuffix(".name")) if k in origins), "default")
        provenance[key] = {"value": value, "origin": origin}
    return experiment, provenance


def explain(
    error: ValidationError,
    source: str,
    tree: Mapping[str, Any],
    origins: Mapping[str, str],
    known: Callable[[Sequence[str], Mapping[str, Any]], list[str]] | None = None,
) -> str:
    """All problems of an experiment, one line each: key, what is wrong, what would do, where the value came from.

    known: gives the keys that are allowed at a location, of a file that is no experiment.
    """
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            keys = (known or _known_keys)(location[:-1], tree)
            text = "unknown key" + did_you_mean(location[-1], keys)
            text += f" (known: {', '.join(keys)})" if keys else ""
        elif problem["type"] == "missing":
            text = "is missing"
        elif problem["type"] != "value_error":
            text = f"{text}, got {shortened(repr(problem['input']))}"
        key = _one_line(".".join(location)) or ("sweep" if known else "experiment")
        lines.append(f"  {key}: {text}" + (f"  [{origins[key]}]" if key in origins else ""))
    return f"{source}: {len(lines)} problem{'s' if len(lines) != 1 else ''}\n" + "\n".join(lines)


def _one_line(key: str) -> str:
    return shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in key))


def _known_keys(location: Sequence[str], tree: Mapping[str, Any]) -> list[str]:
    """The keys allowed at `location` of an experiment; empty where that is not a plain nested section."""
    model: Any = Experiment
    for part in location:
        if part == "modalities":
            return sorted(EncoderConfig.model_fields)
        if part == "method":
            model = METHODS[tree["method"]["name"]].Config
            continue
        model = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return sorted(model.model_fields)


def changed_fields(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} of every field that differs and is not harmless."""
    before, after = dict(flatten(old.to_json())), dict(flatten(new.to_json()))
    keys = sorted(set(before) | set(after))
    return {
        key: (before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key) and key not in HARMLESS
    }


def check_changes(old: Experiment, new: Experiment, allowed: Sequence[str]) -> list[str]:
    """The changes a resumed run makes, as text; RefusedError if one is not named in `allowed` or cannot be made."""
    lines, refused = [], []
    for key, (before, after) in changed_fields(old, new).items():
        line = f"{key}: {before!r} -> {after!r}"
        lines.append(line)
        if not any(key == c or key.startswith(f"{c}.") for c in CHANGEABLE):
            refused.append(f"  {line}  (makes it another run; start one under a new --name)")
        elif not any(key == a or key.startswith(f"{a}.") for a in allowed):
            refused.append(f"  {line}  (say --allow-change {key} if you mean it)")
    if refused:
        raise RefusedError("the experiment differs from the one this run was started with:\n" + "\n".join(refused))
    return lines
