"""How encoders compute: number format, memory layout, recomputation, compilation. Mathematics stays with the methods.

Encoders are where the time goes; heads and losses see float32 features whatever is chosen here, so no method has to
know. Every option gives the results of plain float32 up to the rounding of the chosen format.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from counterpoise.models.norm import BATCH_NORMS

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions; convolutions follow their weights


class Compute(BaseModel):
    """How encoders compute."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="fp32: as torch does it (GPUs may use TF32 in convolutions); tf32: in matrix products too; bf16: "
        "autocast. Weights, optimizer, heads and losses are float32 always",
    )
    channels_last: bool = Field(
        False,
        description="store images and convolutions with channels last; whether that is faster here, `bench step` says",
    )
    parts: int = Field(
        0,
        ge=0,
        description="0: keep the activations of a batch for the backward pass. n: encoders go over the batch in n "
        "parts and compute activations again, so that those of one part of one modality are in memory at a time "
        "(gradient accumulation for every method; batch normalisation sees one part at a time)",
    )
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = Field(
        "off", description="torch.compile of the encoders, with this mode; reduce-overhead uses CUDA graphs"
    )

    @model_serializer(mode="wrap")
    def _what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what differs from the defaults, so that older experiments keep their digest."""
        return {k: v for k, v in handler(self).items() if v != type(self).model_fields[k].default}


def prepare(encoders: nn.ModuleDict, compute: Compute) -> None:
    """Lay out and compile encoders, in place, on the device they train on."""
    if compute.channels_last:
        for parameter in encoders.parameters():
            if parameter.dim() in _LAYOUTS:
                # Not contiguous(): a weight of one input channel is laid out both ways as it is, and would go on to
                # make activations with channels first, for itself and for layers behind it.
                layout = _LAYOUTS[parameter.dim()]
                parameter.data = torch.empty_like(parameter, memory_format=layout).copy_(parameter.data)
    if compute.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if compute.compile != "off":
        for encoder in encoders.values():
            encoder.compile(mode=compute.compile, dynamic=False)


def encode(encoder: nn.Module, x: Tensor, compute: Compute) -> Tensor:
    """Features [B, D] in float32 of a modality's tensor [B, ..]."""
    if not (compute.parts and encoder.training and torch.is_grad_enabled()):
        return _run(encoder, x, compute)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _StatisticsKept(encoder)

    # With the weights of now: a method may lend an encoder others for one pass, as SAM does.
    lent = partial(functional_call, encoder, dict(encoder.named_parameters()))
    # As many parts on every worker, since normalisation over all of them needs the same calls: the loop sees to that.
    return torch.cat(
        [
            checkpoint(_run, lent, part, compute, use_reentrant=False, context_fn=contexts)
            for part in x.tensor_split(min(compute.parts, len(x)))
        ]
    )


def _run(encoder: Callable[[Tensor], Tensor], x: Tensor, compute: Compute) -> Tensor:
    if compute.precision != "bf16":
        return encoder(x)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return encoder(x).float()


class _StatisticsKept:
    """Running statistics stay as they are: a batch that is computed again was counted the first time.

    Entered once for every backward pass through what was computed.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.norms = [part for part in encoder.modules() if isinstance(part, BATCH_NORMS)]

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:  # not track_running_stats: without it other tensors are saved, which checkpoints refuse
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
