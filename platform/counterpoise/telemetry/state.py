"""Where a run stands, gathered from its records and its status: what the metrics and `counterpoise watch` show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from counterpoise.contracts import Record
from counterpoise.telemetry.catalogue import ACTIONS, ERRORS, EVENTS, SPLITS, STATES
from counterpoise.telemetry.display import FUSED

# A metric's name without its prefix, the values of its labels beside those of the run, and its value.
Sample = tuple[str, tuple[str, ...], float]

_SUMS = {
    "step": "steps_total",
    "samples": "samples_total",
    "train_s": "step_seconds_total",
    "data_wait_s": "data_wait_seconds_total",
}


@dataclass
class RunState:
    """One run. `epochs` and `decisions` are those that count: what a resumed run does again replaces the rest."""

    start: Record = field(default_factory=dict)
    epochs: dict[int, Record] = field(default_factory=dict)
    decisions: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    state: str = "created"
    status: dict[str, Any] = field(default_factory=dict)
    moved: float | None = None  # when the run was last seen to have got on, by its own clock
    began: float | None = None  # when it began or was resumed, by its own clock
    resumed: bool = False  # it is being continued by hand
    counts: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)
    _sums: dict[str, float] = field(default_factory=dict)  # as the status had them last
    _place: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        for name in (*_SUMS.values(), "skipped_rows_total", "worker_restarts_total"):
            self.counts[name, ()] = 0.0
        for name, values in (("decisions_total", ACTIONS), ("events_total", EVENTS), ("failures_total", ERRORS)):
            self.counts |= {(name, (value,)): 0.0 for value in values}

    # --- what comes in

    def look_back(self, records: Sequence[Record]) -> None:
        """Take what a run wrote before it is continued; it is not counted."""
        self.resumed = True
        before = dict(self.counts)
        for record in records:
            self.take(record)
        self.counts = {key: before.get(key, 0.0) for key in self.counts}
        self.summary, self.began, self.moved = None, None, None

    def take(self, record: Record) -> None:
        """Take a record. Raises TypeError, ValueError or KeyError for one that makes no sense."""
        kind = record.get("kind")
        if kind == "start":
            if self.began is not None:  # workers died before the first checkpoint
                self._count("worker_restarts_total")
            self.start, self.began = record, _time(record)
            self.epochs, self.decisions = {}, []
            for name in self.modalities:
                self.counts.setdefault(("classifiers_added_total", (name,)), 0.0)
        elif kind == "epoch":
            self._take_epoch(record)
        elif kind == "decision":
            self._take_decision(record)
        elif kind == "event":
            self._take_event(record)
        elif kind == "end":
            self.summary = dict(record["summary"])

    def _take_epoch(self, record: Record) -> None:
        now = int(record["epoch"])
        self.epochs = {epoch: old for epoch, old in self.epochs.items() if epoch < now} | {now: record}
        self.decisions = [old for old in self.decisions if int(old["epoch"]) < now]
        self.moved = _time(record) or self.moved

    def _take_decision(self, record: Record) -> None:
        int(record["epoch"])
        self.decisions.append(record)
        self._count("decisions_total", str(record["action"]))
        for name in record.get("add") or ():
            self._count("classifiers_added_total", str(name))

    def _take_event(self, record: Record) -> None:
        event = str(record["event"])
        self.events.append(record)
        self._count("events_total", event)
        if event == "skipped_rows":
            self._count("skipped_rows_total", by=float(record["count"]))
        elif event == "failed":
            error = str(record.get("type"))
            self._count("failures_total", error if error in ERRORS else "other")
        elif event == "resumed":
            if self.began is not None or not self.resumed:  # else it is the continuation that was asked for
                self._count("worker_restarts_total")
            self.began = _time(record)

    def _count(self, name: str, *labels: str, by: float = 1.0) -> None:
        self.counts[name, labels] = self.counts.get((name, labels), 0.0) + by

    def take_status(self, state: str, status: Mapping[str, Any]) -> None:
        """Take the content of status.json, and the state it is read as."""
        self.state, self.status = state, dict(status)
        place = tuple(status.get(key) for key in ("step", "epoch", "batch", "checkpoint"))
        if place != self._place:
            self._place = place
            self.moved = _number(status.get("time")) or self.moved
        for key, name in _SUMS.items():
            value = _number(status.get(key))
            if value is None:
                continue
            last = self._sums.get(key, value if self.resumed else 0.0)
            self.counts[name, ()] += max(0.0, value - last)  # a run that goes on from a checkpoint begins lower
            self._sums[key] = value

    # --- what stands

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.start.get("modalities") or ())

    @property
    def last(self) -> Record:
        """The last epoch that has ended; {} before the first."""
        return self.epochs[max(self.epochs)] if self.epochs else {}

    @property
    def num_epochs(self) -> int | None:
        value = _number(self.start.get("epochs")) or _number(self.status.get("epochs"))
        return None if value is None else int(value)

    def classifiers(self) -> dict[str, int]:
        """Classifiers per modality now, after the last decision; {} for methods without."""
        now = _numbers(self.last.get("classifiers"))
        for decision in self.decisions[-1:]:
            if int(decision["epoch"]) >= int(self.last.get("epoch", 0)):
                now |= _numbers(decision.get("classifiers"))
        return {name: int(n) for name, n in now.items()}

    def score_ratios(self) -> dict[str, float]:
        """Score of a modality over the mean of the others, on train in the last epoch; {} for one modality."""
        return score_ratios(_numbers(_mapping(self.last.get("train")).get("score")), self.modalities)

    def thresholds(self) -> dict[str, float]:
        """Where adaptive assignment acts, as the last decision says: {"low": sigma - tau, "high": sigma + tau}."""
        for decision in reversed(self.decisions):
            inputs = _mapping(decision.get("inputs"))
            sigma, tau = _number(inputs.get("sigma")), _number(inputs.get("tau"))
            if sigma is not None and tau is not None:
                return {"low": sigma - tau, "high": sigma + tau}
        return {}

    def progress(self) -> float | None:
        """Share of the run's batches that is done."""
        if self.summary is not None:
            return 1.0
        step, batches = _number(self.status.get("step")), _number(self.status.get("batches"))
        if step is None or not batches or not self.num_epochs:  # before the first, or of an older version
            return None
        return min(1.0, step / (batches * self.num_epochs))

    # --- as metrics

    def samples(self) -> Iterator[Sample]:
        """All metrics of the run but its info. Values that are not there have no sample."""
        for state in STATES:
            yield "run_state", (state,), float(state == self.state)
        status, last = self.status, self.last
        checkpoint = _mapping(status.get("checkpoint"))
        plain = {
            "run_start_timestamp_seconds": self.began,
            "last_step_timestamp_seconds": self.moved,
            "epoch": last.get("epoch", 0),
            "epochs": self.num_epochs,
            "progress_ratio": self.progress(),
            "remaining_seconds": status.get("eta_s"),
            "best_epoch": last.get("best_epoch"),
            "workers": status.get("workers"),
            "running_loss": status.get("loss"),
            "learning_rate": last.get("lr"),
            "epoch_seconds": last.get("seconds"),
            "checkpoint_timestamp_seconds": checkpoint.get("time"),
            "checkpoint_seconds": checkpoint.get("seconds"),
            "last_decision_timestamp_seconds": self.decisions[-1].get("time") if self.decisions else None,
        }
        for name, value in plain.items():
            if (known := _number(value)) is not None:
                yield name, (), known
        own = status.get("rank_step_s")
        for rank, value in enumerate(own if isinstance(own, list) else ()):
            if (known := _number(value)) is not None:
                yield "rank_step_seconds", (str(rank),), known
        yield from self._balance()
        yield from self._decisions()
        for (name, labels), count in self.counts.items():
            yield name, labels, count

    def _balance(self) -> Iterator[Sample]:
        parts = {split: _mapping(self.last.get(split)) for split in SPLITS[:2]}
        parts["test"] = _mapping((self.summary or {}).get("test"))
        for split, part in parts.items():
            accuracy = _numbers(part.get("accuracy"))
            single = {name: accuracy[name] for name in self.modalities if name in accuracy}
            if FUSED in accuracy:
                yield "fused_accuracy", (split,), accuracy[FUSED]
            for name, value in single.items():
                yield "modality_accuracy", (name, split), value
            if len(single) > 1:
                yield "accuracy_gap", (split,), max(single.values()) - min(single.values())
            for name, value in _numbers(part.get("score")).items():
                if name != FUSED:
                    yield "modality_score", (name, split), value
            if (loss := _number(part.get("loss"))) is not None:
                yield "loss", (split,), loss
        for term, value in _numbers(parts["train"].get("losses")).items():
            yield "loss_term", (term,), value
        for name, value in self.score_ratios().items():
            yield "score_ratio", (name,), value
        for bound, value in self.thresholds().items():
            yield "score_ratio_threshold", (bound,), value

    def _decisions(self) -> Iterator[Sample]:
        for name, n in self.classifiers().items():
            yield "classifiers", (name,), float(n)
        for name, values in _mapping(self.last.get("classifier_weights")).items():
            for number, value in enumerate(values if isinstance(values, list) else (), start=1):
                if (known := _number(value)) is not None:
                    yield "classifier_weight", (str(name), str(number)), known
        latest: dict[str, Record] = {}
        weights: dict[str, float] = {}
        for decision in self.decisions:
            latest |= {str(name): decision for name in decision.get("add") or ()}
            weights = _numbers(_mapping(decision.get("inputs")).get("weights")) or weights
        for name, decision in latest.items():
            if (time := _time(decision)) is not None:
                yield "classifier_added_timestamp_seconds", (name,), time
            yield "classifier_added_epoch", (name,), float(decision["epoch"])
        for name, value in weights.items():
            yield "branch_weight", (name,), value
        for name, value in _numbers(self.last.get("coefficients")).items():
            kind, _, modality = name.rpartition("/")
            known = bool(kind) and modality in self.modalities
            yield "coefficient", (kind, modality) if known else (name, ""), value


def score_ratios(scores: Mapping[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """(M - 1) S_m / sum of the others' scores, for every modality m of M >= 2."""
    own = {name: scores[name] for name in modalities if name in scores}
    total = sum(own.values())
    if len(own) < 2:
        return {}
    return {name: (len(own) - 1) * s / max(total - s, 1e-12) for name, s in own.items()}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbers(value: Any) -> dict[str, float]:
    found = {str(name): _number(item) for name, item in _mapping(value).items()}
    return {name: number for name, number in found.items() if number is not None}


def _time(record: Record) -> float | None:
    time = _number(record.get("time"))
    return time if time is not None and math.isfinite(time) else None
