"""Every metric of a run, as plain data: the emitter, dashboards, alert rules and their tests read this one table.

A run's metrics all carry the labels of `RUN`. What comes on top has few values, and never more than `LIMITS` says:
what lies beyond is left out and counted. Numbers of the test split appear once a run has ended and are never used for
a decision. Metrics with an empty value (no valid split, no classifiers) are absent, not 0; counters begin at 0 with the
process that emits them, also where a run is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "counterpoise_"
RUN = ("run", "corpus", "method")  # run: its name, below that of its comparison or sweep: "c1/aug-seed0"

# How many values of a label one run may have; of `run`, how many runs one process may show at a time.
LIMITS = {
    "run": 256,
    "modality": 32,
    "classifier": 16,
    "term": 64,
    "coefficient": 32,
    "action": 16,
    "event": 32,
    "error": 16,
    "rank": 64,
}
LABEL_LENGTH = 120  # characters of a label's value at most

STATES = ("created", "running", "interrupted", "stopped", "failed", "finished")
SPLITS = ("train", "valid", "test")
# Counters that exist from the start, so that their first step is seen; others appear when they are first needed.
EVENTS = ("resumed", "skipped_rows", "checkpoint_fallback", "straggler", "interrupted", "stopped", "failed")
ERRORS = ("NonFiniteLossError", "other")
ACTIONS = ("assign_classifier",)


@dataclass(frozen=True)
class Metric:
    """One metric as it is exported.

    name: in full; what Prometheus stores, `_total` and `_info` included. kind: its Prometheus type; an info is a gauge
    that is always 1. unit: in words of Grafana's units: percentunit (0..1), s, dateTimeAsIso (Unix seconds), short.
    labels: those beside `RUN`.
    """

    name: str
    kind: Literal["gauge", "counter", "info"]
    unit: str
    labels: tuple[str, ...]
    help: str
    of_run: bool = True

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*RUN, *self.labels) if self.of_run else self.labels


def _gauge(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(PREFIX + name, "gauge", unit, labels, help)


def _counter(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(PREFIX + name, "counter", unit, labels, help)


METRICS: tuple[Metric, ...] = (
    # --- what runs, and how it stands
    Metric(
        PREFIX + "run_info",
        "info",
        "short",
        ("seed", "protocol", "sweep", "workers", "device", "modalities", "parameters", "version"),
        "What a run is; always 1. sweep: the comparison or sweep it belongs to.",
    ),
    _gauge("run_state", "short", "1 for the state a run is in, 0 for the others.", "state"),
    _gauge("run_start_timestamp_seconds", "dateTimeAsIso", "When the run began, or was resumed last."),
    _gauge("last_step_timestamp_seconds", "dateTimeAsIso", "When the run was last seen to have got on."),
    _gauge("epoch", "short", "Epochs that have ended."),
    _gauge("epochs", "short", "Epochs of the whole run, all stages together."),
    _gauge("progress_ratio", "percentunit", "Share of all batches that is done."),
    _gauge("remaining_seconds", "s", "Time left, as the run estimates it."),
    _gauge("best_epoch", "short", "The epoch that would be tested now."),
    _gauge("workers", "short", "Workers that share every batch."),
    # --- balance
    _gauge("fused_accuracy", "percentunit", "Accuracy of all modalities together, per epoch.", "split"),
    _gauge("modality_accuracy", "percentunit", "Accuracy of one modality alone, per epoch.", "modality", "split"),
    _gauge("accuracy_gap", "percentunit", "Accuracy of the best modality minus that of the worst.", "split"),
    _gauge("modality_score", "percentunit", "Mean probability of the true class.", "modality", "split"),
    _gauge(
        "score_ratio",
        "short",
        "Score of a modality over the mean score of the others, on train: 1 is balanced, below 1 it lags behind.",
        "modality",
    ),
    _gauge(
        "score_ratio_threshold",
        "short",
        "Where adaptive classifier assignment acts: sigma - tau (low) and sigma + tau (high).",
        "bound",
    ),
    # --- decisions
    _gauge("classifiers", "short", "Classifiers of a modality.", "modality"),
    _gauge(
        "classifier_weight",
        "short",
        "What a classifier counts in its modality's prediction, per epoch; absent for methods where that is always 1.",
        "modality",
        "classifier",
    ),
    _counter("classifiers_added_total", "short", "Classifiers that were added to a modality.", "modality"),
    _gauge(
        "classifier_added_timestamp_seconds",
        "dateTimeAsIso",
        "When a modality last got a classifier; absent before.",
        "modality",
    ),
    _gauge("classifier_added_epoch", "short", "The epoch after which a modality last got a classifier.", "modality"),
    _counter("decisions_total", "short", "Decisions between epochs, those that changed nothing included.", "action"),
    _gauge("last_decision_timestamp_seconds", "dateTimeAsIso", "When the last decision was made."),
    _gauge("branch_weight", "short", "Weight of a branch's loss, for methods that decide it (G-Blend).", "modality"),
    _gauge(
        "coefficient",
        "short",
        "What a method computes as it trains (modulation/audio is coefficient modulation of audio), mean of an epoch.",
        "coefficient",
        "modality",
    ),
    # --- optimisation
    _gauge("loss", "short", "Mean loss of an epoch, all terms together.", "split"),
    _gauge("loss_term", "short", "Mean of one term of the training loss over an epoch.", "term"),
    _gauge("running_loss", "short", "Mean training loss of the epoch so far."),
    _gauge("learning_rate", "short", "Base learning rate of the last epoch."),
    # --- throughput
    _counter("steps_total", "short", "Batches trained."),
    _counter("samples_total", "short", "Samples trained on, over all workers."),
    _counter("step_seconds_total", "s", "Time of training steps, waiting for data included."),
    _counter("data_wait_seconds_total", "s", "Time of those in which rank 0 waited for data."),
    _gauge("epoch_seconds", "s", "Training time of the last epoch, without evaluation."),
    _gauge(
        "rank_step_seconds",
        "s",
        "Time of a step on one of several workers, without what it waits for the others; median of the last steps.",
        "rank",
    ),
    # --- resilience
    _gauge("checkpoint_timestamp_seconds", "dateTimeAsIso", "When the last checkpoint was complete; absent before."),
    _gauge("checkpoint_seconds", "s", "How long writing it took."),
    _counter("worker_restarts_total", "short", "How often workers died and the run went on from a checkpoint."),
    _counter("skipped_rows_total", "short", "Rows that could not be decoded and were left out."),
    _counter("events_total", "short", "Events of the run: resumed, checkpoint_fallback, ...", "event"),
    _counter("failures_total", "short", "Failures by kind of error; NonFiniteLossError is a NaN loss.", "error"),
    # --- the emitter itself
    Metric(
        PREFIX + "exporter_left_out_total",
        "counter",
        "short",
        ("label",),
        "Values of a label that were left out because there are too many; counted once each.",
        of_run=False,
    ),
    Metric(
        PREFIX + "exporter_unusable_records_total",
        "counter",
        "short",
        (),
        "Records of runs that could not be understood; they are in the runs' files.",
        of_run=False,
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}
