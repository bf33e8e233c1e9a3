"""`counterpoise bench`: measurements of our own step, both sides in one process, alternating."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from counterpoise.config import Experiment
from counterpoise.contracts import LABEL, ROW, Batch, InputSpec
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.loop import RunOptions, Trainer
from counterpoise.engine.run import RunFolder
from counterpoise.start import Settings

CLASSES = 6


class OneBatch:
    """A DataSource of one random batch: a strong and a weak modality, as CREMA-D has them."""

    modalities: tuple[str, ...] = ("audio", "visual")
    classes: tuple[str, ...] = tuple(str(k) for k in range(CLASSES))
    fingerprint = "random"
    selects_on: Literal["valid", "test"] = "valid"

    def __init__(self, batch_size: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs: Mapping[str, InputSpec] = {
            "audio": InputSpec("audio", (1, size, size)),
            "visual": InputSpec("image", (3, size, size)),
        }
        self.batch: Batch = {
            name: torch.randn(batch_size, *spec.shape, generator=generator) for name, spec in self.inputs.items()
        }
        self.batch[LABEL] = torch.arange(batch_size) % CLASSES
        self.batch[ROW] = torch.arange(batch_size)

    def num_samples(self, split: str) -> int:
        return len(self.batch[ROW]) if split == "train" else 0

    def sample_ids(self, split: str) -> Sequence[str]:
        return [str(row) for row in range(self.num_samples(split))]

    def labels(self, split: str) -> Any:
        return self.batch[LABEL].numpy()

    def bounds(self) -> Sequence[int]:
        return [0, len(self.batch[ROW])]

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield self.batch

    def batches(self, split: str, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        yield self.batch

    def skipped(self) -> list[dict[str, Any]]:
        return []

    def preprocessing_state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def step_ratio(
    encoder: str, batch_size: int, size: int, classifiers: Sequence[int], rounds: int, threads: int | None, device: str
) -> dict[str, Any]:
    """Times of AUG's whole update of a batch (all modalities, optimizer and statistics included), for each number of
    classifiers on the weak modality, as ratios to forward and backward of the same encoders alone.

    Every round times the encoders and then every variant; ratios are formed within a round.
    """
    settings = Settings(device=device, threads=threads)
    place = torch.device(settings.resolved_device)
    torch.set_num_threads(settings.resolved_threads)
    data = OneBatch(batch_size, size)
    with tempfile.TemporaryDirectory() as root:
        steps = {n: aug_step(data, encoder, n, place, root) for n in classifiers}
        trainer = steps[classifiers[0]][1]
        batch = {name: tensor.to(place) for name, tensor in data.batch.items()}
        floor = _encoder_floor(trainer, batch)
        variants: dict[str, Callable[[], None]] = {"encoders alone": floor}
        variants |= {f"AUG, {n} classifier{'s' if n > 1 else ''}": step for n, (step, _) in steps.items()}
        for run in variants.values():  # warm up
            run()
            run()
        times: dict[str, list[float]] = {name: [] for name in variants}
        for index in range(rounds):
            names = list(variants)
            for name in names[index % len(names) :] + names[: index % len(names)]:
                times[name].append(_timed(variants[name], place))
    base = times["encoders alone"]
    result: dict[str, Any] = {
        "encoder": encoder,
        "batch_size": batch_size,
        "size": size,
        "rounds": rounds,
        "device": str(place),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "rows": [],
    }
    for name, values in times.items():
        ratios = sorted(value / floor_time for value, floor_time in zip(values, base, strict=True))
        result["rows"].append(
            {
                "what": name,
                "median_s": statistics.median(values),
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
            }
        )
    return result


def aug_step(
    data: OneBatch, encoder: str, count: int, device: torch.device, root: str
) -> tuple[Callable[[], None], Trainer]:
    experiment = Experiment(
        corpus="bench",
        modalities={name: encoder for name in data.modalities},
        method={"name": "aug", "assign": "fixed", "classifiers": {"visual": count}},
        batch_size=len(data.batch[ROW]),
    )
    folder = RunFolder.create(root, f"aug-{count}", experiment_text="", provenance={}, manifest={})
    trainer = Trainer(experiment, data, SingleComm(), folder, RunOptions(device=str(device)))
    trainer.net.train()
    batch = {name: tensor.to(device) for name, tensor in data.batch.items()}
    return lambda: trainer.train_batch(batch), trainer


def _encoder_floor(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    encoders = {name: trainer.net.encoders[name] for name in trainer.net.modalities}
    weights = {name: torch.randn(e.width, device=batch[name].device) for name, e in encoders.items()}  # type: ignore[call-overload]

    def run() -> None:
        for name, encoder in encoders.items():
            for parameter in encoder.parameters():
                parameter.grad = None
            (encoder(batch[name]) @ weights[name]).mean().backward()

    return run


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def render(result: dict[str, Any]) -> str:
    head = (
        f"{result['encoder']} twice, batch {result['batch_size']}, inputs {result['size']} x {result['size']}, "
        f"{result['rounds']} rounds in turn on {result['device']} ({result['machine']}, {result['threads']} threads)"
    )
    lines = [head, f"{'':22}  median    ratio to encoders alone (quartiles)"]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(f"{row['what']:22}  {row['median_s'] * 1e3:7.1f} ms  {row['ratio']:.3f} ({low:.3f} to {high:.3f})")
    return "\n".join(lines)
