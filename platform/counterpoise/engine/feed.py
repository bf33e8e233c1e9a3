"""Batches on their way to the device that trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from counterpoise.contracts import Batch, DataSource


def on_device(data: DataSource, batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches of `data`, on the device and finished there.

    To a GPU each is copied from pinned memory, on a stream of its own, while the one before it is computed.
    """
    if device.type != "cuda":
        for raw in batches:
            yield data.finish({name: tensor.to(device) for name, tensor in raw.items()})
        return
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for raw in batches:
        with torch.cuda.stream(stream):
            copied = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in raw.items()}
            there = stream.record_event()
        if ahead is not None:
            yield data.finish(_arrived(*ahead))
        ahead = copied, there
    if ahead is not None:
        yield data.finish(_arrived(*ahead))


def _arrived(batch: Batch, there: torch.cuda.Event) -> Batch:
    """A batch that the present stream may use: it waits for the copy, and its memory is not given away meanwhile."""
    present = torch.cuda.current_stream()
    present.wait_event(there)
    for tensor in batch.values():
        tensor.record_stream(present)
    return batch
