"""What runs that were trained on Ray are compared by."""

from __future__ import annotations

import torch

from counterpoise.engine import checkpoint
from counterpoise.engine.job import Job
from counterpoise.engine.run import RunFolder


def weights(job: Job) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    found = checkpoint.latest(RunFolder.open(job.run).checkpoints)
    assert found is not None
    return dict(found.tensors["model"])


def same_bits(a: Job, b: Job) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
