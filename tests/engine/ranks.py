"""One of several workers of a test: a program, so that it can be a process of its own.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python ranks.py JOBS.json OUT

JOBS.json: {name: {experiment, run, stop_after, resume, unfinished}}. Leaves OUT/rank-<r>.pt with what this worker saw.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise.config import Experiment
from counterpoise.contracts import Comm, Interrupted
from counterpoise.engine import buckets, loop
from counterpoise.engine.comm import SMALL, current_comm, join_group
from counterpoise.engine.job import open_data
from counterpoise.engine.run import RunFolder
from counterpoise.models.norm import GlobalBatchNorm, synchronise_batch_norm


class Watched(loop.Trainer):
    """Keeps the network as it was after the last epoch, before the selected epoch is loaded."""

    def _finish(self) -> dict[str, Any] | None:
        self.end = {name: value.clone() for name, value in self.net.state_dict().items()}
        return super()._finish()


def train(job: dict[str, Any], comm: Comm) -> dict[str, Any]:
    experiment = Experiment(**job["experiment"])
    resume = job.get("resume", False)
    for limit in [*job["stop_after"], None]:
        folder = RunFolder.open(job["run"]) if comm.rank == 0 else None
        if folder is not None:
            folder.acquire()
        data = open_data(experiment, comm.rank, comm.world)
        calls = iter(range(10**9))
        options = loop.RunOptions(
            resume=resume, stop=lambda calls=calls, limit=limit: "test" if next(calls) == limit else None
        )
        trainer = Watched(experiment, data, comm, folder, options)
        try:
            summary = trainer.run()
        except Interrupted:
            resume = True
            if job.get("unfinished"):
                return {}
            continue
        finally:
            data.close()
            if folder is not None:
                folder.release()
        return {
            "state": trainer.end,
            "selected": dict(trainer.net.state_dict()),
            "decisions": trainer.progress.decisions,
            "summary": summary,
            "records": folder.records() if folder is not None else None,
        }
    raise AssertionError("the last attempt has no limit")


def normalise(comm: Comm) -> dict[str, dict[str, Tensor]]:
    """Batch normalisation of uneven parts of a batch by GlobalBatchNorm: outputs, gradients, statistics."""
    found = {}
    for name, make, shape in (
        ("2d", nn.BatchNorm2d, (8, 3, 4, 5)),
        ("1d", nn.BatchNorm1d, (8, 3)),
        ("series", nn.BatchNorm1d, (8, 3, 6)),
        ("3d", nn.BatchNorm3d, (8, 3, 2, 4, 5)),
    ):
        x, norm = normalisation_problem(make, shape)
        layer = GlobalBatchNorm(norm, comm)
        collected = []
        for half in ((slice(0, 5), slice(5, 8)), (slice(0, 4), slice(4, 8))):  # two steps, first an uneven one
            part = x[half[comm.rank]].clone().requires_grad_()
            out = layer(part)
            weights = torch.linspace(-1, 1, x.numel()).view(shape)[half[comm.rank]]
            (out * weights).sum().backward()
            collected.append((out.detach(), part.grad))
        extra = torch.zeros(1)
        comm.sum_gradients(list(layer.parameters()), extra)
        layer.eval()
        found[name] = {
            "out": torch.cat([out for out, _ in collected]),
            "input_gradient": torch.cat([g for _, g in collected if g is not None]),
            **{f"gradient/{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None},
            **{f"buffer/{n}": b for n, b in layer.named_buffers()},
            "evaluated": layer(x).detach(),
        }
    return found


def normalisation_problem(make: Any, shape: tuple[int, ...]) -> tuple[Tensor, Any]:
    """A batch away from zero, where E[x^2] - E[x]^2 would lose digits, and a layer with a history."""
    rng = torch.Generator().manual_seed(4)
    x = 5 + 2 * torch.randn(shape, generator=rng)
    norm = make(shape[1])
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias):
            tensor.copy_(torch.randn(shape[1], generator=rng))
    norm(x + 1)
    return x, norm


def communicate(comm: Comm) -> dict[str, Any]:
    """What every collective gives on this worker."""
    rank = comm.rank
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.full((2, 3), 1.0 + rank)
    parameters[2].grad = torch.tensor([10.0 * (rank + 1)])
    extra = comm.sum_gradients(parameters, torch.tensor([0.5, rank], dtype=torch.float32))
    local = torch.tensor([1.0 + rank, 2.0])
    shared = [torch.full((3,), float(rank)), torch.tensor(rank + 7)]
    comm.broadcast_tensors(shared)
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    names = list(module.state_dict())
    synchronise_batch_norm(module, comm)
    comm.barrier()
    return {
        "sum": comm.sum(local),
        "counts": comm.sum(torch.tensor([rank, 5], dtype=torch.int32)),
        "many": comm.sum(torch.full((SMALL,), 1.0 + rank)),
        "local": local,
        "gradients": [p.grad for p in parameters],
        "extra": extra,
        "broadcast": comm.broadcast({"from": rank, "none": None}),
        "shared": shared,
        "gather": comm.gather({"rank": rank}),
        "same_names": names == list(module.state_dict()),
        "replaced": isinstance(module[1][0], GlobalBatchNorm),  # type: ignore[index]
    }


def overlap(comm: Comm) -> list[dict[str, Any]]:
    """Passes of one kind whose gradients are summed in buckets of one parameter, each with what it ought to give.

    The third pass fills others than the one before it, the fifth has a parameter that was not there.
    """
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))
    sent: list[bool] = []  # for every message, whether the backward pass was still under way
    under_way = False
    all_reduce = torch.distributed.all_reduce

    def noted(*args: Any, **kwargs: Any) -> Any:
        sent.append(under_way)
        return all_reduce(*args, **kwargs)

    found = []
    buckets.BUCKET_BYTES, before = 64, buckets.BUCKET_BYTES
    torch.distributed.all_reduce = noted
    try:
        for number in range(6):
            if number == 4:
                layers.append(nn.Linear(4, 4, bias=False))
            x = torch.full((2, 4), 1.0 + comm.rank + number)
            for index, layer in enumerate(layers):
                x = x if number == 2 and index == 1 else layer(x)
            layers.zero_grad()
            comm.begin_gradients("joint")
            under_way = True
            x.sum().backward()
            under_way = False
            local = [None if layer.weight.grad is None else layer.weight.grad.clone() for layer in layers]
            extra = comm.sum_gradients(list(layers.parameters()), torch.tensor([1.0, comm.rank]))
            messages = list(sent)
            wanted = [None if g is None else comm.sum(g) for g in local]
            found.append(
                {
                    "gradients": [layer.weight.grad for layer in layers],
                    "wanted": wanted,
                    "extra": extra,
                    "during": sum(messages),
                    "after": len(messages) - sum(messages),
                }
            )
            sent.clear()
    finally:
        torch.distributed.all_reduce = all_reduce
        buckets.BUCKET_BYTES = before
    return found


def main(jobs: str, out: str) -> None:
    torch.set_num_threads(1)
    loop.CONTROL_INTERVAL_S = 0.0
    os.fsync = lambda _: None  # type: ignore[assignment]
    join_group(torch.device("cpu"), timeout_s=60)
    comm = current_comm()
    found: dict[str, Any] = {"norm": normalise(comm), "comm": communicate(comm), "overlap": overlap(comm)}
    for name, job in json.loads(Path(jobs).read_text()).items():
        found[name] = train(job, comm)
    torch.save(found, Path(out) / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
