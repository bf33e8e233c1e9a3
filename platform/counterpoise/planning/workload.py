"""What a step, an epoch and a checkpoint of an experiment consist of: counted, not estimated.

The real loop trains the real network on the `meta` device, where tensors have shapes and no numbers, at two sizes of
the batch, alone and as one of two workers. Every operation is noted with its arithmetic and the bytes that it reads and
writes, every collective with its size; both are linear in the batch. A method that looks at numbers cannot run there:
it is counted on the CPU, which takes as long as a few steps of two and four samples.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from counterpoise.bench.step import OneBatch
from counterpoise.config import Experiment
from counterpoise.contracts import LABEL, ROW, Batch, ConfigError, CounterpoiseError, DataError, InputSpec
from counterpoise.data.card import SPLITS, Card, load_card
from counterpoise.data.decode import compact_dtype, input_spec
from counterpoise.data.loader import LocalData
from counterpoise.data.recipes import card_of, recipe_names
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.evaluate import predictions
from counterpoise.engine.job import open_data
from counterpoise.engine.loop import RunOptions, Trainer, encoder_configs
from counterpoise.engine.run import RunFolder
from counterpoise.methods import METHODS
from counterpoise.models.norm import has_batch_norm

SIZES = (2, 4)  # samples of the two counted batches, per worker
FLOAT = 4  # bytes of a number: the loop trains in float32
_ALLOCATES = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
_JPEG_BYTES_PER_PIXEL = 0.4
_ROWS_OF_A_GROUP, _BYTES_OF_A_FILE = 64, 256e6  # as shards are written


@dataclass(frozen=True)
class Ops:
    """Operations of a step, one entry each: how often, FLOPs and bytes as a + b * samples.

    convolution: computed in TF32 where the device has it; matrix products are not.
    """

    count: np.ndarray
    convolution: np.ndarray
    flops: np.ndarray  # [2, n]
    traffic: np.ndarray  # [2, n]

    @classmethod
    def single(cls, flops_per_sample: float, bytes_per_sample: float, kernels: float) -> Ops:
        """A step of which only totals are known."""
        zero = np.zeros(1)
        of = [np.array([zero, np.array([total / max(kernels, 1)])]) for total in (flops_per_sample, bytes_per_sample)]
        return cls(np.array([float(max(kernels, 1))]), np.array([False]), *of)

    @classmethod
    def joined(cls, parts: Sequence[tuple[float, Ops]]) -> Ops:
        """A mean step: every part so often."""
        return cls(
            np.concatenate([weight * ops.count for weight, ops in parts]),
            np.concatenate([ops.convolution for _, ops in parts]),
            np.concatenate([ops.flops for _, ops in parts], axis=1),
            np.concatenate([ops.traffic for _, ops in parts], axis=1),
        )

    def at(self, samples: float) -> tuple[np.ndarray, np.ndarray]:
        """FLOPs and bytes of every operation for a batch."""
        return self.flops[0] + self.flops[1] * samples, self.traffic[0] + self.traffic[1] * samples

    def total_flops(self, samples: float) -> float:
        return float((self.count * self.at(samples)[0]).sum())

    def total_bytes(self, samples: float) -> float:
        return float((self.count * self.at(samples)[1]).sum())

    @property
    def kernels(self) -> float:
        return float(self.count.sum())


@dataclass(frozen=True)
class Messages:
    """All-reduces of a step: how often each, and its bytes as a + b * (samples of the global batch)."""

    count: np.ndarray
    size: np.ndarray  # [2, n]

    def at(self, samples: float) -> np.ndarray:
        return np.asarray(self.size[0] + self.size[1] * samples)

    @property
    def number(self) -> float:
        return float(self.count.sum())

    def total_bytes(self, samples: float) -> float:
        return float((self.count * self.at(samples)).sum())


@dataclass(frozen=True)
class Step:
    """One batch with all its updates, on one of several workers or alone. saved, updated: bytes, parameters."""

    ops: Ops
    messages: Messages
    saved: tuple[float, float]  # bytes kept from forward to backward, most of any update: a + b * samples
    updated: float  # parameters that the optimizer changes, over all updates
    gradients: float  # bytes of the largest gradient message


@dataclass(frozen=True)
class Shards:
    """The corpus as it is stored. known: read from shards that are there, or guessed from the card."""

    samples: dict[str, int]
    bytes_per_sample: float
    decoded_bytes_per_sample: float
    group_rows: float
    files: int
    known: bool


@dataclass(frozen=True)
class Workload:
    """Everything about a run that does not depend on where it runs."""

    title: str
    parameters: float
    slots: int  # numbers that the optimizer keeps per parameter
    alone: Step
    shared: Step
    forward: Ops
    forward_bytes: tuple[float, float]  # the most that one operation of a forward pass holds: a + b * samples
    input_bytes: float  # of one sample as tensors
    shards: Shards
    batch_size: int
    epochs: int
    shuffle_window: int = 8192
    shuffle_mib: int = 512
    decode_threads: int = 2
    cache: str = "auto"
    cache_limit_bytes: float = 2 * 2**30
    batch_norm: str = "none"  # sync | local | none
    counted: str = "given"
    notes: tuple[str, ...] = field(default=())

    def step(self, workers: int) -> Step:
        return self.alone if workers == 1 else self.shared

    @property
    def checkpoint_bytes(self) -> float:
        """Weights and the optimizer's numbers."""
        return FLOAT * self.parameters * (1 + self.slots)

    @property
    def cached(self) -> bool:
        """Whether decoded samples are kept in memory, as `data.cache` has it."""
        needed = self.shards.decoded_bytes_per_sample * sum(self.shards.samples.values())
        return self.cache == "on" or (self.cache == "auto" and needed <= self.cache_limit_bytes)


# --- noting what a step does


class OpLog(TorchDispatchMode):
    """Notes (convolution, FLOPs, bytes read and written) of every operation that is not a mere view."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[bool, float, float]] = []
        self.largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in _ALLOCATES or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            return out
        counter = flop_registry.get(func._overloadpacket)
        flops = float(counter(*args, **(kwargs or {}), out_val=out)) if counter else 0.0
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        moved = float(sum(t.numel() * t.element_size() for t in tensors))
        if moved or flops:
            self.rows.append(("convolution" in name, flops, moved))
            self.largest = max(self.largest, moved)
        return out


class NotingComm(SingleComm):
    """Rank 0 of `world` workers of whom the others never answer: notes the size of every all-reduce."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.sizes: list[float] = []
        self.gradients = 0.0
        self.on_update: Callable[[], None] = lambda: None

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            self.sizes.append(float(tensor.numel() * tensor.element_size()))
        return tensor.clone()

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], extra: Tensor) -> Tensor:
        self.on_update()
        numbers = sum(p.grad.numel() for p in parameters if p.grad is not None) + extra.numel()
        if self.world > 1:
            self.sizes.append(float(FLOAT * numbers))
            self.gradients = max(self.gradients, float(FLOAT * numbers))
        return extra.clone()

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world


class _NotedOptimizer(torch.optim.Optimizer):
    """Changes nothing and counts what it would change: fused optimizers know no meta device."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.updated = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.updated += sum(p.numel() for p in group["params"] if p.grad is not None)


class _NotingTrainer(Trainer):
    def _new_optimizer(self) -> torch.optim.Optimizer:
        groups = {name: list(ps) for name, ps in self.method.lr_groups(self.net).items()}
        named = {p for ps in groups.values() for p in ps}
        groups[""] = [p for p in self.net.parameters() if p.requires_grad and p not in named]
        return _NotedOptimizer([{"params": ps, "name": name} for name, ps in groups.items() if ps])

    def _watch(self, *_: Any) -> None:
        """Nothing that is computed here is meant to be finite."""


class _Batch(OneBatch):
    """One worker's `size` rows of a global batch of `size * world`, of the shapes that a corpus has."""

    def __init__(self, inputs: Mapping[str, InputSpec], classes: Sequence[str], size: int, world: int) -> None:
        self.inputs, self.modalities, self.classes = inputs, tuple(inputs), tuple(classes)
        self._world = world
        draw = torch.Generator().manual_seed(0)
        self.batch = {
            name: torch.randint(1, spec.vocabulary, (size, *spec.shape), generator=draw)
            if spec.kind == "text"
            else torch.randn(size, *spec.shape, generator=draw)
            for name, spec in inputs.items()
        }
        self.batch[LABEL] = torch.arange(size) % len(classes)
        self.batch[ROW] = torch.arange(size)

    def num_samples(self, split: str) -> int:
        return len(self.batch[ROW])

    def bounds(self) -> Sequence[int]:
        return [0, self._world * len(self.batch[ROW])]


def counting_batch(inputs: Mapping[str, InputSpec], classes: Sequence[str], size: int) -> OneBatch:
    """A data source of one batch of so many samples, for a worker alone."""
    return _Batch(inputs, classes, size, 1)


@contextmanager
def _saved_bytes() -> Iterator[tuple[dict[int, float], set[int]]]:
    """(bytes by storage of what is kept for the backward pass, storages that do not count)."""
    kept: dict[int, float] = {}
    apart: set[int] = set()
    held: list[Any] = []  # a storage that is freed would give its number to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in apart and storage._cdata not in kept:
            kept[storage._cdata] = float(storage.nbytes())
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept, apart


def saved_bytes(step: Callable[[], None], trainer: Trainer, batch: Batch) -> float:
    """Bytes that one step keeps from forward to backward besides weights and inputs, in the update that keeps most."""
    most = 0.0
    with _saved_bytes() as (kept, apart):
        apart.update(t.untyped_storage()._cdata for t in (*trainer.net.parameters(), *batch.values()))

        def next_update(*_: Any) -> None:
            nonlocal most
            most = max(most, sum(kept.values()))
            kept.clear()

        hook = trainer.optimizer.register_step_pre_hook(next_update)
        try:
            step()
        finally:
            hook.remove()
    return most


@dataclass
class _Count:
    """What was noted for one size of the batch; by stage, with its share of the epochs."""

    weights: list[float]
    rows: list[list[tuple[bool, float, float]]]
    sizes: list[list[float]]
    saved: float
    updated: float
    gradients: float
    forward: list[tuple[bool, float, float]]
    largest: float
    parameters: int
    batch_norm: bool


def _note(experiment: Experiment, inputs: Mapping[str, InputSpec], classes: Sequence[str], world: int, size: int,
          device: str) -> _Count:  # fmt: skip
    data = _Batch(inputs, classes, size, world)
    comm = NotingComm(world)
    with tempfile.TemporaryDirectory(prefix="counterpoise-plan-") as root:
        folder = RunFolder.create(root, "count", experiment_text="", provenance={}, manifest={})
        trainer = _NotingTrainer(experiment, data, comm, folder, RunOptions(device=device))
        trainer.net.train()
        batch = {name: tensor.to(device) for name, tensor in data.batch.items()}
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for epoch, (stage, _) in enumerate(trainer.plan, start=1):
            kinds.setdefault((stage.name, *trainer.method.phases(epoch)), []).append(epoch)
        parameters = sum(p.numel() for p in trainer.net.parameters())
        found = _Count([], [], [], 0.0, 0.0, 0.0, [], 0.0, parameters, has_batch_norm(trainer.net))
        for epochs in kinds.values():
            trainer.progress.epoch, trainer.progress.batch = epochs[0], 0
            weight = len(epochs) / len(trainer.plan)
            try:
                _note_stage(trainer, comm, batch, weight, found)
            except Exception:
                if device != "cpu" or not found.weights:
                    raise  # else: a stage that needs what decisions have made of the network; the others stand for it
        trainer.net.eval()
        with torch.no_grad(), OpLog() as log:
            predictions(trainer.net, trainer.method, trainer.method.predict(trainer.net, batch))
        found.forward, found.largest = log.rows, log.largest
    return found


def _note_stage(trainer: Trainer, comm: NotingComm, batch: Batch, weight: float, found: _Count) -> None:
    """One batch of the stage that the trainer stands in, added to `found`."""
    optimizer = trainer.optimizer
    assert isinstance(optimizer, _NotedOptimizer)
    trainer.method.begin_epoch(trainer.net, trainer._context())
    trainer.net.train()
    comm.sizes, comm.gradients, optimizer.updated = [], 0.0, 0
    most = 0.0
    with _saved_bytes() as (kept, apart), OpLog() as log:
        apart.update(p.untyped_storage()._cdata for p in trainer.net.parameters())
        apart.update(t.untyped_storage()._cdata for t in batch.values())

        def next_update() -> None:
            nonlocal most
            most = max(most, sum(kept.values()))
            kept.clear()

        comm.on_update = next_update
        trainer.train_batch(batch)
    found.weights.append(weight)
    found.rows.append(log.rows)
    found.sizes.append(comm.sizes)
    found.saved = max(found.saved, most)
    found.updated += weight * optimizer.updated
    found.gradients = max(found.gradients, comm.gradients)


def _line(small: Sequence[float], large: Sequence[float], sizes: tuple[float, float]) -> np.ndarray:
    """a and b [2, n] of a + b * size through two sizes; through the larger and 0 where their numbers differ."""
    high = np.asarray(large, dtype=float)
    if len(small) != len(large):
        return np.stack([np.zeros_like(high), high / sizes[1]])
    low = np.asarray(small, dtype=float)
    slope = np.maximum((high - low) / (sizes[1] - sizes[0]), 0.0)
    return np.stack([np.maximum(high - slope * sizes[1], 0.0), slope])


def _ops(small: Sequence[tuple[bool, float, float]], large: Sequence[tuple[bool, float, float]]) -> Ops:
    flops, traffic = (_line([r[i] for r in small], [r[i] for r in large], SIZES) for i in (1, 2))
    return Ops(np.ones(len(large)), np.array([r[0] for r in large], dtype=bool), flops, traffic)


def _step(small: _Count, large: _Count, world: int) -> Step:
    whole = (float(world * SIZES[0]), float(world * SIZES[1]))
    whole_weight = sum(large.weights)
    stages = [(w / whole_weight, a, b) for w, a, b in zip(large.weights, small.rows, large.rows, strict=True)]
    sizes = [_line(s, b, whole) for s, b in zip(small.sizes, large.sizes, strict=True)]
    saved = _line([small.saved], [large.saved], SIZES)[:, 0]
    return Step(
        Ops.joined([(weight, _ops(low, high)) for weight, low, high in stages]),
        Messages(
            np.concatenate([np.full(s.shape[1], stage[0]) for stage, s in zip(stages, sizes, strict=True)]),
            np.concatenate(sizes, axis=1),
        ),
        (float(saved[0]), float(saved[1])),
        large.updated,
        large.gradients,
    )


# --- from an experiment


def without_weights(experiment: Experiment, configs: Mapping[str, Any]) -> Experiment:
    """The same networks with random weights: no file of weights is needed to count."""
    fields: dict[str, Any] = {}
    for name, config in configs.items():
        none = config.weights is not None or config.name in ("bert", "transformers")
        fields[name] = config.model_copy(update={"weights": "none"}) if none else config
    return experiment.model_copy(update={"modalities": fields})


@dataclass(frozen=True)
class Counted:
    """What a network and its method do. steps: 1 alone, 2 as one of several workers."""

    steps: dict[int, Step]
    forward: Ops
    forward_bytes: tuple[float, float]
    parameters: int
    batch_norm: bool
    how: str


def count(
    experiment: Experiment, inputs: Mapping[str, InputSpec], classes: Sequence[str], device: str = "meta"
) -> Counted:
    """The steps of an experiment whose weights, if it has files of them, are left aside."""
    try:
        noted = {w: [_note(experiment, inputs, classes, w, size, device) for size in SIZES] for w in (1, 2)}
    except CounterpoiseError:
        raise
    except Exception:
        if device == "cpu":
            raise
        return count(experiment, inputs, classes, "cpu")  # a method that looks at numbers; torch has no class for it
    small, large = noted[1]
    largest = _line([small.largest], [large.largest], SIZES)[:, 0]
    return Counted(
        {world: _step(low, high, world) for world, (low, high) in noted.items()},
        _ops(small.forward, large.forward),
        (float(largest[0]), float(largest[1])),
        large.parameters,
        large.batch_norm,
        "shapes only" if device == "meta" else "on the CPU",
    )


def _opened(experiment: Experiment) -> tuple[Mapping[str, InputSpec], Sequence[str], Shards]:
    """Inputs, classes and shards of a corpus that is there."""
    data = open_data(experiment)
    assert isinstance(data, LocalData)
    try:
        samples = {split: data.num_samples(split) for split in ("train", "valid", "test")}
        index = data.indexes["train"]
        files = {file for each in data.indexes.values() for file in each.files}
        shards = Shards(
            samples,
            index.num_bytes / len(index),
            data.decoded_bytes() / sum(samples.values()),
            len(index) / len(index.group_sizes),
            len(files),
            True,
        )
        return data.inputs, data.classes, shards
    finally:
        data.close()


def _imagined(
    experiment: Experiment, card: Card, known: Mapping[str, int]
) -> tuple[Mapping[str, InputSpec], Sequence[str], Shards]:
    """The same of a corpus whose card alone is known."""
    card = card.under(experiment.protocol, experiment.preprocess)
    names = list(card.select(list(experiment.modalities) or None))
    chosen = card.select(METHODS[experiment.method_name].uses(experiment.method, names))
    inputs, stored, decoded = {}, 0.0, 0.0
    for name, modality in chosen.items():
        if modality.preprocess.shape is None:
            raise DataError(
                f"corpus {card.name} is not prepared, and its card does not say the shape of {name}; prepare it, or "
                f"say it with --set preprocess.{name}.shape=[NUMBER]"
            )
        inputs[name] = input_spec(modality)
        numbers = math.prod(inputs[name].shape)
        decoded += numbers * compact_dtype(modality).itemsize
        if modality.kind == "audio":
            stored += 2 * modality.preprocess.num_samples
        elif modality.kind in ("image", "frames"):
            stored += _JPEG_BYTES_PER_PIXEL * numbers / inputs[name].shape[-3]
        else:
            stored += FLOAT * numbers
    samples: dict[str, int] = {}
    for split in ("train", "test", "valid"):
        found = card.splits.get(split)
        if found is not None and found.carve is None:
            samples[split] = found.expected or 0
    if not ({**samples, **known}).get("train"):
        raise DataError(
            f"corpus {card.name} is not prepared, and its card does not say how many samples it has; prepare it, or "
            "say --set shards.train=NUMBER"
        )
    whole = samples.get("train", 0)
    for split in ("valid", "test"):
        found = card.splits.get(split)  # type: ignore[call-overload]
        if found is not None and found.carve is not None:
            samples[split] = round(found.carve.fraction * whole)
            samples["train"] -= samples[split]
    samples = {split: ({**samples, **known}).get(split, 0) for split in SPLITS}
    files = math.ceil(sum(samples.values()) * stored / _BYTES_OF_A_FILE)
    return inputs, card.class_names, Shards(samples, stored, decoded, _ROWS_OF_A_GROUP, files, False)


def corpus_of(
    experiment: Experiment, known: Mapping[str, int]
) -> tuple[Mapping[str, InputSpec], Sequence[str], Shards]:
    """Inputs, class names and shards of an experiment's corpus; from its recipe's card if it is not prepared.

    known: samples of splits, where the card says nothing of them.
    """
    try:
        load_card(experiment.corpus)
    except ConfigError:
        if experiment.corpus not in recipe_names():
            raise
        return _imagined(experiment, card_of(experiment.corpus), known)
    return _opened(experiment)


def of_experiment(experiment: Experiment, given: Mapping[str, float] | None = None) -> Workload:
    """The workload of an experiment, whether its corpus is prepared or not.

    given: shards.train and the like (`SHARDS`), in place of what the corpus has: to plan for more of its kind.
    """
    given = given or {}
    corpus = experiment.corpus
    inputs, classes, shards = corpus_of(
        experiment, {split: int(given[f"shards.{split}"]) for split in SPLITS if f"shards.{split}" in given}
    )
    guessed = f"corpus {corpus} is not prepared: bytes per sample, row groups and files are guessed from its card"
    configs = encoder_configs(experiment, counting_batch(inputs, classes, 1))
    counted = count(without_weights(experiment, configs), inputs, classes)
    optim, data = experiment.optim, experiment.data
    names = ", ".join(f"{name} ({config.name})" for name, config in configs.items())
    return Workload(
        title=f"{corpus}, {experiment.method_name}: {names}",
        parameters=counted.parameters,
        slots=2 if optim.name != "sgd" else int(optim.momentum > 0),
        alone=counted.steps[1],
        shared=counted.steps[2],
        forward=counted.forward,
        forward_bytes=counted.forward_bytes,
        input_bytes=float(sum(FLOAT * math.prod(spec.shape) for spec in inputs.values())),
        shards=stored(shards, given),
        batch_size=experiment.batch_size,
        epochs=experiment.epochs,
        shuffle_window=data.shuffle_window,
        shuffle_mib=data.shuffle_mib,
        decode_threads=data.decode_threads,
        cache=data.cache,
        cache_limit_bytes=data.cache_limit_gib * 2**30,
        batch_norm=experiment.batch_norm if counted.batch_norm else "none",
        counted=counted.how,
        notes=() if shards.known else (guessed,),
    )


SHARDS = {
    "shards.train": "training samples",
    "shards.valid": "samples of the valid split",
    "shards.test": "samples of the test split",
    "shards.bytes_per_sample": "bytes of a sample as it is stored",
    "shards.decoded_bytes_per_sample": "bytes of a sample when it is decoded, as it is cached",
    "shards.group_rows": "rows of a Parquet row group",
    "shards.files": "Parquet files",
}
MODEL = {
    "model.parameters": "parameters that are trained",
    "model.flops": "FLOPs of a sample in a training step, forward and backward (2 for a multiplication with addition)",
    "model.batch_size": "samples of the global batch",
    "model.epochs": "epochs",
    "model.kernels": "operations of a step",
    "model.activation_bytes": "bytes of a sample kept from forward to backward",
    "model.small_messages": "small all-reduces of a step: two for every synchronised batch normalisation",
    "model.optimizer_numbers": "numbers that the optimizer keeps per parameter: SGD with momentum 1, Adam 2",
}


def stored(shards: Shards, given: Mapping[str, float]) -> Shards:
    """The corpus with some of its facts changed; the number of files follows its size unless it is given."""
    samples = {split: int(given.get(f"shards.{split}", shards.samples[split])) for split in SPLITS}
    plain = {
        name: float(given.get(f"shards.{name}", getattr(shards, name)))
        for name in ("bytes_per_sample", "decoded_bytes_per_sample", "group_rows")
    }
    files = shards.files
    if samples != shards.samples or plain["bytes_per_sample"] != shards.bytes_per_sample:
        files = math.ceil(sum(samples.values()) * plain["bytes_per_sample"] / _BYTES_OF_A_FILE)
    return Shards(samples, **plain, files=int(given.get("shards.files", files)), known=shards.known)


def of_numbers(values: Mapping[str, float]) -> Workload:
    """A workload of which only totals are known. values: model.* and shards.*, see docs/planning.md."""
    needed = ("model.parameters", "model.flops", "model.batch_size", "shards.train", "shards.bytes_per_sample")
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(
            "name an experiment file, or describe the work in numbers; missing: "
            + ", ".join(f"--set {name}=NUMBER" for name in missing)
        )
    parameters = values["model.parameters"]
    kernels = values.get("model.kernels", 1000)
    saved = values.get("model.activation_bytes", 0.0)
    ops = Ops.single(values["model.flops"], 3 * saved, kernels)
    small = int(values.get("model.small_messages", 0))
    size = np.array([[FLOAT * parameters, *[2048.0] * small], [0.0] * (1 + small)])
    none = Messages(np.zeros(0), np.zeros((2, 0)))
    alone = Step(ops, none, (0.0, saved), parameters, FLOAT * parameters)
    decoded = values.get("shards.decoded_bytes_per_sample", values["shards.bytes_per_sample"])
    shards = Shards(dict.fromkeys(SPLITS, 0), 0.0, decoded, _ROWS_OF_A_GROUP, 0, False)
    return Workload(
        title="work described in numbers",
        parameters=parameters,
        slots=int(values.get("model.optimizer_numbers", 1)),
        alone=alone,
        shared=replace(alone, messages=Messages(np.ones(1 + small), size)),
        forward=Ops.single(values["model.flops"] / 3, saved, kernels / 3),
        forward_bytes=(0.0, saved / max(kernels / 3, 1)),
        input_bytes=decoded,
        shards=stored(shards, values),
        batch_size=int(values["model.batch_size"]),
        epochs=int(values.get("model.epochs", 1)),
        cache="off",
        batch_norm="sync" if small else "none",
    )
