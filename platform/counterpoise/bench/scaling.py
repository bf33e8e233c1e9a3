"""`counterpoise bench scaling`: steps of the training loop on 1, 2, 4, .. workers of this machine, in turns.

Strong: the same global batch, dealt out. Weak: the same batch for each worker. All groups of processes are there from
the beginning, and one of them works at a time; ratios are formed within a round. With more workers than cores the most
that can be had is the number of cores. Waiting is the share of a step that its slowest worker spent in collectives.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from counterpoise.bench.machine import Side, Spread, machine, machine_line, spread_text
from counterpoise.bench.step import timed
from counterpoise.contracts import ConfigError


def scaling(
    *,
    encoder: str,
    batch_size: int,
    audio: tuple[int, int],
    image: tuple[int, int],
    workers: Sequence[int],
    steps: int,
    rounds: int,
    device: str,
    compute: Mapping[str, Any],
    batch_norm: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Seconds of a step of joint training. batch_size: of all workers; weak: of the most workers there are."""
    from counterpoise.start import Settings

    counts = sorted({1, *workers})
    if batch_size % counts[-1]:
        raise ConfigError(f"bench scaling: --batch-size {batch_size} cannot be dealt to {counts[-1]} workers evenly")
    facts = machine()
    place = Settings(device=device).resolved_device
    with contextlib.ExitStack() as opened:
        root = opened.enter_context(tempfile.TemporaryDirectory(prefix="counterpoise-bench-"))
        groups: dict[int, list[Side]] = {}
        for world in counts:
            say(f"starting {world} worker{'s' if world > 1 else ''}")
            spec: dict[str, Any] = {
                "encoder": encoder,
                "audio": audio,
                "image": image,
                "device": place,
                "compute": dict(compute),
                "batch_norm": batch_norm,
            }
            spec |= {"steps": steps, "world": world, "meeting": os.path.join(root, f"meeting-{world}"), "runs": root}
            specs = [{**spec, "rank": rank} for rank in range(world)]
            groups[world] = _started(specs, opened)
        times: dict[tuple[str, int], list[float]] = {(kind, w): [] for kind in ("strong", "weak") for w in counts}
        waits: dict[tuple[str, int], list[float]] = {key: [] for key in times}
        for number in range(rounds + 1):
            for kind, world in times:
                size = batch_size if kind == "strong" else batch_size // counts[-1] * world
                seconds, waited = max(_all(groups[world], size))
                if number:
                    times[kind, world].append(seconds)
                    waits[kind, world].append(waited / seconds)
            say("warmed up" if number == 0 else f"round {number} of {rounds} done")
    rows = []
    for (kind, world), values in times.items():
        alone = times[kind, 1]
        gain = [(a / b) * (world if kind == "weak" else 1) for a, b in zip(alone, values, strict=True)]
        rows.append(
            {
                "kind": kind,
                "workers": world,
                "batch_size": batch_size if kind == "strong" else batch_size // counts[-1] * world,
                "median_s": statistics.median(values),
                "speedup": Spread.of(gain).to_json(),
                "waiting": statistics.median(waits[kind, world]),
            }
        )
    return {
        "machine": facts,
        "encoder": encoder,
        "audio": list(audio),
        "image": list(image),
        "compute": dict(compute),
        "batch_norm": batch_norm,
        "device": place,
        "steps": steps,
        "rounds": rounds,
        "rows": rows,
    }


def _started(specs: Sequence[dict[str, Any]], opened: contextlib.ExitStack) -> list[Side]:
    """The processes of a group, who have to wait for one another before they are ready."""
    sides = [Side(f"worker {spec['rank']} of {spec['world']}", _worker, spec, wait=False) for spec in specs]
    for side in sides:
        opened.callback(side.close)
    for side in sides:
        side.ready()
    return sides


def _all(sides: Sequence[Side], request: Any) -> list[tuple[float, float]]:
    """The answers of processes that work at the same time."""
    for side in sides:
        side.send(request)
    return [side.answer() for side in sides]


def _worker(spec: Mapping[str, Any]) -> Callable[[int], tuple[float, float]]:
    """step(batch size of all workers): seconds of a step, and those of it spent in collectives; means over some."""
    import torch

    from counterpoise.bench.step import OneBatch
    from counterpoise.config import Experiment
    from counterpoise.engine.comm import current_comm, join_group
    from counterpoise.engine.loop import RunOptions, Trainer
    from counterpoise.engine.memory import reuse_memory
    from counterpoise.engine.run import RunFolder
    from counterpoise.engine.watchdog import Watch, watched_comm

    rank, world = spec["rank"], spec["world"]
    device = torch.device(spec["device"])
    torch.set_num_threads(1)
    reuse_memory(device.type)
    if device.type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if world > 1:
        join_group(device, rank, world, spec["meeting"])
    watch = Watch(rank)
    comm = watched_comm(current_comm(), watch)
    trainers: dict[int, tuple[Trainer, dict[str, torch.Tensor]]] = {}

    def made(size: int) -> tuple[Trainer, dict[str, torch.Tensor]]:
        data = OneBatch(size, spec["audio"], spec["image"], rank, world)
        experiment = Experiment(
            corpus="bench",
            modalities={name: spec["encoder"] for name in data.modalities},
            method="joint",
            batch_size=size,
            compute=spec["compute"],
            batch_norm=spec["batch_norm"],
        )
        folder = None
        if rank == 0:
            name = f"{world}-of-{size}"
            folder = RunFolder.create(spec["runs"], name, experiment_text="", provenance={}, manifest={})
        trainer = Trainer(experiment, data, comm, folder, RunOptions(device=str(device)))
        trainer.net.train()
        return trainer, {name: tensor.to(device) for name, tensor in data.batch.items()}

    def step(size: int) -> tuple[float, float]:
        if size not in trainers:
            trainers[size] = made(size)
            trainers[size][0].train_batch(trainers[size][1])
        trainer, batch = trainers[size]
        comm.barrier()

        def several() -> None:
            for _ in range(spec["steps"]):
                trainer.train_batch(batch)

        before = watch.waited_s
        seconds = timed(several, device)
        return seconds / spec["steps"], (watch.waited_s - before) / spec["steps"]

    return step


def render(result: Mapping[str, Any]) -> str:
    shapes = ", ".join(f"{name} {' x '.join(map(str, result[name]))}" for name in ("audio", "image"))
    lines = [
        f"{result['encoder']} twice, joint training, {shapes}; {result['rounds']} rounds in turn of {result['steps']} "
        f"steps on {result['device']}, one thread of torch for each worker, batch_norm {result['batch_norm']}",
        machine_line(result["machine"]),
        f"{'':8}{'workers':>8}  {'batch':>6}  {'step':>10}  {'waiting':>7}  speed-up in samples per second (quartiles)",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['kind']:8}{row['workers']:>8}  {row['batch_size']:>6}  {row['median_s'] * 1e3:7.1f} ms  "
            f"{row['waiting']:7.1%}  "
            f"{spread_text(row['speedup'])}"
        )
    return "\n".join(lines)
