"""Run folders, read back. Unfinished runs are welcome; what is absent stays empty."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from counterpoise import storage
from counterpoise.contracts import DataError, Record
from counterpoise.plain import NotPlain, read_json, read_yaml
from counterpoise.wording import flatten

FUSED = "fused"
# Keys of an experiment that may differ between runs of one group: the axis that is averaged over, and names.
NOT_SETTINGS = ("seed", "name", "run")


@dataclass
class RunData:
    """One run folder. `epochs` and `decisions` are those that count: what a resumed run did again replaces the rest."""

    uri: str
    manifest: dict[str, Any] = field(default_factory=dict)
    start: Record = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    epochs: list[Record] = field(default_factory=list)
    decisions: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiment: str = ""  # text of experiment.yaml
    skipped: list[dict[str, Any]] = field(default_factory=list)  # rows that could not be decoded
    damaged_lines: int = 0  # lines of records.jsonl that are no JSON, e.g. torn by a crash

    def _first(self, key: str, default: Any = None) -> Any:
        for source in (self.summary or {}, self.start, self.status, self.manifest):
            if source.get(key) is not None:
                return source[key]
        return default

    @property
    def name(self) -> str:
        """Of its folder, where it is found; a copied one has another in its records."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def method(self) -> str:
        return str(self._first("method", "?"))

    @property
    def corpus(self) -> str:
        """Name of the corpus with the protocol: numbers of two protocols do not compare."""
        return f"{self.corpus_name} ({self.protocol})" if self.protocol else self.corpus_name

    @property
    def corpus_name(self) -> str:
        """Of a corpus given by its place, that of its folder."""
        return str(self._first("corpus", "?")).removesuffix("/corpus.yaml").rstrip("/").rsplit("/", 1)[-1]

    @property
    def protocol(self) -> str | None:
        return self._first("protocol")

    @property
    def seed(self) -> int | None:
        return self._first("seed")

    @property
    def modalities(self) -> tuple[str, ...]:
        known = self._first("modalities")
        if known is None:
            accuracies = [accuracy_of(record) for record in self.epochs]
            known = [name for name in (accuracies[-1] if accuracies else {}) if name != FUSED]
        return tuple(known)

    @property
    def num_epochs(self) -> int:
        return int(self._first("epochs", len(self.epochs)))

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def state(self) -> str:
        if self.finished:
            return "finished"
        return str(self.status.get("state", "unfinished"))

    @property
    def settings(self) -> dict[str, Any]:
        """The experiment as {dotted key: value}, without the seed and names."""
        try:
            tree = read_yaml(self.experiment) if self.experiment else {}
        except NotPlain:
            tree = {}
        if not isinstance(tree, dict):
            return {}
        return dict(flatten({key: value for key, value in tree.items() if key not in NOT_SETTINGS}))

    @property
    def settings_digest(self) -> str:
        """Equal for runs that differ only in seed and name: the group that the run names, else from its settings."""
        if group := self._first("group"):
            return str(group)
        text = json.dumps(self.settings or self._first("digest", ""), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def accuracy_of(record: Record) -> dict[str, float]:
    """Accuracies of an epoch: on valid where there is such a split, else on train."""
    part = record.get("valid") or record.get("train") or {}
    return dict(part.get("accuracy") or {})


def _text(uri: str, name: str) -> str | None:
    place = storage.join(uri, name)
    return storage.read_bytes(place).decode("utf-8", errors="replace") if storage.exists(place) else None


def _json(uri: str, name: str) -> dict[str, Any] | None:
    text = _text(uri, name)
    if text is None:
        return None
    try:
        value = read_json(text)
    except NotPlain as error:
        raise DataError(
            f"{storage.show(storage.join(uri, name))} is damaged ({error}); restore it from a copy"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{storage.show(storage.join(uri, name))} holds no JSON object; restore it from a copy")
    return value


def _lines(text: str | None) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of JSON lines, and how many lines were none."""
    objects, damaged = [], 0
    for line in (text or "").splitlines():
        if not line.strip():
            continue
        try:
            value = read_json(line)
        except NotPlain:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            damaged += 1
    return objects, damaged


def read_run(uri: str) -> RunData:
    """Everything a run folder says about its run."""
    uri = str(uri).rstrip("/")
    manifest, records = _json(uri, "run.json"), _text(uri, "records.jsonl")
    if manifest is None and records is None:
        raise DataError(
            f"{storage.show(uri)} is not a run: it has neither run.json nor records.jsonl; "
            "give the folder that a training command named"
        )
    run = RunData(uri, manifest or {})
    run.status = _json(uri, "status.json") or {}
    run.summary = _json(uri, "summary.json")
    run.provenance = _json(uri, "provenance.json") or {}
    run.experiment = _text(uri, "experiment.yaml") or ""
    run.skipped, _ = _lines(_text(uri, "ledger.jsonl"))
    lines, run.damaged_lines = _lines(records)
    for record in lines:
        _take(run, record)
    return run


def _take(run: RunData, record: Record) -> None:
    kind = record.get("kind")
    if kind == "start":
        run.start = record
    elif kind == "epoch" and "epoch" in record:
        # A resumed run repeats what came after its checkpoint; the repeated part is the one that counts.
        run.epochs = [r for r in run.epochs if r["epoch"] < record["epoch"]] + [record]
        run.decisions = [r for r in run.decisions if r["epoch"] < record["epoch"]]
    elif kind == "decision" and "epoch" in record:
        run.decisions.append(record)
    elif kind == "event":
        run.events.append(record)
    elif kind == "end" and run.summary is None:
        run.summary = record.get("summary")


def read_runs(uris: Iterable[str]) -> list[RunData]:
    return [read_run(uri) for uri in uris]


def series(run: RunData, *path: str) -> tuple[list[int], list[float]]:
    """Epochs and values of one number of the epoch records, e.g. series(run, "valid", "accuracy", "audio").

    Epochs without the number are left out.
    """
    epochs, values = [], []
    for record in run.epochs:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            epochs.append(int(record["epoch"]))
            values.append(float(value))
    return epochs, values


def accuracy_series(run: RunData, name: str) -> tuple[list[int], list[float]]:
    """Accuracy of a modality or "fused" over epochs: on valid where there is such a split, else on train."""
    epochs, values = series(run, "valid", "accuracy", name)
    return (epochs, values) if epochs else series(run, "train", "accuracy", name)


def _rehearsals(run: RunData) -> set[str]:
    """Names of the stages that a method tries out and takes back."""
    return {str(stage["name"]) for stage in run.start.get("stages") or () if stage.get("aside")}


def without_rehearsals(run: RunData, epochs: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Epochs and values without those of rehearsals; the epochs that are left count from 1."""
    aside = _rehearsals(run)
    left = [int(record["epoch"]) for record in run.epochs if record.get("stage") not in aside]
    place = {epoch: i for i, epoch in enumerate(left, start=1)}
    found = {place[epoch]: value for epoch, value in zip(epochs, values, strict=True) if epoch in place}
    return list(found), list(found.values())


def epochs_kept(run: RunData) -> int:
    """Epochs of a run without those of rehearsals."""
    aside = _rehearsals(run)
    return run.num_epochs - sum(int(s["epochs"]) for s in run.start.get("stages") or () if str(s["name"]) in aside)


def classifier_steps(run: RunData, modality: str) -> tuple[list[int], list[int]]:
    """Classifiers of a modality over epochs: during the first, then after each with what was decided at its end."""
    epochs: list[int] = []
    counts: list[int] = []
    after = {d["epoch"]: (d.get("classifiers") or {}).get(modality) for d in run.decisions}
    for record in run.epochs:
        count = after.get(record["epoch"]) or (record.get("classifiers") or {}).get(modality)
        if count is not None:
            if not epochs:
                epochs.append(int(record["epoch"]))
                counts.append(int((record.get("classifiers") or {}).get(modality, count)))
            epochs.append(int(record["epoch"]))
            counts.append(int(count))
    return epochs, counts


@dataclass(frozen=True)
class Reason:
    """The inputs of a decision, sorted by what they are. Absent ones are empty."""

    scores: dict[str, float]
    ratios: dict[str, float]
    low: float | None  # a ratio below this earns a classifier
    rest: dict[str, Any]


def reason(decision: Record) -> Reason:
    inputs = dict(decision.get("inputs") or {})
    scores, ratios = (_numbers(inputs.pop(key, None)) for key in ("scores", "ratios"))
    low, sigma, tau = (inputs.get(key) for key in ("threshold_low", "sigma", "tau"))
    if low is None and sigma is not None:
        low = sigma - (tau or 0.0)
    return Reason(scores, ratios, None if low is None else float(low), inputs)


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {}
    return {str(k): float(v) for k, v in value.items() if isinstance(v, int | float)}


def all_modalities(runs: Sequence[RunData]) -> list[str]:
    """Modalities of all runs, in the order in which the runs name them."""
    return list(dict.fromkeys(name for run in runs for name in run.modalities))
