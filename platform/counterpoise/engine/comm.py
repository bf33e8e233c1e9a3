"""Collectives: one worker alone, or a torch.distributed process group. Nothing here knows Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterpoise.engine.buckets import GradientSums

SMALL = 2**16  # numbers of all workers: gloo's all_gather of so few takes half the time of its all_reduce


class SingleComm:
    """One worker: every collective is the identity."""

    rank = 0
    world = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def begin_gradients(self, kind: str) -> None:
        pass

    def sum_gradients(self, parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
        return extra.clone()

    def broadcast(self, value: Any) -> Any:
        return value

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass


class TorchComm:
    """Workers of the default torch.distributed group. Objects travel over CPU, gradients over their own device."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self._gradients = GradientSums()

    def sum(self, tensor: Tensor) -> Tensor:
        mine = tensor.detach().contiguous()
        if mine.is_cuda or mine.numel() * self.world > SMALL:
            result = mine.clone()
            dist.all_reduce(result)
            return result
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        return torch.stack(parts).sum(0, dtype=mine.dtype)  # in the order of ranks, so the same everywhere

    def begin_gradients(self, kind: str) -> None:
        self._gradients.begin(kind)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
        """Which gradients are there is the same on every worker, since all run the same phases in the same order."""
        return self._gradients.finish(parameters, extra)

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)

    def gather(self, value: Any) -> list[Any] | None:
        values: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values

    def barrier(self) -> None:
        dist.barrier()


def backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def join_group(
    device: torch.device,
    rank: int | None = None,
    world: int | None = None,
    meeting: str | None = None,
    timeout_s: float = 600,
) -> None:
    """Start the process group of this machine's workers, who meet in the file `meeting`; or the one that torchrun
    described in the environment. Collectives that wait longer than `timeout_s` fail."""
    timeout = timedelta(seconds=timeout_s)
    if meeting is not None:  # no listener besides gloo's, and that on loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        assert rank is not None and world is not None
        dist.init_process_group(
            backend(device), init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout
        )
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend(device), timeout=timeout)


def current_comm() -> SingleComm | TorchComm:
    """The communicator of this process: of its process group if there is one with several workers."""
    grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return TorchComm() if grouped else SingleComm()
