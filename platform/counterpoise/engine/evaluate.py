"""Evaluation: every row of a split once, over all workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from counterpoise.contracts import LABEL, ROW, Batch, Comm, DataError, DataSource, Outputs, SplitStats
from counterpoise.engine.feed import on_device
from counterpoise.engine.metrics import classification_metrics
from counterpoise.functional import accuracy_gap, true_class_scores
from counterpoise.methods import Method
from counterpoise.models.network import MultimodalNet


class Accumulator:
    """Sums over batches, kept on the device so that a step never waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor | float) -> None:
        if not isinstance(value, torch.Tensor):  # made there: to copy it would make the host wait
            value = torch.full((), value, dtype=torch.float64, device=self.device)
        value = value.to(self.device, torch.float64)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_predictions(self, logits: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Count correct predictions of every entry, and sum true-class scores of every entry but "fused"."""
        for name, z in logits.items():
            self.add(f"correct/{name}", (z.argmax(dim=1) == labels).sum())
            if name != "fused":
                self.add(f"score/{name}", true_class_scores(z, labels).sum(dtype=torch.float64))

    def state(self) -> dict[str, float]:
        """This worker's sums as numbers; float64 survives JSON exactly."""
        if not self.sums:
            return {}
        return dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist(), strict=True))

    def load(self, state: dict[str, float]) -> None:
        self.sums = {k: torch.tensor(v, dtype=torch.float64, device=self.device) for k, v in state.items()}

    def reduce(self, comm: Comm, shared: str = "loss/") -> dict[str, float]:
        """Sums over all workers, except for names under `shared`, which are global already."""
        names = sorted(self.sums)
        if not names:
            return {}
        local = torch.stack([self.sums[name] for name in names])
        total = comm.sum(local)
        keep = torch.tensor([name.startswith(shared) for name in names], device=self.device)
        return dict(zip(names, torch.where(keep, local, total).tolist(), strict=True))


def split_stats(sums: dict[str, float]) -> SplitStats:
    def under(prefix: str) -> dict[str, float]:
        return {k.removeprefix(prefix): v for k, v in sums.items() if k.startswith(prefix)}

    correct = {name: round(value) for name, value in under("correct/").items()}
    return SplitStats(round(sums.get("samples", 0)), under("loss/"), correct, under("score/"))


def predictions(net: MultimodalNet, method: Method[Any], out: Outputs) -> dict[str, torch.Tensor]:
    """Logits by name: every modality of `out`, and "fused" where all are there."""
    complete = out.fused is not None or len(out.unimodal) == len(net.modalities)
    return {**({"fused": method.fuse(net, out)} if complete else {}), **out.unimodal}


@torch.no_grad()
def evaluate(
    net: MultimodalNet, method: Method[Any], data: DataSource, split: str, comm: Comm, device: torch.device
) -> SplitStats:
    """Loss and accuracies of a split; the loss is the cross-entropy of the fused prediction."""
    net.eval()
    sums = Accumulator(device)
    # Entries of every worker, also of one without a row of this split: they travel as one tensor.
    for name in ("samples", "loss/fused", *(f"correct/{m}" for m in ("fused", *data.modalities))):
        sums.add(name, 0)
    for name in data.modalities:
        sums.add(f"score/{name}", 0)
    for batch in on_device(data, data.batches(split), device):
        logits, labels = predictions(net, method, method.predict(net, batch)), batch[LABEL]
        sums.add("samples", len(labels))
        sums.add("loss/fused", F.cross_entropy(logits["fused"], labels, reduction="sum"))
        sums.add_predictions(logits, labels)
    return split_stats(sums.reduce(comm, shared="\0"))


@dataclass
class Predictions:
    """Every decodable row of a split, in row order. logits: {"fused" | modality | part, like audio/first: [N, K]}."""

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    logits: dict[str, npt.NDArray[np.float32]]

    def metrics(self, modalities: tuple[str, ...]) -> dict[str, Any]:
        """accuracy, map and macro_f1 by name, and the gap between modalities."""
        by_name = {name: classification_metrics(self.logits[name], self.labels) for name in ("fused", *modalities)}
        table: dict[str, Any] = {
            metric: {name: values[metric] for name, values in by_name.items()}
            for metric in ("accuracy", "map", "macro_f1")
        }
        table["gap"] = accuracy_gap(table["accuracy"])
        for extra in sorted(set(self.logits) - set(by_name)):
            accuracy = classification_metrics(self.logits[extra], self.labels)["accuracy"]
            table.setdefault("accuracy_of_part", {})[extra] = accuracy
        return table


@torch.no_grad()
def gather_rows(
    compute: Callable[[Batch], dict[str, torch.Tensor]],
    data: DataSource,
    split: str,
    comm: Comm,
    device: torch.device,
) -> tuple[npt.NDArray[np.int64], dict[str, torch.Tensor]]:
    """The decodable rows of a split, ascending, and the tables [N, D] that `compute` (batch -> {name: [B, D]}) gives
    for them, equal on every worker."""
    total = data.num_samples(split)
    seen = torch.zeros(total, device=device)
    tables: dict[str, torch.Tensor] = {}
    for batch in on_device(data, data.batches(split), device):
        for name, values in compute(batch).items():
            if name not in tables:
                tables[name] = torch.zeros(total, values.shape[1], device=device)
            tables[name][batch[ROW]] = values.float()
        seen[batch[ROW]] += 1
    widths = comm.broadcast({name: table.shape[1] for name, table in tables.items()})  # rank 0 has the first rows
    counts = comm.sum(seen)
    if bool((counts > 1).any()):
        raise DataError(f"split {split}: {int((counts > 1).sum())} rows were read more than once")
    rows = counts.nonzero().squeeze(1)
    empty = {name: torch.zeros(total, width, device=device) for name, width in widths.items() if name not in tables}
    return rows.cpu().numpy(), {name: comm.sum((tables | empty)[name])[rows] for name in sorted(widths)}


@torch.no_grad()
def predict(
    net: MultimodalNet, method: Method[Any], data: DataSource, split: str, comm: Comm, device: torch.device
) -> Predictions:
    """Predictions for a whole split, equal on every worker. Rows that do not decode are left out."""
    net.eval()

    def compute(batch: Batch) -> dict[str, torch.Tensor]:
        out = method.predict(net, batch)
        return {**predictions(net, method, out), **method.parts(net, out)}

    rows, tables = gather_rows(compute, data, split, comm, device)
    labels = np.asarray(data.labels(split))[rows]
    return Predictions(rows, labels, {name: table.cpu().numpy() for name, table in tables.items()})


@torch.no_grad()
def predict_without(
    net: MultimodalNet,
    method: Method[Any],
    data: DataSource,
    split: str,
    comm: Comm,
    device: torch.device,
    missing: Sequence[tuple[str, ...]],
) -> dict[str, npt.NDArray[np.float32]]:
    """Fused logits [N, K] without each of some sets of modalities, by their names joined with "+".

    Rows are those of `predict`.
    """
    net.eval()

    def compute(batch: Batch) -> dict[str, torch.Tensor]:
        return {
            "+".join(names): predictions(net, method, method.predict(net, batch, names))["fused"] for names in missing
        }

    _, tables = gather_rows(compute, data, split, comm, device)
    return {name: table.cpu().numpy() for name, table in tables.items()}


def at_missing_rate(
    complete: npt.NDArray[np.float32],
    without: Mapping[str, npt.NDArray[np.float32]],
    sample_ids: Sequence[str],
    rate: float,
) -> npt.NDArray[np.float32]:
    """Logits [N, K] where a share `rate` of the samples lacks one of the modalities of `without`, each as often.

    Who lacks what is a function of the sample's id alone, and who lacks it at a lower rate does at a higher one.
    """
    mixed, names = complete.copy(), sorted(without)
    for row, sample_id in enumerate(sample_ids):
        digest = hashlib.blake2b(sample_id.encode(), digest_size=16).digest()
        if int.from_bytes(digest[:8], "big") < rate * 2**64:
            mixed[row] = without[names[int.from_bytes(digest[8:], "big") % len(names)]][row]
    return mixed


def prediction_columns(found: Predictions, data: DataSource, split: str) -> dict[str, Any]:
    """Columns of predictions.parquet: one row per sample, logits of the fused and every single prediction."""
    ids = data.sample_ids(split)
    columns: dict[str, Any] = {
        "sample_id": [ids[row] for row in found.rows],
        "label": found.labels,
        "prediction": found.logits["fused"].argmax(axis=1),
    }
    for name in ("fused", *data.modalities):
        columns[f"logits_{name}"] = found.logits[name]
    return columns
