"""The arithmetic of a plan: seconds of a step, an epoch and a run on n devices, and what breaks first as n or the
corpus grows. Everything is a function of a `Workload` and `Facts`; nothing is measured here.

    operation   max(FLOPs / (share * peak), bytes / (share * bandwidth)); all of them, or the time to issue them
    all-reduce  start + hops * latency + 2 (n - 1) / n * bytes / bandwidth (ring), or twice the depth of a tree
    step        operations + all-reduces + optimizer + waiting for input: an upper bound, since the
                loop sends gradients while the backward pass goes on
    failures    M e^(R / M) (e^((t + c) / M) - 1) / t: time per time of work (Daly 2006), for failures every M seconds,
                restarts of R and checkpoints of c every t
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from counterpoise.contracts import ConfigError, ResourceError
from counterpoise.planning.facts import Facts
from counterpoise.planning.workload import FLOAT, Messages, Ops, Step, Workload

MOST_DEVICES = 16_384
MOST_BYTES = 1e15  # of a corpus
_TREE_BANDWIDTH = 0.9  # of the ring's, as NCCL's tuning has it


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. wait: what input takes beyond the rest; it is prepared while the step before is computed."""

    compute: float
    gradients: float
    small: float
    packing: float
    optimizer: float
    wait: float

    @property
    def communication(self) -> float:
        return self.gradients + self.small + self.packing

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.optimizer + self.wait

    def to_json(self) -> dict[str, float]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Input:
    """What reading and decoding ask for in an epoch that streams. Seconds per step of each bound; the slowest holds."""

    amplification: float  # bytes read over bytes of the corpus
    bytes_per_worker: float  # in an epoch
    requests_per_worker: float
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def slowest(self) -> float:
        return self.seconds[self.bound]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float  # with gradients, the optimizer's numbers and the message
    activations: float
    evaluation: float  # what the largest operation of a forward pass over a whole global batch holds
    reserved: float

    @property
    def total(self) -> float:
        return self.weights + max(self.activations, self.evaluation) + self.reserved


@dataclass(frozen=True)
class RunTime:
    """Seconds of a run without failures, and what failures make of it."""

    steps: int  # of an epoch
    step: StepTime
    first_epoch_s: float  # what it takes beyond the others: opening the corpus, filling the cache
    evaluation_s: float  # of an epoch
    checkpoint_s: float  # of one
    checkpoints: float  # of an epoch
    epoch_s: float
    quiet_s: float  # the run without failures
    failures: float
    goodput: float  # part of the time that moves the run on: neither checkpoints nor lost work nor restarts
    wall_s: float
    best_interval_s: float
    interval_s: float

    @property
    def checkpoint_share(self) -> float:
        return self.checkpoint_s * self.checkpoints / self.epoch_s


@dataclass(frozen=True)
class Limit:
    """Something that breaks: on which axis, at how much of it, and what helps."""

    axis: str  # devices, fixed batch | devices, growing batch | corpus
    at: float  # devices, or bytes of the corpus
    what: str
    remedy: str


def ring_seconds(size: float, workers: int, hops: float, bandwidth: float) -> float:
    """2 (n - 1) / n * size / bandwidth, and the hops of all steps in seconds."""
    return hops + 2 * (workers - 1) / workers * size / bandwidth


def read_amplification(workers: int, group_rows: float, parts: float = 1) -> float:
    """How often a corpus is read in an epoch by all workers together.

    A worker reads every row group that has a row of its own. Rows are shuffled inside a window, so a group of k rows
    has none of the n * parts shares with probability (1 - 1 / (n parts))^k.
    """
    shares = workers * parts
    return shares * (1 - (1 - 1 / shares) ** group_rows) if shares > 1 else 1.0


def daly_goodput(interval_s: float, checkpoint_s: float, mtbf_s: float, restart_s: float) -> float:
    """Useful part of the time with checkpoints every `interval_s` of work (Daly, A higher order estimate of the optimum
    checkpoint interval, 2006, eq. 13)."""
    exponent = (interval_s + checkpoint_s) / mtbf_s
    if exponent + restart_s / mtbf_s > 500:
        return 0.0
    return interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent))


class Model:
    """A workload on devices of one kind, `per_node` of them in every node. cpu: workers are processes that share the
    cores of their node."""

    def __init__(self, workload: Workload, facts: Facts, per_node: int, cpu: bool = False) -> None:
        self.workload, self.facts, self.per_node, self.cpu = workload, facts, per_node, cpu
        cores = facts["node.cores"].value
        if not cpu and cores <= per_node:
            raise ConfigError(
                f"{per_node} GPUs per node and {cores:g} cores: every GPU's process takes a core and decoding the "
                f"rest; give --cores above {per_node}"
            )

    def n(self, name: str) -> float:
        return self.facts.number(name)

    def nodes(self, workers: int) -> int:
        return -(-workers // self.per_node)

    # --- one device

    @property
    def threads(self) -> float:
        """Cores of one worker of a CPU."""
        return self.n("node.cores") / self.per_node

    def _speed(self) -> float:
        """How many times the facts of `device.*` a worker has: several cores, or a part of one."""
        if not self.cpu:
            return 1.0
        threads = self.threads
        if threads <= 1:
            return threads
        serial = self.n("device.serial_share")
        return 1 / (serial + (1 - serial) / threads)

    def _bandwidth(self) -> float:
        return self.n("device.bytes_per_s") * self.n("device.share") * self._speed()

    def compute_s(self, ops: Ops, samples: float) -> float:
        """All operations of a pass over a batch. A GPU works while Python issues; a CPU does one after the other."""
        flops, traffic = ops.at(samples)
        peak: Any = self.n("device.flops")
        if ops.convolution.any():
            peak = np.where(ops.convolution, self.n("device.convolution_flops"), peak)
        arithmetic = flops / (peak * self.n("device.share") * self._speed())
        work = float((ops.count * np.maximum(arithmetic, traffic / self._bandwidth())).sum())
        issue = ops.kernels * self.n("device.kernel_s") / min(self._speed(), 1)
        return work + issue if self.cpu else max(work, issue)

    def _traffic_s(self, num_bytes: float) -> float:
        return num_bytes / self._bandwidth()

    def optimizer_s(self, step: Step) -> float:
        """One pass over weights, gradients and the optimizer's numbers: read all, write all but the gradients."""
        return self._traffic_s(FLOAT * step.updated * (3 + 2 * self.workload.slots))

    def packing_s(self, step: Step, workers: int) -> float:
        """Gradients are copied into one message and back."""
        return self._traffic_s(4 * step.gradients) if workers > 1 else 0.0

    def memory(self, workers: int, batch: float) -> Memory:
        """Bytes on a device. Evaluation deals out whole global batches: one device gets all of it."""
        w, step = self.workload, self.workload.step(workers)
        copies = 2 + w.slots + (workers > 1)
        local = batch / workers
        return Memory(
            FLOAT * w.parameters * copies,
            step.saved[0] + step.saved[1] * local + 2 * w.input_bytes * local,
            w.forward_bytes[0] + w.forward_bytes[1] * batch + w.input_bytes * batch,
            self.n("device.reserved_bytes"),
        )

    @property
    def device_bytes(self) -> float:
        return self.n("node.memory_bytes") / self.per_node if self.cpu else self.n("device.memory_bytes")

    # --- several

    def all_reduce_s(self, size: float, workers: int) -> float:
        """One all-reduce of `size` bytes among all workers, filling nodes one after the other."""
        if workers == 1:
            return 0.0
        nodes, inside = self.nodes(workers), min(workers, self.per_node)
        # processes of a CPU share one loopback, devices of a node have a link each
        near, far = self.n("node.link_latency_s"), self.n("network.latency_s") if nodes > 1 else 0.0
        bandwidth = self.n("node.link_bytes_per_s") * self.n("node.link_share") if inside > 1 else math.inf
        bandwidth /= inside if self.cpu else 1
        if nodes > 1:
            bandwidth = min(bandwidth, self.n("network.bytes_per_s") * self.n("network.share"))
        start = self.n("collective.start_s") + self.n("collective.call_s") / min(self._speed(), 1)
        ring = ring_seconds(size, workers, 2 * ((workers - nodes) * near + (nodes - 1) * far), bandwidth)
        if not self.n("collective.tree"):
            return start + ring
        tree = 2 * ((inside - 1) * near + math.ceil(math.log2(nodes)) * far) + 2 * size / (_TREE_BANDWIDTH * bandwidth)
        return start + min(ring, tree)

    def messages_s(self, messages: Messages, workers: int, batch: float, largest: float) -> tuple[float, float]:
        """(messages of gradients, all others) of a step."""
        gradients = small = 0.0
        for count, size in zip(messages.count, messages.at(batch), strict=True):
            seconds = count * self.all_reduce_s(float(size), workers)
            if size >= 0.05 * largest:
                gradients += seconds
            else:
                small += seconds
        return gradients, small

    def decode_cores(self, workers: int) -> float:
        """Cores of a node that decode."""
        inside = min(workers, self.per_node)
        cores = self.n("node.cores")
        return min(self.workload.decode_threads * inside, cores if self.cpu else cores - inside)

    def windows(self) -> int:
        w = self.workload
        rows, size = w.shards.samples["train"], w.shards.samples["train"] * w.shards.bytes_per_sample
        return max(1, rows // w.shuffle_window, math.ceil(size / (w.shuffle_mib * 2**20)))

    def input(self, workers: int, batch: float) -> Input:
        """What an epoch that streams asks of cores and store."""
        w, shards = self.workload, self.workload.shards
        rows, steps = shards.samples["train"], self.steps(batch)
        inside, nodes, windows = min(workers, self.per_node), self.nodes(workers), self.windows()
        # Ray's pipelines cut windows into parts, so that all tasks have work
        tasks = 3 * w.decode_threads
        parts = max(1.0, min(tasks, steps) / windows) if nodes > 1 else 1.0
        amplification = read_amplification(workers, shards.group_rows, parts)
        groups = max(1.0, rows / shards.group_rows) * amplification / workers
        opened = shards.files if shards.files <= 8 else windows * parts * min(shards.files, groups / (windows * parts))
        requests = groups + opened * self.n("store.open_requests")
        read = rows * shards.bytes_per_sample * amplification / workers
        local = batch / workers
        seconds = {
            "decoding": local * inside / (self.decode_cores(workers) * self.n("decode.samples_per_core_s")),
            "one connection of a worker": (
                requests * self.n("store.latency_s") + read / self.n("store.stream_bytes_per_s")
            ) / steps,
            "reading of a node": inside * read / min(self.n("store.node_bytes_per_s"), self.n("network.bytes_per_s"))
            / steps,
            "the store's bandwidth": workers * read / self.n("store.total_bytes_per_s") / steps,
            "the store's requests": workers * requests / (self.n("store.get_per_s") * self.n("store.prefixes")) / steps,
        }  # fmt: skip
        return Input(amplification, read, requests, seconds)

    def steps(self, batch: float) -> int:
        return math.ceil(self.workload.shards.samples["train"] / batch)

    def step(self, workers: int, batch: float) -> StepTime:
        """One step on `workers` devices with a global batch of so many samples, in an epoch after the first."""
        w = self.workload
        step, local = w.step(workers), batch / workers
        gradients, small = self.messages_s(step.messages, workers, batch, step.gradients)
        busy = StepTime(
            self.compute_s(step.ops, local),
            gradients,
            small,
            self.packing_s(step, workers),
            self.optimizer_s(step),
            0.0,
        )
        if w.cached:
            inside = min(workers, self.per_node)
            cores = self.threads * inside if self.cpu else self.decode_cores(workers)
            needed = local * inside / (cores * self.n("decode.cached_samples_per_core_s"))
        elif self.cpu:  # the same cores train and decode
            found = self.input(workers, batch)
            work = local / (self.threads * self.n("decode.samples_per_core_s"))
            return replace(
                busy, wait=max(work, max(s for k, s in found.seconds.items() if k != "decoding") - busy.total)
            )
        else:
            needed = self.input(workers, batch).slowest
        return replace(busy, wait=needed if self.cpu else max(0.0, needed - busy.total))

    # --- a run

    def opening_s(self, workers: int) -> float:
        """Every worker opens every shard for its footer, and reads the light columns of every row group, in turn."""
        shards = self.workload.shards
        requests = shards.files * self.n("store.open_requests") + sum(shards.samples.values()) / shards.group_rows
        limit = workers * requests / (self.n("store.get_per_s") * self.n("store.prefixes"))
        return max(requests * self.n("store.latency_s"), limit)

    def filling_s(self, workers: int) -> float:
        """Decoding all of a corpus once, for the cache. On one node every worker does; with Ray, the tasks of one."""
        w = self.workload
        if not w.cached:
            return 0.0
        rows, rate = sum(w.shards.samples.values()), self.n("decode.samples_per_core_s")
        if self.nodes(workers) > 1:
            return rows / (w.decode_threads * rate)
        return workers * rows / (self.decode_cores(workers) * rate)

    def checkpoint_s(self) -> float:
        """Written by rank 0 while the others wait."""
        return self.n("checkpoint.fixed_s") + self.workload.checkpoint_bytes / self.n("checkpoint.bytes_per_s")

    def evaluation_s(self, split: str, workers: int, batch: float) -> float:
        """A pass over a split: blocks of the size of a global batch, dealt to the workers in turn."""
        w = self.workload
        rows = w.shards.samples[split]
        if not rows:
            return 0.0
        turns = math.ceil(math.ceil(rows / batch) / workers)
        block = min(batch, rows)
        rate = self.n("decode.cached_samples_per_core_s" if w.cached else "decode.samples_per_core_s")
        cores = self.threads if self.cpu else self.decode_cores(workers) / min(workers, self.per_node)
        forward, decode = self.compute_s(w.forward, block), block / (cores * rate)
        return turns * (forward + decode if self.cpu else max(forward, decode))

    def mtbf_s(self, workers: int) -> float:
        """Mean seconds between failures of any device, or reclaims of any node."""
        rate = workers / (3600 * self.n("failure.device_mtbf_h"))
        return 1 / (rate + self.nodes(workers) * self.n("failure.preemptions_per_node_day") / 86400)

    def run(self, workers: int, batch: float) -> RunTime:
        w = self.workload
        step, steps = self.step(workers, batch), self.steps(batch)
        training, evaluation = steps * step.total, self.evaluation_s("valid", workers, batch)
        checkpoint = self.checkpoint_s()
        every = self.n("checkpoint.every_s")
        checkpoints = 1 + math.floor(training / every)
        best = self.n("checkpoint.best_share") * FLOAT * w.parameters / self.n("checkpoint.bytes_per_s")
        epoch = training + evaluation + checkpoints * checkpoint + best
        first = self.opening_s(workers) + self.filling_s(workers)
        quiet = first + w.epochs * epoch + self.evaluation_s("test", workers, batch)
        interval = min(every, training + evaluation)
        mtbf = self.mtbf_s(workers)
        restart = self.n("failure.restart_s") + first
        goodput = daly_goodput(interval, checkpoint, mtbf, restart)
        undisturbed = interval / (interval + checkpoint)
        wall = quiet * undisturbed / goodput if goodput else math.inf
        return RunTime(
            steps, step, first, evaluation, checkpoint, checkpoints, epoch, quiet, wall / mtbf if goodput else math.inf,
            goodput, wall, math.sqrt(2 * checkpoint * mtbf), interval,
        )  # fmt: skip

    # --- scaling

    def check(self, workers: int, batch: int) -> None:
        """ConfigError or ResourceError for a plan that cannot run."""
        if batch % workers or workers > batch:
            raise ConfigError(
                f"batch_size {batch} does not divide among {workers} workers, each of which needs a sample at least; "
                f"give --set batch_size={workers * max(1, round(batch / workers))}, or fewer GPUs"
            )
        if batch > self.workload.shards.samples["train"]:
            raise ConfigError(
                f"batch_size {batch}: there are {self.workload.shards.samples['train']:,} training samples"
            )
        needed, there = self.memory(workers, batch), self.device_bytes
        if needed.weights + needed.activations + needed.reserved > there:
            raise ResourceError(
                f"a device has {there / 1e9:.0f} GB and training takes {_gb(needed.weights + needed.activations)} "
                f"besides {_gb(needed.reserved)} that is reserved: {_gb(needed.weights)} for weights, gradients and "
                f"optimizer, {_gb(needed.activations)} for activations of {batch // workers} samples; use more "
                "GPUs, a smaller batch_size, or a device with more memory"
            )
        if needed.total > there:
            raise ResourceError(
                f"a device has {there / 1e9:.0f} GB and evaluating a whole batch of {batch} samples takes "
                f"{_gb(needed.total)}: evaluation deals out whole global batches; use a smaller batch_size"
            )

    def efficiency(self, workers: int, batch: float, growing: bool = False, with_input: bool = False) -> float:
        """Samples per second per device, over those of one. growing: `batch` is that of each device; else it is shared
        among them. with_input: waiting for input counts."""
        one = self.step(1, batch)
        many = self.step(workers, batch * workers if growing else batch)
        first, last = (s.total - (0.0 if with_input else s.wait) for s in (one, many))
        return first / last / (1 if growing else workers)

    def counts(self, most: int = MOST_DEVICES) -> Iterator[int]:
        """1, 2, 4, ... devices."""
        n = 1
        while n <= most:
            yield n
            n *= 2


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


# --- what breaks first

_REMEDY = {
    "decoding": "raise data.decode_threads if cores are idle, else more cores per node",
    "one connection of a worker": "larger row groups than one request is worth, a copy on local disks (--store disk), "
    "or a reader with several connections",
    "reading of a node": "smaller row groups (fewer rows are read for others), or a copy on local disks",
    "the store's bandwidth": "smaller row groups, or a copy on local disks",
    "the store's requests": "spread shards over prefixes (--set store.prefixes=N), larger files, or local disks",
    "issuing operations": "torch.compile or CUDA graphs; larger batches per device",
    "synchronised batch normalisation": "batch_norm: local, or encoders without batch normalisation",
    "the method's own messages": "larger batches per device",
    "gradients": "a faster network, larger batches per device, or reducing gradients while the rest is computed",
    "packing": "larger batches per device",
    "optimizer": "larger batches per device",
    "computing": "larger batches per device",
}


def _part(model: Model, workers: int, batch: float) -> str:
    """What takes most of a step beyond its arithmetic."""
    step, w = model.step(workers, batch), model.workload
    alone = model.compute_s(w.alone.ops, batch / workers)
    issue = w.alone.ops.kernels * model.n("device.kernel_s")
    own = max(step.compute - alone, 0.0) + step.small  # what is only there because there are several workers
    parts = {
        "synchronised batch normalisation" if w.batch_norm == "sync" else "the method's own messages": own,
        "gradients": step.gradients,
        "packing": step.packing,
        "optimizer": step.optimizer,
        "issuing operations": issue if issue >= 0.99 * alone else 0.0,
    }
    return max(parts, key=lambda name: parts[name])


def _first(values: Iterator[int], breaks: Callable[[int], bool]) -> int | None:
    """The least value at which it breaks: found among `values`, then between it and the one before."""
    before = 0
    for value in values:
        if breaks(value):
            low, high = before, value
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if breaks(middle) else (middle, high)
            return high
        before = value
    return None


def limits(model: Model, workers: int, batch: int, per_device: int) -> list[Limit]:
    """What breaks as devices are added, for a batch that stays and for one that grows with them, and as the corpus
    grows on the planned devices; each axis in the order of appearance."""
    return [*_fixed(model, batch), *_growing(model, per_device), *_corpus(model, workers, batch)]


def _sorted(found: list[Limit]) -> list[Limit]:
    return sorted(found, key=lambda limit: limit.at)


def _fixed(model: Model, batch: int) -> list[Limit]:
    axis, found = "devices, fixed batch", []
    for share in (0.8, 0.5):
        at = _first(model.counts(batch), lambda n, share=share: model.efficiency(n, batch) < share)  # type: ignore[misc]
        if at is not None and at > 1:
            part = _part(model, at, batch)
            text = f"efficiency falls below {share:.0%}; besides computing most goes to {part}"
            found.append(Limit(axis, at, text, _REMEDY[part]))
    found.append(Limit(axis, batch + 1, "a worker would have no sample", "a larger batch_size"))
    rows = model.workload.shards.samples["valid"]
    blocks = math.ceil(rows / batch)
    run = model.run(min(blocks + 1, batch), batch)
    if 0 < blocks < batch and run.evaluation_s > 0.1 * run.epoch_s:
        text = f"valid is dealt out in blocks of batch_size: {blocks} blocks keep no more workers busy"
        found.append(Limit(axis, blocks + 1, text, "a smaller batch_size makes more blocks"))
    return _sorted(found)


def _growing(model: Model, per_device: int) -> list[Limit]:
    axis, w = "devices, growing batch", model.workload
    found = []

    def note(breaks: Callable[[int], bool], what: Callable[[int], tuple[str, str]]) -> None:
        at = _first(model.counts(), breaks)
        if at is not None:
            found.append(Limit(axis, at, *what(at)))

    for share in (0.8, 0.5):
        note(
            lambda n, share=share: n > 1 and model.efficiency(n, per_device, growing=True) < share,  # type: ignore[misc]
            lambda n, share=share: (  # type: ignore[misc]
                f"efficiency falls below {share:.0%}; besides computing most goes to {_part(model, n, n * per_device)}",
                _REMEDY[_part(model, n, n * per_device)],
            ),
        )
    if not w.cached:
        for bound in model.input(1, per_device).seconds:

            def slow(n: int, bound: str = bound) -> bool:
                step = model.step(n, n * per_device)
                return model.input(n, n * per_device).seconds[bound] > 1.1 * (step.total - step.wait)

            note(slow, lambda n, bound=bound: (  # type: ignore[misc]
                f"input is slower than the devices: {bound}", _REMEDY[bound]))  # fmt: skip
    rows = w.shards.samples["train"]
    note(
        lambda n: rows / (n * per_device) < 20,
        lambda n: ("an epoch has fewer than 20 updates", "more epochs, a smaller batch per device, or fewer devices"),
    )
    note(
        lambda n: model.memory(n, n * per_device).total > model.device_bytes,
        lambda n: (
            f"evaluating a global batch of {n * per_device:,} samples on one device takes more memory than it has",
            "a smaller batch per device",
        ),
    )
    if rows:
        note(
            lambda n: model.run(n, n * per_device).goodput < 0.9,
            lambda n: (
                "checkpoints, failures and restarts take a tenth of the time: one failure every "
                f"{model.mtbf_s(n) / 3600:,.1f} h, a checkpoint of {model.checkpoint_s():.1f} s every "
                f"{model.run(n, n * per_device).interval_s:.0f} s",
                "longer epochs, each of which ends with a checkpoint; faster storage of runs"
                if model.run(n, n * per_device).interval_s < model.n("checkpoint.every_s")
                else f"--checkpoint-every {model.run(n, n * per_device).best_interval_s:.0f}, the best (Young)",
            ),
        )
        note(
            lambda n: model.opening_s(n) > 600,
            lambda n: ("opening the corpus takes more than 10 minutes", "larger row groups and files; more prefixes"),
        )
    nodes, actors = model.n("ray.nodes"), model.n("ray.actors")
    note(
        lambda n: model.nodes(n) > nodes,
        lambda n: (
            f"more nodes than Ray's release tests cover ({nodes:.0f})",
            "try the cluster with counterpoise verify",
        ),
    )
    note(
        lambda n: n > actors,
        lambda n: (
            f"more workers, which are actors, than Ray's release tests cover ({actors:,.0f})",
            "try the cluster with counterpoise verify",
        ),
    )
    return _sorted(found)


def scaled(model: Model, num_bytes: float) -> Model:
    """The same on a corpus of this many bytes, of the same kind."""
    w = model.workload
    whole = sum(w.shards.samples.values()) * w.shards.bytes_per_sample
    factor = num_bytes / whole
    samples = {split: math.ceil(count * factor) for split, count in w.shards.samples.items()}
    files = max(1, math.ceil(w.shards.files * factor))
    return Model(
        replace(w, shards=replace(w.shards, samples=samples, files=files)), model.facts, model.per_node, model.cpu
    )


def _corpus(model: Model, workers: int, batch: int) -> list[Limit]:
    w = model.workload
    size = sum(w.shards.samples.values()) * w.shards.bytes_per_sample
    axis, found = "corpus", []

    def note(breaks: Callable[[Model], bool], what: str, remedy: str) -> None:
        low, high = size, size
        if breaks(model):
            found.append(Limit(axis, size, what, remedy))
            return
        while high < MOST_BYTES:
            low, high = high, high * 2
            if breaks(scaled(model, high)):
                while high / low > 1.02:
                    middle = math.sqrt(low * high)
                    low, high = (low, middle) if breaks(scaled(model, middle)) else (middle, high)
                found.append(Limit(axis, high, what, remedy))
                return

    memory = model.n("node.memory_bytes")
    per_row = model.n("index.bytes_per_row")
    if w.cached and w.cache == "auto":
        note(lambda m: not m.workload.cached, "decoded samples pass data.cache_limit_gib: all epochs read and decode",
             "data.cache_limit_gib, if a worker has the memory; else see reading")  # fmt: skip
    note(lambda m: model.per_node * per_row * sum(m.workload.shards.samples.values()) > memory / 2,
         "ids and places of all rows, which every worker holds, take half of a node's memory",
         "several corpora, or nodes with more memory; fewer workers per node")  # fmt: skip
    note(lambda m: m.opening_s(workers) > 600, "opening the corpus takes more than 10 minutes: every worker reads "
         "all footers", "larger row groups and files, a copy on local disks, more prefixes")  # fmt: skip
    note(lambda m: m.run(workers, batch).epoch_s > 86400, "an epoch takes more than a day", "more devices")
    if not w.cached:

        def slow(m: Model) -> bool:
            step = m.step(workers, batch)
            return step.wait > 0.1 * (step.total - step.wait)

        note(slow, "input is slower than the devices: " + model.input(workers, batch).bound,
             _REMEDY[model.input(workers, batch).bound])  # fmt: skip
    return _sorted(found)


def to_json(model: Model, workers: int, batch: int, per_device: int) -> dict[str, Any]:
    """The plan as plain data."""
    w, run = model.workload, model.run(workers, batch)
    step, memory, source = w.step(workers), model.memory(workers, batch), model.input(workers, batch)

    def row(n: int, size: int, growing: bool) -> dict[str, float]:
        step = model.step(n, n * size if growing else size)
        return {
            "devices": n,
            "step_s": step.total,
            "busy_s": step.total - step.wait,
            "efficiency": model.efficiency(n, size, growing),
            "efficiency_with_input": model.efficiency(n, size, growing, with_input=True),
        }

    return {
        "work": {
            "title": w.title, "parameters": w.parameters, "counted": w.counted, "batch_norm": w.batch_norm,
            "flops_per_sample": step.ops.total_flops(1e6) / 1e6, "operations": step.ops.kernels,
            "bytes_per_sample": step.ops.total_bytes(1e6) / 1e6,
            "all_reduces": step.messages.number if workers > 1 else 0,
            "all_reduce_bytes": step.messages.total_bytes(batch) if workers > 1 else 0.0,
            "samples": w.shards.samples, "bytes_per_sample_stored": w.shards.bytes_per_sample,
            "corpus_bytes": sum(w.shards.samples.values()) * w.shards.bytes_per_sample,
            "files": w.shards.files, "group_rows": w.shards.group_rows, "cached": w.cached,
            "epochs": w.epochs, "notes": list(w.notes),
        },
        "devices": workers, "nodes": model.nodes(workers), "per_node": model.per_node, "batch_size": batch,
        "per_device_batch": per_device,
        "step": run.step.to_json() | {"all_reduce_gradients_s": model.all_reduce_s(step.gradients, workers)},
        "samples_per_s": batch / run.step.total,
        "strong": [row(n, batch, False) for n in model.counts(batch) if batch % n == 0],
        "weak": [row(n, per_device, True) for n in model.counts()],
        "run": {k: v for k, v in asdict(run).items() if k != "step"} | {"checkpoint_share": run.checkpoint_share},
        "device_hours": workers * run.wall_s / 3600,
        "input": {
            "streams": not w.cached, "amplification": source.amplification, "bound": source.bound,
            "seconds_per_step": source.seconds,
            "bytes_per_s": workers * source.bytes_per_worker / (run.steps * run.step.total),
            "requests_per_s": workers * source.requests_per_worker / (run.steps * run.step.total),
            "decode_cores_needed": min(workers, model.per_node) * batch / workers / run.step.total
            / model.n("decode.samples_per_core_s"),
            "decode_cores": model.decode_cores(workers),
            "cores": model.n("node.cores"),
            "opening_s": model.opening_s(workers), "filling_s": model.filling_s(workers),
            "index_bytes_per_node": min(workers, model.per_node) * model.n("index.bytes_per_row")
            * sum(w.shards.samples.values()),
        },
        "checkpoint_bytes": w.checkpoint_bytes, "mtbf_h": model.mtbf_s(workers) / 3600,
        "memory": asdict(memory) | {"total": memory.total, "device": model.device_bytes},
        "limits": [asdict(limit) for limit in limits(model, workers, batch, per_device)],
    }  # fmt: skip
