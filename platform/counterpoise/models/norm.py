"""Batch normalisation with statistics of the global batch, on CPU and GPU.

torch.nn.SyncBatchNorm exists for GPUs only. This one needs one all-reduce forward and one backward per layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import Comm


class _SumOverWorkers(torch.autograd.Function):
    """Sum over workers; the gradient of a sum of all workers' losses is summed likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return comm.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.sum(gradient.contiguous()), None


class GlobalBatchNorm(nn.Module):
    """Takes the place of a BatchNorm1d, 2d or 3d; shares its parameters and buffers, whose names stay the same."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, comm: Comm) -> None:
        super().__init__()
        assert norm.affine and norm.track_running_stats and norm.momentum is not None
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        self.momentum: float = norm.momentum
        self.eps = norm.eps
        self.comm = comm

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # Moments about the running mean, which all workers share: without a shift, E[x^2] - E[x]^2 loses digits.
        shift = self.running_mean.clone()
        centred = x - shift.view(shape)
        count = centred.new_full((1,), x.numel() / x.shape[1])
        sums = _SumOverWorkers.apply(torch.cat([centred.sum(axes), centred.square().sum(axes), count]), self.comm)
        total = sums[-1].detach()
        mean, square = (sums[:-1] / total).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
            self.running_mean.lerp_(mean + shift, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1).clamp(min=1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((centred - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, GlobalBatchNorm)


def synchronise_batch_norm(module: nn.Module, comm: Comm) -> None:
    """Replace every batch normalisation inside `module` by one over the global batch, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            setattr(module, name, GlobalBatchNorm(child, comm))
        else:
            synchronise_batch_norm(child, comm)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, BATCH_NORMS) for part in module.modules())
