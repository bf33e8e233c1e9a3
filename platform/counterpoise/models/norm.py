"""Batch normalisation with statistics of the global batch, on CPU and GPU.

torch.nn.SyncBatchNorm exists for GPUs only. This one needs one all-reduce forward and one backward per layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from counterpoise.contracts import Comm


class _Normalise(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias over the batches of all workers; also mean, variance and number of values.

    Torch's own kernels do all that is done per value; what is summed over workers is a few numbers per channel. As the
    losses of all workers are summed, so are the gradients of what they share.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float, comm: Comm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x.float(), axes, correction=0)
        # Moments about `shift`, which all workers share: without it, E[x^2] - E[x]^2 loses digits.
        offset, count = mean - shift, mean.new_full((1,), x.numel() / x.shape[1])
        sums = comm.sum(torch.cat([count * offset, count * (variance + offset.square()), count]))
        total = sums[-1]
        offset, square = (sums[:-1] / total).chunk(2)
        mean, variance = shift + offset, (square - offset.square()).clamp(min=0)
        out = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.comm = eps, comm
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        direct, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        by_weight, by_bias = ctx.comm.sum(torch.cat([to_weight, to_bias])).chunk(2)
        # Through mean and variance: -(by_bias + by_weight * (x - mean) / deviation) * weight / deviation / total.
        inverse = torch.rsqrt(variance + ctx.eps)
        slope = -weight * by_weight * inverse.square() / total
        constant = -weight * by_bias * inverse / total - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        whole = torch.addcmul(constant.view(shape), x, slope.view(shape)).to(direct.dtype).add_(direct)
        return whole, to_weight, to_bias, None, None, None


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
        out, mean, variance, total = _Normalise.apply(
            x, self.weight, self.bias, self.running_mean.clone(), self.eps, self.comm
        )
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1).clamp(min=1), self.momentum)
        normalised: Tensor = out
        return normalised


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
