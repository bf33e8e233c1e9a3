"""Gradients summed over workers in buckets, while the backward pass still makes others.

As DistributedDataParallel does it; but phases fill different gradients, methods grow parameters, and numbers must not
depend on what was overlapped: buckets are a function of the gradients that are there, which a pass of the same kind
foretells. Where it foretold wrongly, what was sent is thrown away and sent again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # what DistributedDataParallel takes: large enough for the network's full bandwidth


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    missing: set[nn.Parameter] = field(default_factory=set)  # whose gradients are not complete yet
    flat: Tensor | None = None
    work: Any = None

    def send(self, extra: Tensor | None = None) -> None:
        parts = [p.grad.reshape(-1) for p in self.parameters if p.grad is not None]
        self.flat = torch.cat([*parts, *([] if extra is None else [extra.to(torch.float32)])])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def wait(self) -> Tensor:
        assert self.flat is not None and self.work is not None, "it was sent"
        self.work.wait()
        return self.flat


def divided(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in buckets of about BUCKET_BYTES, the last parameters first, as a backward pass fills them.

    One bucket at least, and the last of them holds the parameters whose gradients come at the very end.
    """
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if buckets[-1] and size + parameter.nbytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


class GradientSums:
    """The sums of one worker's backward passes, one pass at a time."""

    def __init__(self) -> None:
        self._filled: dict[str, tuple[nn.Parameter, ...]] = {}  # by the last pass of a kind
        self._hooked: set[nn.Parameter] = set()
        self._expected: tuple[nn.Parameter, ...] = ()
        self._buckets: list[_Bucket] = []
        self._of: dict[nn.Parameter, _Bucket] = {}
        self._kind: str | None = None

    def begin(self, kind: str) -> None:
        """One backward pass follows; the gradients that the last pass of this kind filled are sent when complete."""
        self._kind, self._expected = kind, self._filled.get(kind, ())
        self._buckets = [_Bucket(part, set(part)) for part in divided(self._expected)]
        # The last bucket is complete when the pass is: it waits for what travels with it.
        self._of = {p: bucket for bucket in self._buckets[:-1] for p in bucket.parameters}
        for parameter in self._of.keys() - self._hooked:
            parameter.register_post_accumulate_grad_hook(self._complete)
            self._hooked.add(parameter)

    def _complete(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter), "hooks are on parameters"
        if parameter not in self._of:
            return
        self._of[parameter].missing.discard(parameter)
        for bucket in self._buckets[:-1]:  # in order, so that all workers send the same
            if bucket.missing:
                return
            if bucket.work is None:
                bucket.send()

    def finish(self, parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
        """Replace gradients by their sums; the sum of `extra` [n], float32."""
        filled = tuple(p for p in parameters if p.grad is not None)
        buckets = self._buckets
        if self._kind is None or [*map(id, filled)] != [*map(id, self._expected)]:
            for bucket in buckets:
                if bucket.work is not None:
                    bucket.wait()
            buckets = [_Bucket(part) for part in divided(filled)]
        for bucket in buckets[:-1]:
            if bucket.work is None:
                bucket.send()
        buckets[-1].send(extra)
        for bucket in buckets:
            rest = _give_back(bucket.wait(), bucket.parameters)
        if self._kind is not None:
            self._filled[self._kind] = filled
        self._kind, self._expected, self._buckets, self._of = None, (), [], {}
        return rest


def _give_back(flat: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Copy a bucket into its gradients; what is left of it."""
    offset = 0
    for parameter in parameters:
        assert parameter.grad is not None, "it was there when the bucket was sent"
        parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()
    return flat[offset:]
