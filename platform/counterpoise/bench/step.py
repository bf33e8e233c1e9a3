"""`counterpoise bench step`: AUG's update against its encoders alone, and against the released code's, in turns."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from counterpoise.bench.floor import operation_floor
from counterpoise.bench.machine import Side, Spread, machine, machine_line, spread_text
from counterpoise.bench.released_step import check_checkout
from counterpoise.bench.released_step import make as make_released
from counterpoise.config import Experiment
from counterpoise.contracts import LABEL, ROW, Batch, ConfigError, InputSpec
from counterpoise.data.plan import rank_slice
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.loop import RunOptions, Trainer
from counterpoise.engine.memory import reuse_memory
from counterpoise.engine.run import RunFolder
from counterpoise.start import Settings

CLASSES = 6
ENCODERS, RELEASED = "encoders alone", "released AUG"


class OneBatch:
    """A DataSource of one random batch: a strong and a weak modality, as CREMA-D has them.

    batch_size: of all workers. Every worker has its part of the same batch.
    """

    modalities: tuple[str, ...] = ("audio", "visual")
    classes: tuple[str, ...] = tuple(str(k) for k in range(CLASSES))
    fingerprint = "random"
    selects_on: Literal["valid", "test"] = "valid"

    def __init__(
        self, batch_size: int, audio: tuple[int, int], image: tuple[int, int], rank: int = 0, world: int = 1
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs: Mapping[str, InputSpec] = {
            "audio": InputSpec("audio", (1, *audio)),
            "visual": InputSpec("image", (3, *image)),
        }
        self.batch: Batch = {
            name: torch.randn(batch_size, *spec.shape, generator=generator) for name, spec in self.inputs.items()
        }
        self.batch[LABEL] = torch.arange(batch_size) % CLASSES
        self.batch[ROW] = torch.arange(batch_size)
        start, end = rank_slice(0, batch_size, rank, world)
        self.batch = {name: tensor[start:end] for name, tensor in self.batch.items()}
        self.size = batch_size

    def num_samples(self, split: str) -> int:
        return self.size if split == "train" else 0

    def sample_ids(self, split: str) -> Sequence[str]:
        return [str(row) for row in range(self.num_samples(split))]

    def labels(self, split: str) -> Any:
        return self.batch[LABEL].numpy()

    def bounds(self) -> Sequence[int]:
        return [0, self.size]

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield self.batch

    def expect(self, epoch: int) -> None:
        pass

    def batches(self, split: str, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        yield self.batch

    def finish(self, batch: Batch) -> Batch:
        return batch

    def skipped(self) -> list[dict[str, Any]]:
        return []

    def preprocessing_state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def step_ratio(
    encoder: str,
    batch_size: int,
    audio: tuple[int, int],
    image: tuple[int, int],
    classifiers: Sequence[int],
    rounds: int,
    threads: int | None,
    device: str,
    *,
    say: Callable[[str], None],
    compute: Mapping[str, Any] | None = None,
    against: str | None = None,
    floor: bool = False,
) -> dict[str, Any]:
    """Times of AUG's whole update of a batch (all modalities, optimizer and statistics included), for each number of
    classifiers on the weak modality, as ratios to forward and backward of the same encoders alone.

    compute: how encoders compute, the encoders alone too. against: a checkout of the released code, whose step is
    timed as well, in a process of its own. floor: count the encoders' operations, and say what they take at the rates
    that are measured here. Every round times every side; ratios are formed within a round.
    """
    settings = Settings(device=device, threads=threads)
    place = torch.device(settings.resolved_device)
    torch.set_num_threads(settings.resolved_threads)
    reuse_memory(settings.resolved_device)
    facts = machine()
    data = OneBatch(batch_size, audio, image)
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        steps = {n: aug_step(data, encoder, n, place, root, compute) for n in classifiers}
        trainer = steps[classifiers[0]][1]
        batch = {name: tensor.to(place) for name, tensor in data.batch.items()}
        encoders = _encoders_alone(trainer, batch)
        counted = operation_floor(encoders, place, torch.get_num_threads()) if floor else None
        variants: dict[str, Callable[[], float]] = {ENCODERS: lambda: timed(encoders, place)}
        named = {_named("AUG", n): made for n, made in steps.items()}
        for name, (step, _) in named.items():
            variants[name] = partial(timed, step, place)
        if against:
            if encoder != "resnet18":
                raise ConfigError(f"--against: the released code has resnet18 encoders, not {encoder}")
            spec = {
                "place": check_checkout(against),
                "classes": CLASSES,
                "audio": data.batch["audio"].squeeze(1),
                "image": data.batch["visual"],
                "label": data.batch[LABEL],
                "classifiers": list(classifiers),
                "device": str(place),
                "threads": torch.get_num_threads(),
            }
            released = stack.enter_context(contextlib.closing(Side("released step", make_released, spec)))
            for n in classifiers:
                variants[_named(RELEASED, n)] = partial(released.ask, n)
        for run in variants.values():  # warm up
            run()
            run()
        say("warmed up")
        memory = {name: peak_memory(step, t, batch) for name, (step, t) in named.items()}
        times: dict[str, list[float]] = {name: [] for name in variants}
        for index in range(rounds):
            names = list(variants)
            for name in names[index % len(names) :] + names[: index % len(names)]:
                times[name].append(variants[name]())
            say(f"round {index + 1} of {rounds} done")
    rows = []
    for name, values in times.items():
        row = {"what": name, "median_s": statistics.median(values), "to_encoders": _ratios(values, times[ENCODERS])}
        rival = times.get(name.replace("AUG", RELEASED)) if name.startswith("AUG") else None
        rows.append(row | ({"times_faster": _ratios(rival, values)} if rival else {}))
    return {
        "encoder": encoder,
        "batch_size": batch_size,
        "audio": list(audio),
        "image": list(image),
        "compute": dict(compute or {}),
        "rounds": rounds,
        "device": str(place),
        "threads": torch.get_num_threads(),
        "machine": facts,
        "rows": rows,
        "floor": counted,
        "memory": memory,
    }


def shape(option: str, text: str) -> tuple[int, int]:
    """The two numbers of 257x1250."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and 8 <= int(side) <= 8192 for side in sides):
        raise ConfigError(f"{option} is {text!r}; write two numbers from 8 to 8192, e.g. 257x1250")
    return int(sides[0]), int(sides[1])


def _named(side: str, classifiers: int) -> str:
    return f"{side}, {classifiers} classifier{'s' if classifiers > 1 else ''}"


def _ratios(values: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    return Spread.of([value / other for value, other in zip(values, to, strict=True)]).to_json()


def aug_step(
    data: OneBatch, encoder: str, count: int, device: torch.device, root: str, compute: Mapping[str, Any] | None = None
) -> tuple[Callable[[], None], Trainer]:
    experiment = Experiment(
        corpus="bench",
        modalities={name: encoder for name in data.modalities},
        method={"name": "aug", "assign": "fixed", "classifiers": {"visual": count}},
        batch_size=data.size,
        compute=dict(compute or {}),
    )
    folder = RunFolder.create(root, f"aug-{count}", experiment_text="", provenance={}, manifest={})
    trainer = Trainer(experiment, data, SingleComm(), folder, RunOptions(device=str(device)))
    trainer.net.train()
    batch = {name: tensor.to(device) for name, tensor in data.batch.items()}
    return lambda: trainer.train_batch(batch), trainer


def peak_memory(step: Callable[[], None], trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Bytes on the device: the most that a step had there (a GPU alone knows), and what has to be there at once.

    floor: weights, gradients and the optimizer's numbers, the batch, and what the forward pass keeps for the backward
    pass, in the update that keeps most.
    """
    from counterpoise.planning.workload import saved_bytes

    kept = saved_bytes(step, trainer, batch)
    weights = sum(float(p.nbytes) for p in trainer.net.parameters())
    gradients = sum(float(p.nbytes) for p in trainer.parameters)
    slots = sum(float(t.nbytes) for state in trainer.optimizer.state.values() for t in state.values())
    inputs = sum(float(t.nbytes) for t in batch.values())
    found = {"weights": weights, "gradients": gradients, "optimizer": slots, "inputs": inputs, "activations": kept}
    found["floor"] = sum(found.values())
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["peak"] = float(torch.cuda.max_memory_allocated())
    return found


def _encoders_alone(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    """Forward and backward of the encoders, computed as in training."""
    net = trainer.net
    encoders = {name: net.encoders[name] for name in net.modalities}
    weights = {name: torch.randn(e.width, device=batch[name].device) for name, e in encoders.items()}  # type: ignore[call-overload]

    def run() -> None:
        for name, encoder in encoders.items():
            for parameter in encoder.parameters():
                parameter.grad = None
            (net.encode(name, batch[name]) @ weights[name]).mean().backward()

    return run


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call by the clock, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def render(result: dict[str, Any]) -> str:
    shapes = ", ".join(f"{name} {' x '.join(map(str, result[name]))}" for name in ("audio", "image"))
    how = ", ".join(f"{key} {value}" for key, value in result["compute"].items())
    lines = [
        f"{result['encoder']} twice, batch {result['batch_size']}, {shapes}{f', {how}' if how else ''}; "
        f"{result['rounds']} rounds in turn on {result['device']}, {result['threads']} threads",
        machine_line(result["machine"]),
        f"{'':30}  {'median':>10}  ratio to encoders alone  times faster than released",
    ]
    for row in result["rows"]:
        faster = spread_text(row["times_faster"], 3) if "times_faster" in row else ""
        seconds = f"{row['what']:30}  {row['median_s'] * 1e3:7.1f} ms"
        lines.append(f"{seconds}  {spread_text(row['to_encoders'], 3):23}  {faster}".rstrip())
    if floor := result["floor"]:
        measured = floor["rates"]
        lines.append(
            f"encoders alone: {floor['flops'] / 1e9:.1f} GFLOP take {floor['arithmetic_s'] * 1e3:.1f} ms at "
            f"{measured['device.convolution_flops'] / 1e9:.0f} GFLOP/s (convolution), {floor['bytes'] / 1e9:.2f} GB "
            f"take {floor['memory_s'] * 1e3:.1f} ms at {measured['device.bytes_per_s'] / 1e9:.1f} GB/s; the "
            f"larger of both, operation by operation: {floor['together_s'] * 1e3:.1f} ms, "
            f"{floor['together_s'] / result['rows'][0]['median_s']:.0%} of the measured median"
        )
    name, memory = list(result["memory"].items())[-1]
    parts = ", ".join(f"{key} {memory[key] / 2**20:,.1f}" for key in memory if key not in ("floor", "peak"))
    lines.append(f"memory, {name}: at least {memory['floor'] / 2**20:,.1f} MiB ({parts})")
    if "peak" in memory:
        lines.append(
            f"  most that was allocated: {memory['peak'] / 2**20:,.1f} MiB, {memory['peak'] / memory['floor']:.2f} x"
        )
    return "\n".join(lines)
