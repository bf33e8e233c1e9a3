"""The one training loop. It cannot tell whether Ray, torchrun or nobody started it.

Once per phase:  forward -> losses -> backward -> sum gradients over workers -> method.adjust -> optimizer.step
Once per epoch:  sums over workers -> evaluate valid -> method.decide (rank 0) -> broadcast -> method.apply -> records

Everything random is a pure function of (seed, step), so a checkpoint needs no generator state, and a run that was
interrupted and resumed equals one that was not, bit for bit, on the same number of workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.config import Experiment
from counterpoise.contracts import (
    LABEL,
    Batch,
    Comm,
    ConfigError,
    DataError,
    DataSource,
    Decision,
    EpochContext,
    EpochStats,
    Interrupted,
    Moved,
    NonFiniteLossError,
    Outputs,
    Record,
    RefusedError,
    SplitStats,
    Stage,
    Step,
)
from counterpoise.data.plan import generator, rank_slice
from counterpoise.engine import checkpoint
from counterpoise.engine.evaluate import (
    Accumulator,
    evaluate,
    predict,
    prediction_columns,
    predictions,
    split_stats,
)
from counterpoise.engine.feed import on_device
from counterpoise.engine.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from counterpoise.engine.probe import probe_logits, with_probes
from counterpoise.engine.run import RunFolder
from counterpoise.engine.watchdog import WINDOW, Pace, Watch
from counterpoise.functional import accuracy_gap, derived_seed
from counterpoise.methods import METHODS, Method, Setting
from counterpoise.models.compute import prepare
from counterpoise.models.encoders import DEFAULT_ENCODERS, EncoderConfig
from counterpoise.models.network import MultimodalNet, build_network
from counterpoise.models.norm import BATCH_NORMS, has_batch_norm, synchronise_batch_norm
from counterpoise.storage import join

CONTROL_INTERVAL_S = 0.7  # how often workers agree on whether to stop or to write a checkpoint


@dataclass(frozen=True)
class RunOptions:
    """How to run; nothing here changes a number."""

    device: str = "cpu"
    checkpoint_every_s: float = 60.0
    resume: bool = False
    stop: Callable[[], str | None] | None = None  # rank 0's own wish to stop, e.g. after a signal
    until: int | None = None  # the epoch after which the run is interrupted, on every worker; None: the last
    on_epoch: Callable[[Progress], None] | None = None  # after every epoch but the last, and its checkpoint; may raise
    move: Callable[[], str | None] | None = None  # rank 0's wish to go on with other workers, and why: `Moved`
    after: str = ""  # why this is a continuation, for the records
    watch: Watch = field(default_factory=Watch)  # gets to know what this worker is doing


@dataclass
class Progress:
    """Where a run stands; all of it goes into a checkpoint."""

    epoch: int = 1
    batch: int = 0  # next batch of the epoch
    step: int = 0  # batches done over the run
    history: list[EpochStats] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_name: str = ""  # of its checkpoint
    best_accuracy: float = -1.0
    samples: int = 0
    train_s: float = 0.0
    data_wait_s: float = 0.0
    wall_s: float = 0.0
    epoch_start: tuple[float, float] = (0.0, 0.0)  # train_s and data_wait_s when the epoch began
    skipped: dict[str, list[str]] = field(default_factory=dict)  # ids of rows that did not decode, by split

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Progress:
        history = [
            EpochStats(
                h["epoch"], SplitStats(**h["train"]), SplitStats(**h["valid"]) if h["valid"] else None, h["stage"]
            )
            for h in data["history"]
        ]
        return cls(**{**data, "history": history, "epoch_start": tuple(data["epoch_start"])})


def encoder_configs(experiment: Experiment, data: DataSource) -> dict[str, EncoderConfig]:
    """The encoder of every modality in use: the experiment's, or the usual one of its kind."""
    return {
        name: experiment.modalities.get(name) or EncoderConfig(name=DEFAULT_ENCODERS[data.inputs[name].kind])
        for name in data.modalities
    }


def make_method(experiment: Experiment, data: DataSource, comm: Comm) -> Method[Any]:
    kind = METHODS[experiment.method_name]
    if len(data.modalities) < kind.min_modalities:
        raise ConfigError(f"method {experiment.method_name} needs {kind.min_modalities} modalities or more")
    setting = Setting(tuple(data.modalities), len(data.classes), experiment.epochs, experiment.seed)
    return kind(experiment.method, setting, comm)


def epoch_plan(stages: Sequence[Stage]) -> list[tuple[Stage, int]]:
    """The stage of every epoch of a run, and which of the stage's epochs (1-based) it is."""
    return [(stage, epoch) for stage in stages for epoch in range(1, stage.epochs + 1)]


def schedule_clock(plan: Sequence[tuple[Stage, int]]) -> list[tuple[int, int]]:
    """For every epoch of a plan: its place (1-based) in the schedule of the learning rate, and the schedule's length.

    Stages without a schedule of their own share one. An epoch aside has the place that the epochs after it will have.
    """
    total = sum(not (stage.aside or stage.own_schedule) for stage, _ in plan)
    clock, done = [], 0
    for stage, epoch in plan:
        if stage.own_schedule:
            clock.append((epoch, stage.epochs))
        elif stage.aside:
            clock.append((min(done + epoch, total), total))
        else:
            done += 1
            clock.append((done, total))
    return clock


def make_network(
    experiment: Experiment, data: DataSource, method: Method[Any], pretrained: bool = True
) -> MultimodalNet:
    """The network of an experiment at its start, on the CPU.

    pretrained: False leaves weights of files unread, for a network whose weights come from a checkpoint.
    """
    configs = encoder_configs(experiment, data)
    net = build_network(data.inputs, configs, method.head, experiment.seed, pretrained, experiment.compute)
    method.attach(net)
    return net


class Trainer:
    """One worker's part of one run."""

    def __init__(
        self,
        experiment: Experiment,
        data: DataSource,
        comm: Comm,
        folder: RunFolder | None,
        options: RunOptions,
    ) -> None:
        assert (folder is not None) == (comm.rank == 0), "rank 0, and only rank 0, writes to the run folder"
        self.experiment = experiment
        self.data = data
        self.comm = comm
        self.folder = folder
        self.options = options
        self.device = torch.device(options.device)
        self.method = make_method(experiment, data, comm)
        self.one_backward = type(self.method).backward is Method.backward
        self.net = make_network(experiment, data, self.method)
        self.local_statistics = comm.world > 1 and experiment.batch_norm == "local" and has_batch_norm(self.net)
        if comm.world > 1 and experiment.batch_norm == "sync":
            synchronise_batch_norm(self.net, comm)
        self.net.to(self.device)
        prepare(self.net.encoders, experiment.compute)
        self.optimizer = self._new_optimizer()
        self.plan = epoch_plan(self.method.stages())
        self.clock = schedule_clock(self.plan)
        self.before_aside: dict[str, dict[str, Tensor]] | None = None  # what a stage aside will be undone to
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.bounds = list(data.bounds())
        self._check_parts()
        self.progress = Progress()
        self.sums = Accumulator(self.device)
        self.rng = torch.Generator()
        self._fallbacks: list[tuple[str, str]] = []
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._control_in = 1
        self._last_save = self._session_start = time.monotonic()
        self._saved: dict[str, float] | None = None  # the last checkpoint of this session
        self._batches_here = 0
        self.watch = options.watch
        self.pace = Pace()
        self._paced = 0  # the step after which workers were last compared

    def _check_parts(self) -> None:
        """Every worker must have a row for every part of every batch, and no statistics may depend on workers."""
        parts = self.experiment.compute.parts
        if parts > 1 and self.experiment.batch_norm == "sync" and has_batch_norm(self.net):
            raise ConfigError(
                f"compute.parts is {parts}, and batch normalisation takes its statistics from a part, which rows share "
                "one depends on the number of workers: choose compute.parts=1, or say batch_norm=local"
            )
        smallest = min(end - start for start, end in pairwise(self.bounds)) // self.comm.world
        if parts > smallest:
            raise ConfigError(
                f"compute.parts is {parts}, but a worker has {smallest} samples of the smallest batch; "
                "choose fewer parts"
            )

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.experiment.optim, self.net, self.method.lr_groups(self.net))

    @property
    def epochs(self) -> int:
        """Epochs of all stages, those aside included."""
        return len(self.plan)

    @property
    def learning_rate(self) -> float:
        """The base learning rate of the present epoch."""
        return learning_rate(self.experiment.optim, *self.clock[self.progress.epoch - 1])

    # --- one batch

    def train_batch(self, batch: Batch) -> None:
        """All updates of one global batch; `batch` is this worker's part of it."""
        progress, labels = self.progress, batch[LABEL]
        size = self.bounds[progress.batch + 1] - self.bounds[progress.batch]
        start, _ = rank_slice(0, size, self.comm.rank, self.comm.world)
        stage, stage_epoch = self.plan[progress.epoch - 1]
        merged = Outputs({}, {})
        step = None
        for index, phase in enumerate(self.method.phases(progress.epoch)):
            seed = derived_seed(self.experiment.seed, "step", progress.step, index)
            self.rng.manual_seed(seed)
            torch.manual_seed(derived_seed(seed, self.comm.rank))  # dropout and the like: per worker
            step = Step(
                progress.epoch,
                progress.batch,
                progress.step,
                phase,
                size,
                len(labels) / size,
                self.rng,
                start,
                len(self.bounds) - 1,
                stage,
                stage_epoch,
            )
            self.optimizer.zero_grad(set_to_none=not self.experiment.optim.legacy_zero_grad_step)
            out = self.method.forward(self.net, batch, step)
            losses = self.method.losses(out, batch, step)
            if self.one_backward:
                self.comm.begin_gradients(phase)
            self.method.backward(self.net, losses, step)
            local = torch.stack([loss.detach() for loss in losses.values()]) * step.share
            values = self.comm.sum_gradients(self.parameters, local)
            self._watch(values, list(losses), out, batch, phase)
            coefficients = self.method.adjust(self.net, out, batch, step)
            self.optimizer.step()
            for name, value in zip(losses, values.unbind(), strict=True):
                self.sums.add(f"loss/{name}", value.double() * size)
            for name, coefficient in coefficients.items():
                known = coefficient.detach() if isinstance(coefficient, Tensor) else coefficient
                self.sums.add(f"coefficient/{name}", known * step.share * size)
            merged.unimodal.update({name: z.detach() for name, z in out.unimodal.items()})
            merged.fused = out.fused.detach() if out.fused is not None else merged.fused
        assert step is not None, "a method has at least one phase"
        self.method.end_batch(self.net, step)
        with torch.no_grad():
            self.sums.add("samples", len(labels))
            self.sums.add_predictions(predictions(self.net, self.method, merged), labels)

    def _watch(self, values: Tensor, names: list[str], out: Outputs, batch: Batch, phase: str) -> None:
        """Notice a loss that is not finite: at once on the CPU, within a control interval on a GPU."""
        bad = ~torch.isfinite(values).all()
        if self.device.type == "cpu":
            if bad:
                broken = [name for name, ok in zip(names, torch.isfinite(values).tolist(), strict=True) if not ok]
                culprits = self.comm.gather(_first_non_finite(self.net, out, batch))
                text = self._non_finite_text(f"loss {', '.join(broken)}", phase, culprits or [])
                raise NonFiniteLossError(text)
        else:
            now = torch.full_like(self.bad_step, self.progress.step)
            self.bad_step = torch.where((self.bad_step < 0) & bad, now, self.bad_step)

    def _check_finite(self) -> None:
        if self.device.type != "cpu" and int(self.bad_step) >= 0:
            broken = [n for n, m in self.net.encoders.items() if not _finite_parameters(m)]
            culprits = [f"weights of the {name} encoder" for name in broken]
            raise NonFiniteLossError(self._non_finite_text("loss", "", culprits, int(self.bad_step)))

    def _check_weights(self) -> None:
        """Weights that are not finite are never kept: a gradient can be broken where the loss was not."""
        parameters = dict(self.net.named_parameters())
        if bool(torch.stack([torch.isfinite(p).all() for p in parameters.values()]).all()):
            return
        broken = [f"{name} encoder" for name, m in self.net.encoders.items() if not _finite_parameters(m)]
        broken += [name for name, p in parameters.items() if not torch.isfinite(p).all()]
        raise NonFiniteLossError(self._non_finite_text("a weight", "", [broken[0]], max(self.progress.step - 1, 0)))

    def _non_finite_text(self, what: str, phase: str, culprits: list[Any], step: int | None = None) -> str:
        found = next((c for c in culprits if c), None)
        kept = checkpoint.committed(self.folder.checkpoints) if self.folder is not None else []
        where = f"epoch {self.progress.epoch}, step {self.progress.step if step is None else step}"
        return (
            f"{what} is not finite in {where}"
            + (f", phase {phase}" if phase and phase != "joint" else "")
            + (f"; first seen in the {found}" if found else "")
            + (f"; checkpoint {kept[-1]} is kept" if kept else "")
            + ". Lower optim.lr, or check the data of that modality."
        )

    # --- one epoch

    def run(self) -> dict[str, Any] | None:
        """Train to the end and test; the summary, on rank 0."""
        self._begin()
        until = min(self.epochs, self.options.until or self.epochs)
        while self.progress.epoch <= until:
            self._train_epoch()
            self._end_epoch()
            if self.options.on_epoch and self.progress.epoch <= self.epochs:
                self.options.on_epoch(self.progress)
        if until < self.epochs:
            self._status(state="interrupted", force=True)
            self.comm.barrier()
            raise Interrupted(f"stopped after epoch {until} of {self.epochs}, as asked; continue with --resume")
        return self._finish()

    def _begin(self) -> None:
        if not (self.options.resume and self._restore()):
            self.comm.broadcast_tensors([*self.net.parameters(), *self.net.buffers()])
            self._record(
                {
                    "kind": "start",
                    "run": self.folder.name if self.folder else "",
                    "method": self.experiment.method_name,
                    "corpus": self.experiment.corpus,
                    "protocol": self.experiment.protocol,
                    "modalities": list(self.data.modalities),
                    "classes": list(self.data.classes),
                    "epochs": self.epochs,
                    "stages": [
                        {"name": s.name, "epochs": s.epochs, **({"aside": True} if s.aside else {})}
                        for s, epoch in self.plan
                        if epoch == 1
                    ],
                    "batches": len(self.bounds) - 1,
                    "samples": {split: self.data.num_samples(split) for split in ("train", "valid", "test")},
                    "parameters": sum(p.numel() for p in self.net.parameters()),
                    "workers": self.comm.world,
                    "device": str(self.device),
                    "seed": self.experiment.seed,
                }
            )
        self.watch.at(self.progress.step)
        self._status(force=True)

    def _train_epoch(self) -> None:
        progress = self.progress
        if progress.batch == 0:
            progress.epoch_start = (progress.train_s, progress.data_wait_s)
            self.sums = Accumulator(self.device)
            stage, stage_epoch = self.plan[progress.epoch - 1]
            if stage_epoch == 1:
                self._begin_stage(stage)
            self.method.begin_epoch(self.net, self._context())
        set_learning_rate(self.optimizer, self.learning_rate, self.method.lr_scales())
        self.net.train()
        num_batches = len(self.bounds) - 1
        batches = on_device(self.data, self.data.train_batches(progress.epoch, progress.batch), self.device)
        clock = time.perf_counter()
        for batch in batches:
            arrived = time.perf_counter()
            progress.data_wait_s += arrived - clock
            self.train_batch(batch)
            progress.samples += self.bounds[progress.batch + 1] - self.bounds[progress.batch]
            progress.batch += 1
            progress.step += 1
            self._batches_here += 1
            self.watch.end_step()
            self.watch.at(progress.step)
            now = time.perf_counter()
            progress.train_s += now - clock
            if progress.batch < num_batches:
                self._control()
            clock = time.perf_counter()
        if progress.batch != num_batches:
            raise DataError(
                f"epoch {progress.epoch} gave {progress.batch} batches on rank {self.comm.rank}, expected {num_batches}"
            )
        if progress.epoch < min(self.epochs, self.options.until or self.epochs):
            self.data.expect(progress.epoch + 1)  # read while this epoch is evaluated

    def _context(self) -> EpochContext:
        stage, stage_epoch = self.plan[self.progress.epoch - 1]
        return EpochContext(self.progress.epoch, stage, stage_epoch, tuple(self.progress.history), self._read)

    def _read(self, split: str, fraction: float) -> Iterator[Batch]:
        """`EpochContext.batches`."""
        if split not in ("train", "valid"):
            raise ValueError(f"a method may read train and valid, not {split!r}")
        total, rows = self.data.num_samples(split), None
        if not total:
            return  # a corpus without this split
        if fraction < 1:
            draw = generator("subset", self.experiment.seed, split, self.progress.epoch)
            rows = sorted(draw.choice(total, max(1, round(fraction * total)), replace=False).tolist())
        yield from on_device(self.data, self.data.batches(split, rows), self.device)

    def _begin_stage(self, stage: Stage) -> None:
        if stage.aside:
            tensors = {"model": self.net.state_dict(), "optimizer": optimizer_state(self.optimizer, self.net)}
            self.before_aside = {kind: {k: v.clone() for k, v in part.items()} for kind, part in tensors.items()}
        if stage.begin == "best" and self.progress.best_epoch:  # its name is known on rank 0 only
            load_model(self.net, self._selected())
        if stage.fresh_optimizer:
            self.optimizer = self._new_optimizer()

    def _end_stage(self, stage: Stage) -> None:
        if stage.aside:
            assert self.before_aside is not None, "a stage aside keeps what was before it"
            self.net.load_state_dict(self.before_aside["model"])
            self.optimizer = self._new_optimizer()
            load_optimizer_state(self.optimizer, self.net, self.before_aside["optimizer"])
            self.before_aside = None

    def _end_epoch(self) -> None:
        progress, experiment = self.progress, self.experiment
        self._check_finite()
        self._check_weights()
        if self.local_statistics:
            average_statistics(self.net, self.comm)
        self.method.before_evaluation(self.net, self._context())
        sums = self.sums.reduce(self.comm)
        train = split_stats(sums)
        self._collect_skipped()
        valid = None
        if self.data.num_samples("valid"):
            valid = evaluate(self.net, self.method, self.data, "valid", self.comm, self.device)
            self._collect_skipped()
            self._check_count("valid", valid.samples)
            if math.isnan(valid.loss):  # infinite is what a confident mistake costs; this is no number
                raise NonFiniteLossError(self._non_finite_text("loss on valid", "", [_without_number(valid)]))
        stage, stage_epoch = self.plan[progress.epoch - 1]
        progress.history.append(EpochStats(progress.epoch, train, valid, stage.name))
        accuracy = valid.accuracy["fused"] if valid else 0.0
        better = experiment.select == "last" or valid is None or accuracy > progress.best_accuracy
        if better and stage.selectable and not stage.aside:
            progress.best_epoch, progress.best_accuracy = progress.epoch, accuracy
            self._save_best()
        self._record(self._epoch_record(train, valid, sums))
        self.method.end_epoch(self.net, self._context())
        decision = self.method.decide(progress.history) if self.comm.rank == 0 else None
        shared = self.comm.broadcast(decision.to_json() if decision else None)
        if shared is not None:
            self.method.apply(self.net, Decision.from_json(shared))
            record = {"kind": "decision", **shared, "classifiers": self.method.num_classifiers(self.net)}
            progress.decisions.append(record)
            self._record(record)
        if stage_epoch == stage.epochs:
            self._end_stage(stage)
        progress.epoch += 1
        progress.batch = 0
        self.sums = Accumulator(self.device)
        self._control(force_save=True)

    def _epoch_record(self, train: SplitStats, valid: SplitStats | None, sums: dict[str, float]) -> Record:
        progress = self.progress
        seconds = progress.train_s - progress.epoch_start[0]
        coefficients = {
            name.removeprefix("coefficient/"): value / max(train.samples, 1)
            for name, value in sums.items()
            if name.startswith("coefficient/")
        }
        weights = self.method.classifier_weights(self.net)
        return {
            "kind": "epoch",
            "epoch": progress.epoch,
            "stage": self.plan[progress.epoch - 1][0].name,
            "lr": self.learning_rate,
            "train": _split_record(train) | {"losses": {k: v / max(train.samples, 1) for k, v in train.losses.items()}},
            "valid": _split_record(valid) if valid else None,
            "gap": accuracy_gap((valid or train).accuracy),
            "classifiers": self.method.num_classifiers(self.net),
            **({"classifier_weights": weights} if weights else {}),
            "coefficients": coefficients,
            "best_epoch": progress.best_epoch,
            "seconds": seconds,
            **({"rank_step_s": self.pace.seconds} if self.pace.seconds else {}),
            "data_wait_s": progress.data_wait_s - progress.epoch_start[1],
            "samples_per_s": train.samples / seconds if seconds > 0 else 0.0,
        }

    def _collect_skipped(self) -> None:
        """Bring rows that could not be decoded to the ledger on rank 0, each once."""
        gathered = self.comm.gather(self.data.skipped())
        if gathered is None:
            return
        new = []
        for row in (row for rows in gathered for row in rows):
            known = self.progress.skipped.setdefault(row["split"], [])
            if row["sample_id"] not in known:
                known.append(row["sample_id"])
                new.append(row)
        if new and self.folder is not None:
            written = {(row["split"], row["sample_id"]) for row in self.folder.ledger()}  # before a crash
            self.folder.append_ledger([row for row in new if (row["split"], row["sample_id"]) not in written])
            self._record({"kind": "event", "event": "skipped_rows", "count": len(new), "first": new[0]})

    def _check_count(self, split: str, samples: int) -> None:
        """Evaluation must have seen every row that decodes."""
        if self.comm.rank == 0:
            expected = self.data.num_samples(split) - len(self.progress.skipped.get(split, []))
            if samples != expected:
                raise DataError(f"split {split}: {samples} rows evaluated, {expected} expected")

    # --- stopping, checkpoints, records

    def _control(self, force_save: bool = False) -> None:
        """Every so often all workers agree, through rank 0, whether to write a checkpoint or to stop."""
        self._control_in -= 1
        if self._control_in > 0 and not force_save:
            return
        self._check_finite()
        message = None
        if self.folder is not None:
            now = time.monotonic()
            per_batch = (now - self._session_start) / max(self._batches_here, 1)
            stop = (self.options.stop() if self.options.stop else None) or self.folder.stop_requested()
            move = None if stop or self.progress.epoch > self.epochs or not self.options.move else self.options.move()
            message = {
                "stop": stop,
                "move": move,
                "save": bool(stop or move) or force_save or now - self._last_save >= self.options.checkpoint_every_s,
                "next": max(1, min(200, math.floor(CONTROL_INTERVAL_S / max(per_batch, 1e-4)))),
            }
        message = self.comm.broadcast(message)
        self._control_in = message["next"]
        if message["save"]:
            self._check_weights()
            self._save()
        self._compare_pace()
        finished = self.progress.epoch > self.epochs
        if message["move"]:
            self._status(force=True)
            self.comm.barrier()
            raise Moved(f"going on elsewhere after step {self.progress.step}: {message['move']}", message["move"])
        if message["stop"] and not finished:
            self._record({"kind": "event", "event": "interrupted", "reason": message["stop"], **self._where()})
            self._status(state="interrupted", force=True)
            self.comm.barrier()  # nobody leaves before rank 0 has written all of it
            raise Interrupted(
                f"stopped ({message['stop']}) in epoch {self.progress.epoch} of {self.epochs} "
                f"after step {self.progress.step}; a checkpoint is written, continue with --resume"
            )
        self._status()

    def _compare_pace(self) -> None:
        """Now and then, all workers at once: who needs longer for a step than the others?"""
        if self.comm.world == 1 or self.progress.step - self._paced < WINDOW:
            return
        self._paced = self.progress.step
        seconds = self.comm.gather(self.watch.take_own())
        for event in self.pace.compare(seconds) if seconds is not None else ():
            self._record({"kind": "event", **event, **self._where()})

    def _where(self) -> dict[str, int]:
        return {"epoch": self.progress.epoch, "batch": self.progress.batch, "step": self.progress.step}

    def _record(self, record: Record) -> None:
        if self.folder is not None:
            self.folder.append(record)

    def _status(self, state: str = "running", force: bool = False) -> None:
        if self.folder is None:
            return
        progress, num_batches = self.progress, len(self.bounds) - 1
        elapsed = time.monotonic() - self._session_start
        left = num_batches * self.epochs - progress.step
        losses = [value for name, value in self.sums.state().items() if name.startswith("loss/")]
        self.folder.write_status(
            {
                "state": state,
                "method": self.experiment.method_name,
                "epoch": min(progress.epoch, self.epochs),
                "epochs": self.epochs,
                "stage": self.plan[min(progress.epoch, self.epochs) - 1][0].name,
                "batch": progress.batch,
                "batches": num_batches,
                "loss": sum(losses) / self.bounds[progress.batch] if losses else None,
                "samples_per_s": progress.samples / progress.train_s if progress.train_s else None,
                "eta_s": elapsed / self._batches_here * left if self._batches_here else None,
                "workers": self.comm.world,
                # Sums over the run, for rates; what a resumed run does again is in them once.
                "step": progress.step,
                "samples": progress.samples,
                "train_s": progress.train_s,
                "data_wait_s": progress.data_wait_s,
                "checkpoint": self._saved,
                **({"rank_step_s": self.pace.seconds} if self.pace.seconds else {}),
            },
            force=force,
        )

    def _state(self) -> dict[str, Any]:
        elapsed = time.monotonic() - self._session_start
        return {
            "format": 1,
            "digest": self.experiment.digest,
            "world": self.comm.world,
            "progress": {**self.progress.to_json(), "wall_s": self.progress.wall_s + elapsed},
            "sums": [],
            "stages": self._stages_so_far(),
            "architecture": self.net.head.architecture(),
            "method": self.method.state_dict(),
            "zero_gradients": self._zero_gradients(),
            "num_records": self.folder.num_records if self.folder else 0,
        }

    def _stages_so_far(self) -> list[list[Any]]:
        """The plan up to and including the present epoch: what another number of epochs must leave as it is."""
        return [[stage.name, epoch] for stage, epoch in self.plan[: self.progress.epoch]]

    def _zero_gradients(self) -> list[str]:
        """Names of the parameters that `legacy_zero_grad_step` moves although a phase does not touch them."""
        if not self.experiment.optim.legacy_zero_grad_step:
            return []
        return [name for name, p in self.net.named_parameters() if p.grad is not None]

    def _save(self) -> None:
        """A complete checkpoint of this moment, written by rank 0."""
        sums = self.comm.gather(self.sums.state())
        buffers = self.comm.gather(_float_buffers(self.net)) if self.local_statistics else None
        if self.folder is None:
            return
        tensors = {
            "model": dict(self.net.state_dict()),
            "optimizer": optimizer_state(self.optimizer, self.net),
        }
        for rank, values in enumerate(buffers or []):
            tensors[f"statistics-{rank}"] = values
        for kind, values in (self.before_aside or {}).items():
            tensors[f"aside-{kind}"] = values
        name = f"step-{self.progress.step:08d}"
        began = time.monotonic()
        with self.watch.waiting("writing a checkpoint"):
            checkpoint.save(self.folder.checkpoints, name, tensors, self._state() | {"sums": sums})
        self._last_save = time.monotonic()
        seconds = self._last_save - began
        self._saved = {"time": time.time(), "seconds": seconds, "step": self.progress.step}

    def _save_best(self) -> None:
        if self.folder is not None:
            state = {
                "format": 1,
                "epoch": self.progress.epoch,
                "architecture": self.net.head.architecture(),
                "classifiers": self.method.num_classifiers(self.net),
            }
            name, model = f"epoch-{self.progress.epoch:05d}", dict(self.net.state_dict())
            with self.watch.waiting("writing the best epoch"):
                place = checkpoint.save(self.folder.best, name, {"model": model}, state, keep=3)
            self.progress.best_name = place.rstrip("/").rsplit("/", 1)[-1]

    def _restore(self) -> bool:
        """Continue from the last good checkpoint, if there is one."""
        found = None
        if self.folder is not None:
            found = checkpoint.latest(self.folder.checkpoints, self._report_fallback)
        found = self.comm.broadcast(found)  # other machines need no access to the folder
        if found is None:
            if self.folder is not None:
                self.folder.truncate_records(0)
            return False
        tensors, state = found.tensors, found.state
        self.progress = Progress.from_json(state["progress"])
        if state["stages"] != self._stages_so_far():
            raise RefusedError(
                f"method {self.experiment.method_name} divides {self.experiment.epochs} epochs into other stages than "
                f"the run has been through; continue it with the number of epochs it was started with"
            )
        self.net.head.restore(state["architecture"])
        self.net.load_state_dict(tensors["model"])
        load_optimizer_state(self.optimizer, self.net, tensors["optimizer"])
        self.method.load_state_dict(state["method"])
        for name in state.get("zero_gradients", ()):
            parameter = self.net.get_parameter(name)
            parameter.grad = torch.zeros_like(parameter)
        aside = {kind: tensors[f"aside-{kind}"] for kind in ("model", "optimizer") if f"aside-{kind}" in tensors}
        self.before_aside = aside or None
        if len(state["sums"]) == self.comm.world:
            self.sums.load(state["sums"][self.comm.rank])
            if self.local_statistics and f"statistics-{self.comm.rank}" in tensors:
                self.net.load_state_dict(tensors[f"statistics-{self.comm.rank}"], strict=False)
        else:
            self.sums.load(_merge_sums(state["sums"], self.comm.rank))
        if self.folder is not None:
            self.folder.truncate_records(state["num_records"])
            for name, reason in self._fallbacks:
                self._record({"kind": "event", "event": "checkpoint_fallback", "name": name, "reason": reason})
            resumed = {"kind": "event", "event": "resumed", **self._where(), "workers": self.comm.world}
            if state["world"] != self.comm.world:
                resumed["workers_before"] = state["world"]
            self._record(resumed | ({"after": self.options.after} if self.options.after else {}))
        return True

    def _report_fallback(self, name: str, reason: str) -> None:
        self._fallbacks.append((name, reason))

    def _selected(self) -> checkpoint.Checkpoint:
        """The checkpoint of the epoch selected so far, on every worker."""
        found = checkpoint.load(join(self.folder.best, self.progress.best_name)) if self.folder is not None else None
        selected: checkpoint.Checkpoint = self.comm.broadcast(found)
        return selected

    def _finish(self) -> dict[str, Any] | None:
        self._status(force=True)
        state = load_model(self.net, self._selected())
        split = "test" if self.data.num_samples("test") else "valid" if self.data.num_samples("valid") else "train"
        found = predict(self.net, self.method, self.data, split, self.comm, self.device)
        if self.method.probe:
            seed = self.experiment.seed
            probes = probe_logits(self.net, self.data, self.data, split, self.comm, self.device, seed)
            found = with_probes(found, probes, replace=True)
        self._collect_skipped()
        if self.folder is None:
            return None
        self._check_count(split, len(found.rows))
        self.folder.write_predictions(prediction_columns(found, self.data, split))
        best = next(h for h in self.progress.history if h.epoch == state["epoch"])
        chosen = best.valid
        wall = self.progress.wall_s + time.monotonic() - self._session_start
        progress = self.progress
        summary = {
            "method": self.experiment.method_name,
            "corpus": self.experiment.corpus,
            "protocol": self.experiment.protocol,
            "modalities": list(self.data.modalities),
            "seed": self.experiment.seed,
            "epochs": self.epochs,
            "selected_epoch": state["epoch"],
            "selection": self._selection(),
            split: {
                "samples": len(found.rows),
                "skipped": len(progress.skipped.get(split, [])),
                **found.metrics(tuple(self.data.modalities)),
            },
            "classifiers": state["classifiers"],
            "decisions": progress.decisions,
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "workers": self.comm.world,
            "device": str(self.device),
            "wall_s": wall,
            "samples_per_s": progress.samples / progress.train_s if progress.train_s else 0.0,
            "data_wait_share": progress.data_wait_s / progress.train_s if progress.train_s else 0.0,
            "digest": self.experiment.digest,
            "group": self.experiment.group,
            "data_fingerprint": self.data.fingerprint,
        }
        if chosen is not None and split != "valid":
            summary["valid"] = {"accuracy": chosen.accuracy, "gap": accuracy_gap(chosen.accuracy)}
        self._record({"kind": "end", "summary": summary})
        return summary

    def _selection(self) -> str:
        if self.experiment.select == "last":
            return "last epoch"
        return f"{self.data.selects_on} accuracy (fused)"


def _split_record(stats: SplitStats) -> dict[str, Any]:
    return {
        "loss": stats.loss,
        "accuracy": stats.accuracy,
        "score": stats.mean_scores,
        "samples": stats.samples,
    }


def _merge_sums(sums: list[dict[str, float]], rank: int) -> dict[str, float]:
    """Sums of another number of workers: global ones everywhere, the total of the others on rank 0."""
    merged: dict[str, float] = {}
    for worker in sums:
        for name, value in worker.items():
            if name.startswith("loss/"):
                merged[name] = value
            elif rank == 0:
                merged[name] = merged.get(name, 0.0) + value
            else:
                merged[name] = 0.0
    return merged


def _without_number(stats: SplitStats) -> str | None:
    """The first modality whose scores are no numbers."""
    return next((f"predictions of {name}" for name, score in stats.scores.items() if math.isnan(score)), None)


def _finite_parameters(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in module.parameters())


def _first_non_finite(net: MultimodalNet, out: Outputs, batch: Batch) -> str | None:
    for name in net.modalities:
        if batch[name].is_floating_point() and not torch.isfinite(batch[name]).all():
            return f"input of {name}"
        if not _finite_parameters(net.encoders[name]):
            return f"weights of the {name} encoder"
        if name in out.features and not torch.isfinite(out.features[name]).all():
            return f"features of {name}"
        if name in out.unimodal and not torch.isfinite(out.unimodal[name]).all():
            return f"logits of {name}"
    return None


def _float_buffers(net: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}": buffer.detach().cpu()
        for prefix, module in net.named_modules()
        if isinstance(module, BATCH_NORMS)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def average_statistics(net: nn.Module, comm: Comm) -> None:
    """Replace running statistics of batch normalisation by their mean over workers."""
    buffers = dict(net.named_buffers())
    for name in _float_buffers(net):
        buffers[name].copy_(comm.sum(buffers[name]) / comm.world)


def load_model(net: MultimodalNet, best: checkpoint.Checkpoint) -> dict[str, Any]:
    """Bring the network into the state of a best-epoch checkpoint; what the checkpoint says about itself."""
    net.head.restore(best.state["architecture"])
    net.load_state_dict(best.tensors["model"])
    return best.state
