"""MLA: modalities take turns at one shared head, whose updates keep off directions that others use.

Zhang, Yoon, Bansal, Yao. Multimodal Representation Learning by Alternating Unimodal Adaptation. CVPR 2024.

    for each modality m of a batch, in order:   L = CE(W u_m + b, y),   one update of encoder m and the head
        gradient of W:  G <- G P^T
        then, with h = mean of u_m over the batch and s = batch / batches:
        q = P h / (a + h^T P h),   P <- P - q h^T P,   a = 0.1^(1 + s)      recursive least squares, P = I at the start
    prediction:  z = sum_m w_m z_m,   w_m proportional to exp(max_n e_n - e_m),   e_m = entropy of softmax(z_m)

Weights are by sample. When P meets a gradient it knows the mean feature of the modality before, and of all before
that; of a direction h it leaves a / (a + |h|^2). It only ever shrinks, so that the weights of the head come to rest
within some epochs while encoders go on; `normalised` keeps its length. The bias is not projected. P is a buffer of the
head, made symmetric again and set to rank 0's at the start of an epoch. Encoders of other widths than the widest get a
Linear to that width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, ConfigError, EpochContext, Outputs, Step
from counterpoise.methods.base import Method, MethodConfig, Setting
from counterpoise.models.heads import Head, SharedHead
from counterpoise.models.network import MultimodalNet


def without_direction(projection: Tensor, mean: Tensor, a: float) -> Tensor:
    """P [D, D] after one step of recursive least squares with the mean feature h [D]."""
    image = projection @ mean
    return projection - torch.outer(image / (a + mean @ image), mean @ projection)


def entropy_weights(logits: Tensor, over: Literal["classes", "batch"] = "classes") -> Tensor:
    """Weights of modalities from logits [M, B, K]; the surest counts most.

    over classes: [M, B], one weight per sample. over batch: [M, 1], from probabilities that sum to 1 over the batch.
    """
    log_p = F.log_softmax(logits, dim=-1 if over == "classes" else 1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return torch.softmax(-(entropy if over == "classes" else entropy.sum(dim=1, keepdim=True)), dim=0)


class MLAConfig(MethodConfig):
    projection: Literal["recursive", "normalised", "released"] = Field(
        "recursive",
        description="of the head's gradient: the paper's; normalised: P / |P| after every step, which is in the "
        "released code but never reached; released: none, since it never fires there",
    )
    fusion: Literal["entropy", "entropy_of_batch", "fixed"] = Field(
        "entropy",
        description="weights of modalities by sample (paper); entropy_of_batch: one weight each per batch (released), "
        "so that a prediction depends on batch_size; fixed: `weights`",
    )
    weights: dict[str, float] = Field(
        {},
        description="with fusion fixed: weight of every modality, 1/M each if empty (ours; released: audio 0.55, "
        "visual 0.45, and 0.35, 0.25, 0.40 of three)",
    )

    @model_validator(mode="after")
    def _weights_are_used(self) -> MLAConfig:
        if self.weights and self.fusion != "fixed":
            raise ValueError("weights: only with fusion fixed")
        return self


class MLA(Method[MLAConfig]):
    """Modalities are trained in turns on a head they share; the surer one counts more in a prediction."""

    Config = MLAConfig
    paper = "Zhang, Yoon, Bansal, Yao. CVPR 2024"
    modality_predictions = "the shared head on u_m"
    beyond_two = "as published: any number of modalities, one after the other"
    released = (
        "The projection looks for a parameter name that its head does not have and never fires "
        "(projection=released); here it works by default, as the paper has it. Were it to fire, it would divide by a "
        "matrix instead of the scalar, which no option repeats, and P by its norm (projection=normalised). The "
        "dynamic weights are one number per batch, from a softmax over the batch (fusion=entropy_of_batch); the "
        "default is by sample."
    )
    min_modalities = 2

    def __init__(self, config: MLAConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        if config.weights and set(config.weights) != set(self.modalities):
            raise ConfigError(f"method.weights: give all of {', '.join(self.modalities)}, and no others")

    def head(self, widths: Mapping[str, int]) -> Head:
        head = SharedHead(widths, self.setting.num_classes)
        if self.config.projection != "released":
            head.register_buffer("projection", torch.eye(head.width))
        return head

    def phases(self, epoch: int) -> tuple[str, ...]:
        return self.modalities

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        if self.config.projection != "released":
            projection = net.head.get_buffer("projection")
            projection.copy_((projection + projection.T) / 2)
            self.comm.broadcast_tensors([projection])

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        return net(batch, [step.phase])

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        return {step.phase: F.cross_entropy(out.unimodal[step.phase], batch[LABEL])}

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        if self.config.projection == "released":
            return {}
        weight, projection = net.head.get_parameter("layers.weight"), net.head.get_buffer("projection")
        assert weight.grad is not None
        before = weight.grad.norm()
        weight.grad = weight.grad @ projection.T
        kept = weight.grad.norm() / before.clamp_min(torch.finfo(before.dtype).tiny)
        features = out.features[step.phase].detach()
        total = self.comm.sum(torch.cat([features.sum(dim=0), features.new_full((1,), len(features))]))
        a = 0.1 ** (1 + step.batch / step.num_batches)
        projection.copy_(without_direction(projection, total[:-1] / total[-1], a))
        if self.config.projection == "normalised":
            projection /= projection.norm()
        return {f"kept/{step.phase}": kept}

    def fuse(self, net: MultimodalNet, out: Outputs) -> Tensor:
        """The weighted sum over the modalities present; fixed weights are scaled up to the sum of all."""
        present = [m for m in self.modalities if m in out.unimodal]
        logits = torch.stack([out.unimodal[m] for m in present])
        if self.config.fusion == "fixed":
            equal = 1 / len(self.modalities)
            fixed = {m: self.config.weights.get(m, equal) for m in self.modalities}
            weights = logits.new_tensor([[fixed[m]] for m in present])
            if len(present) < len(fixed):
                weights = weights * (sum(fixed.values()) / sum(fixed[m] for m in present))
        else:
            weights = entropy_weights(logits, "classes" if self.config.fusion == "entropy" else "batch")
        return (weights.unsqueeze(-1) * logits).sum(dim=0)
