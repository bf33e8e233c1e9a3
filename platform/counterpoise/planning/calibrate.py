"""Numbers of a plan measured on this machine, kept in a JSON file that later plans read.

What a rate depends on is measured as training does it: steps by the training loop, collectives by its communicator,
checkpoints by its writer, decoding by its data source. A CPU's work is counted in seconds of CPU, and of what waits
the least of several is taken: others who use the machine change that little. Its load is kept beside the numbers.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from counterpoise import storage
from counterpoise.bench.machine import machine
from counterpoise.config import Experiment
from counterpoise.contracts import ROW, ConfigError, DataError, ResourceError
from counterpoise.data.card import corpora_home
from counterpoise.data.loader import LocalData
from counterpoise.engine import checkpoint
from counterpoise.engine.comm import SingleComm, TorchComm, join_group
from counterpoise.engine.job import chosen_device, open_data
from counterpoise.engine.loop import RunOptions, Trainer, encoder_configs
from counterpoise.engine.memory import reuse_memory
from counterpoise.engine.run import RunFolder
from counterpoise.planning.facts import Facts
from counterpoise.planning.workload import Workload, corpus_of, counting_batch, without_weights
from counterpoise.wording import pretty_json

FORMAT = 1
SMALL, LARGE = 4096, 16 * 2**20  # bytes of two all-reduces
_STEP_S = 2.5  # a measured step takes about this at most
_DECODE_S = 6.0
_CHECKPOINT = (2**20, 96 * 2**20)  # bytes

Say = Callable[[str], None]
Values = dict[str, tuple[float, str]]  # fact -> value, how it was found


def default_file() -> str:
    """$COUNTERPOISE_HOME/calibration.json, beside the prepared corpora."""
    return storage.join(os.path.dirname(corpora_home()), "calibration.json")


def load(place: str) -> dict[str, Any] | None:
    """What was measured, or None if there is no such file."""
    if not storage.exists(place):
        return None
    try:
        found = json.loads(storage.read_bytes(place))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, this version reads {FORMAT}")
        for value in found["values"].values():
            float(value["value"])
        return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{storage.show(place)} is no calibration ({error}); make it with plan --calibrate") from None


def applied(facts: Facts, found: Mapping[str, Any], kind: str) -> Facts:
    """Facts with those measured values that hold for a device of this kind; decoding and checkpoints hold for any."""
    same = kind == found["device"]
    values = {
        name: value
        for name, value in found["values"].items()
        if name in facts and (same or name.startswith(("decode.", "checkpoint.")))
    }
    for name, value in values.items():
        source = f"{value['note']}; {found['measured'][:16].replace('T', ' ')} UTC, {found['machine']['processor']}"
        facts = facts.changed({name: value["value"]}, "measured", source)
    return facts


def calibrate(experiment: Experiment, workload: Workload, runs: str, kind: str, say: Say) -> dict[str, Any]:
    """Measure everything that can be measured here. kind: of the device, as plans name it."""
    place = torch.device(chosen_device("cpu" if kind == "cpu" else "cuda"))
    reuse_memory(place.type)
    facts = machine()
    values: Values = {}
    values["node.cores"] = (float(os.cpu_count() or 1), "counted")
    say("arithmetic and memory")
    values |= rates(place)
    say("steps of the experiment")
    values |= _steps(experiment, workload, place, values)
    say("all-reduces of 2 and 4 processes")
    values |= collectives(place)
    say("decoding")
    values |= decoding(experiment)
    say(f"checkpoints in {storage.show(runs)}")
    values |= writing(runs)
    return {
        "format": FORMAT,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "device": kind,
        "work": workload.title,
        "values": {name: {"value": value, "note": note} for name, (value, note) in values.items()},
    }


def save(found: Mapping[str, Any], place: str) -> None:
    storage.write_bytes(place, pretty_json(found))


def cost_s(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of a call, after one that does not count: of a GPU by the clock, the median; of the CPU those that this
    process was given, the least, which depends little on who else uses the cores."""
    gpu, found = device.type == "cuda", []
    clock = time.perf_counter if gpu else time.process_time
    for _ in range(times + 1):
        if gpu:
            torch.cuda.synchronize(device)
        start = clock()
        run()
        if gpu:
            torch.cuda.synchronize(device)
        found.append(clock() - start)
    return statistics.median(found[1:]) if gpu else min(found[1:])


def waited_s(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of a call by the clock, the least of some: what it takes while nobody else delays it."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def rates(device: torch.device) -> Values:
    """Arithmetic and memory bandwidth of one core, or of the GPU."""
    gpu = device.type == "cuda"
    side, batch, words = (8192, 256, 2**28) if gpu else (1024, 4, 2**25)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.randn(2, side, side, device=device).unbind()
        x, kernel = torch.randn(batch, 64, 56, 56, device=device), torch.randn(64, 64, 3, 3, device=device)
        product = cost_s(lambda: a @ b, 5, device)
        convolved = cost_s(lambda: F.conv2d(x, kernel, padding=1), 5, device)
        source, target = torch.ones(words, device=device), torch.empty(words, device=device)
        copied = cost_s(lambda: target.copy_(source), 5, device)
    finally:
        torch.set_num_threads(before)
    where = torch.cuda.get_device_name(device) if gpu else "one core"
    return {
        "device.flops": (2 * side**3 / product, f"product of two {side} x {side} matrices, {where}"),
        "device.convolution_flops": (
            2 * batch * 64 * 64 * 9 * 56 * 56 / convolved,
            f"3 x 3 convolution of {batch} x 64 x 56 x 56, {where}",
        ),
        "device.bytes_per_s": (8 * words / copied, f"copy, bytes read and written, {where}"),
    }


def step_s(experiment: Experiment, inputs: Any, classes: Any, size: int, threads: int, device: torch.device) -> float:
    """One update of `size` samples by the training loop, without reading; with several threads by the clock."""
    timed = cost_s if threads == 1 else waited_s
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data = counting_batch(inputs, classes, size)
    experiment = experiment.model_copy(update={"batch_size": size})
    try:
        with tempfile.TemporaryDirectory(prefix="counterpoise-plan-") as root:
            folder = RunFolder.create(root, "step", experiment_text="", provenance={}, manifest={})
            trainer = Trainer(experiment, data, SingleComm(), folder, RunOptions(device=str(device)))
            trainer.method.begin_epoch(trainer.net, trainer._context())
            trainer.net.train()
            batch = {name: tensor.to(device) for name, tensor in data.batch.items()}
            trainer.train_batch(batch)
            return timed(lambda: trainer.train_batch(batch), 5, device)
    finally:
        torch.set_num_threads(before)


def fit_steps(
    work: tuple[float, float], kernels: float, measured: tuple[float, float], serial: bool
) -> tuple[float, float]:
    """(share of peak, seconds to issue an operation) that explain two steps.

    work: seconds of each at full speed. serial: issuing comes on top (CPU); else (GPU) the larger of both counts, and
    the smaller step bounds what issuing takes.
    """
    (small, large), (few, many) = work, measured
    if not serial:
        return min(large / many, 1.0), few / kernels
    inverse = max((many - few) / max(large - small, 1e-12), 1e-3)
    issue = max((few - inverse * small) / kernels, 0.0)
    return large / max(many - kernels * issue, 1e-12), issue


def _steps(experiment: Experiment, workload: Workload, device: torch.device, values: Values) -> Values:
    inputs, classes, _ = corpus_of(experiment, workload.shards.samples)
    experiment = without_weights(experiment, encoder_configs(experiment, counting_batch(inputs, classes, 1)))
    gpu = device.type == "cuda"
    cores = os.cpu_count() or 1
    first = step_s(experiment, inputs, classes, 2, 1, device)
    most = experiment.batch_size if gpu else max(4, min(experiment.batch_size, int(2 * _STEP_S / first)))
    few = max(2, most // 4)
    measured = (
        first if few == 2 else step_s(experiment, inputs, classes, few, 1, device),
        step_s(experiment, inputs, classes, most, 1, device),
    )
    step = workload.alone

    def at_full_speed(size: int) -> float:
        flops, traffic = step.ops.at(size)
        peak = np.where(step.ops.convolution, values["device.convolution_flops"][0], values["device.flops"][0])
        bandwidth = values["device.bytes_per_s"][0]
        optimizer = 4 * step.updated * (3 + 2 * workload.slots) / bandwidth
        return optimizer + float((step.ops.count * np.maximum(flops / peak, traffic / bandwidth)).sum())

    share, issue = fit_steps((at_full_speed(few), at_full_speed(most)), step.ops.kernels, measured, not gpu)
    note = f"steps of {workload.title}, {few} and {most} samples"
    found = {
        "device.share": (share, f"{note}: {measured[0]:.3g} and {measured[1]:.3g} s" + ("" if gpu else " on one core")),
        "device.kernel_s": (issue, note),
    }
    if not gpu and cores > 1 and os.getloadavg()[0] < 0.5 * cores:  # else two threads wait for one another
        whole = step_s(experiment, inputs, classes, most, cores, device)
        faster = measured[1] / whole
        serial = min(max((cores / faster - 1) / (cores - 1), 0.0), 1.0)  # of Amdahl's law
        found["device.serial_share"] = (serial, f"{note}: {cores} cores are {faster:.2f} times as fast as one")
    return found


# --- several processes


def collectives(device: torch.device) -> Values:
    """Latency and bandwidth of all-reduces between processes of this machine; nothing where there is one GPU."""
    gpu = device.type == "cuda"
    cores = os.cpu_count() or 1
    worlds = [w for w in (2, 4, 8) if w <= torch.cuda.device_count()] if gpu else [2, 4]
    if not worlds:
        return {}
    found = {world: _all_reduces(world, device.type) for world in worlds}
    first, last = worlds[0], worlds[-1]
    # t = call / speed + 2 (n - 1) hops, where processes share cores
    slower = {w: 1.0 if gpu else max(1.0, w / cores) for w in worlds}
    if first == last:
        call, hop = found[first][0], 0.0
    else:
        a = np.array([[slower[w], 2 * (w - 1)] for w in (first, last)])
        call, hop = (float(v) for v in np.linalg.solve(a, [found[w][0] for w in (first, last)]))
        if hop < 0 or call < 0:
            call, hop = found[first][0] / slower[first], 0.0
    rates = []
    for world in worlds:
        seconds = max(found[world][1] - found[world][0], 1e-9)
        rates.append(2 * (world - 1) / (world if gpu else 1) * LARGE / seconds)
    rate = math.exp(statistics.fmean(map(math.log, rates)))
    times = "; ".join(f"{w}: {1e3 * found[w][0]:.3g} and {1e3 * found[w][1]:.3g} ms" for w in worlds)
    note = f"all-reduces of {SMALL} bytes and {LARGE >> 20} MiB by processes, {times}"
    return {
        "collective.start_s": (0.0, "part of collective.call_s"),
        "collective.call_s": (call, note),
        "node.link_latency_s": (hop, note),
        "node.link_bytes_per_s": (rate, note),
        "node.link_share": (1.0, "part of node.link_bytes_per_s"),
    }


def _all_reduces(world: int, device: str) -> tuple[float, float]:
    """Seconds of a small and of a large one."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory(prefix="counterpoise-plan-") as root:
        meeting = os.path.join(root, "meeting")
        processes = [
            context.Process(target=_reduce, args=(rank, world, meeting, device, answers)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            end = time.monotonic() + 120
            while answers.empty() and time.monotonic() < end:
                if any(process.exitcode not in (None, 0) for process in processes):
                    break
                time.sleep(0.05)
            if answers.empty():
                raise ResourceError(f"{world} processes could not exchange messages by {device}; is loopback there?")
            small, large = answers.get()
        finally:
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
    return small, large


def _reduce(rank: int, world: int, meeting: str, device: str, answers: Any) -> None:
    """In one process of several."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    join_group(place, rank, world, meeting, timeout_s=60)
    comm = TorchComm()
    found = []
    for size, times in ((SMALL, 60), (LARGE, 7)):
        tensor = torch.zeros(size // 4, device=place)
        comm.barrier()
        found.append(waited_s(lambda tensor=tensor: comm.sum(tensor), times, place))  # type: ignore[misc]
    comm.barrier()
    if rank == 0:
        answers.put(tuple(found))
    dist.destroy_process_group()


# --- data and storage


def decoding(experiment: Experiment) -> Values:
    """Samples for a second of one core, of a prepared corpus; nothing otherwise."""
    try:
        options = experiment.data.model_copy(update={"cache": "off", "decode_threads": 1})
        data = open_data(experiment.model_copy(update={"data": options}))
    except ConfigError:
        return {}  # not prepared
    assert isinstance(data, LocalData)
    try:
        note = f"{experiment.corpus}, {len(data.modalities)} modalities, per second of CPU"
        found: Values = {"decode.samples_per_core_s": (_samples_per_cpu_s(data, 1), note)}
        size = data.decoded_bytes()
    finally:
        data.close()
    if size <= 2**30:
        options = options.model_copy(update={"cache": "on"})
        data = open_data(experiment.model_copy(update={"data": options}))
        assert isinstance(data, LocalData)
        try:
            data.fill_cache("train")
            found["decode.cached_samples_per_core_s"] = (_samples_per_cpu_s(data, 2), f"{note}, from memory")
        finally:
            data.close()
    return found


def _samples_per_cpu_s(data: LocalData, epoch: int) -> float:
    """Of training batches after the first, for which libraries are loaded; a few seconds, or one epoch."""
    samples, began, start = 0, time.monotonic(), None
    for batch in data.train_batches(epoch):
        if start is None:
            start = time.process_time()
            continue
        samples += len(batch[ROW])
        if time.monotonic() - began > _DECODE_S and time.process_time() - start > 1:
            break
    return samples / max(time.process_time() - (start or 0.0), 1e-6)


def writing(runs: str) -> Values:
    """Fixed part and rate of a checkpoint where runs are written."""
    folder = storage.join(runs, f".plan-{uuid.uuid4().hex}")
    seconds = []
    try:
        for size in _CHECKPOINT:
            tensors = {"model": {"weights": torch.randn(size // 4)}}
            times = []
            for number in range(4):
                start = time.perf_counter()
                checkpoint.save(folder, f"step-{number:08d}", tensors, {"format": 1}, keep=1)
                times.append(time.perf_counter() - start)
            seconds.append(min(times[1:]))
    finally:
        with suppress(OSError, ResourceError, DataError):
            storage.delete(folder)
    rate = (_CHECKPOINT[1] - _CHECKPOINT[0]) / max(seconds[1] - seconds[0], 1e-6)
    note = (
        f"checkpoints of {_CHECKPOINT[0] >> 20} and {_CHECKPOINT[1] >> 20} MiB in {storage.show(runs)}: "
        + " and ".join(f"{s:.3g} s" for s in seconds)
    )
    return {
        "checkpoint.fixed_s": (max(seconds[0] - _CHECKPOINT[0] / rate, 0.0), note),
        "checkpoint.bytes_per_s": (rate, note),
    }
