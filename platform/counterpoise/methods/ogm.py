"""On-the-fly gradient modulation: OGM, and OGM-GE with generalisation enhancement.

Peng, Wei, Deng, Wang, Hu. Balanced Multimodal Learning via On-the-fly Gradient Modulation. CVPR 2022.
Wei, Hu, Du, Wen. On-the-fly Modulation for Balanced Multimodal Learning. TPAMI 2024 (the continuous form).

One loss on the fused logits. After its backward pass, from the summed true-class probabilities of the batch:

    S_m   = sum_i softmax(z_m,i)_{y_i}          z_m: the modality's term of the head's logits, without gradient
    rho_m = S_m / S_j                           two modalities
    rho_m = 1/(M-1) sum_{j != m} S_m / S_j      more
    k_m   = 1 - tanh(alpha rho_m)               if rho_m > 1, else 1      (CVPR 2022)
    k_m   = 1 - alpha tanh(rho_m - 1)           if rho_m > 1, else 1      (TPAMI 2024, as others report it)
    g    <- k_m g                               gradients of encoder m; heads are left alone          (OGM)
    g    <- k_m g + e,  e ~ N(0, std(g)^2)      entry by entry, std of the tensor's g before scaling  (OGM-GE)

The noise goes to every modality, also where k = 1. The first form jumps to 1 - tanh(alpha) as soon as rho exceeds 1;
the second starts at 1, and is kept from turning negative where alpha > 1.

Differs from the released code: that one touches convolution weights only (tensors of four dimensions), which leaves
out encoders without any. Here all weights of two or more dimensions are meant, as the authors advise for such
encoders; `tensors: conv` gives theirs. Biases and normalisation layers have no part in either. Noise is drawn where
the gradients are, from a seed that all workers share, so their devices must be of one kind: on a CPU core it takes
0.25 s for the 22 million weights of two ResNet-18.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from counterpoise.contracts import LABEL, Batch, Outputs, Step
from counterpoise.functional import mean_ratios, true_class_scores
from counterpoise.methods.base import HEADS, Method, MethodConfig
from counterpoise.models.heads import Head
from counterpoise.models.network import MultimodalNet


def modulation(ratios: Tensor, alpha: float, form: str = "tanh") -> Tensor:
    """k_m of every modality [M] from its ratio to the others; 1 for those that are not ahead."""
    slowed = 1 - torch.tanh(alpha * ratios) if form == "tanh" else (1 - alpha * torch.tanh(ratios - 1)).clamp(min=0)
    return torch.where(ratios > 1, slowed, torch.ones_like(slowed))


def noise_like(gradient: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise with the standard deviation of a gradient's entries (+ 1e-8); `rng` is on its device."""
    std = gradient.std(correction=min(1, gradient.numel() - 1)) + 1e-8
    return std * torch.randn(gradient.shape, generator=rng, dtype=gradient.dtype, device=gradient.device)


def generator_on(device: torch.device, rng: torch.Generator) -> torch.Generator:
    """`rng` itself on the CPU, else a generator on `device` seeded from it: replicas draw the same numbers."""
    if device.type == "cpu":
        return rng
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))


class OGMConfig(MethodConfig):
    head: Literal["concat", "sum"] = Field("concat", description="how features become fused logits (paper: both)")
    alpha: float = Field(
        0.3,
        gt=0,
        description="strength; BalanceMM and an example of the released code: 0.3; its other advice: 0.1; authors' "
        "KSounds run of 2024: 0.8",
    )
    form: Literal["tanh", "continuous"] = Field(
        "tanh", description="k = 1 - tanh(alpha rho) (paper of 2022, released), or 1 - alpha tanh(rho - 1) (2024)"
    )
    first_epoch: int = Field(1, ge=1, description="modulation begins (released: the first; in 2024 after five)")
    last_epoch: int | None = Field(
        None, ge=1, description="modulation ends; null: with the run (ours; released: epoch 50 of 100, in 2024 60)"
    )
    tensors: Literal["weights", "conv"] = Field(
        "weights",
        description="weights of two or more dimensions (the authors' advice for encoders without convolutions), or of "
        "exactly four (released)",
    )

    def includes(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient of an encoder's parameter is modulated."""
        return parameter.dim() == 4 if self.tensors == "conv" else parameter.dim() >= 2


class OGM(Method[OGMConfig]):
    """The encoder of the modality that is ahead gets smaller gradients."""

    Config = OGMConfig
    paper = "Peng, Wei, Deng, Wang, Hu. CVPR 2022"
    modality_predictions = "W_m u_m + b / M of the concat head, terms of the sum head: they add up to the fused logits"
    beyond_two = "ours: the mean of the ratios to each other modality, as the authors suggested when asked"
    released = (
        "Modulates convolution weights (four dimensions) only, during the first half of the run; here all weights of "
        "two or more dimensions throughout, and tensors=conv with last_epoch gives the released behaviour."
    )
    min_modalities = 2
    noise: ClassVar[bool] = False

    def head(self, widths: Mapping[str, int]) -> Head:
        return HEADS[self.config.head](widths, self.setting.num_classes)

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        config = self.config
        if not config.first_epoch <= step.epoch <= (config.last_epoch or self.setting.epochs):
            return {}
        scores = [true_class_scores(out.unimodal[m].detach(), batch[LABEL]).sum() for m in self.modalities]
        ratios = mean_ratios(self.comm.sum(torch.stack(scores)))
        coefficients = modulation(ratios, config.alpha, config.form)
        rng = generator_on(coefficients.device, step.rng)
        for name, k in zip(self.modalities, coefficients.unbind(), strict=True):
            for parameter in net.encoders[name].parameters():
                if parameter.grad is not None and config.includes(parameter):
                    noise = noise_like(parameter.grad, rng) if self.noise else None
                    parameter.grad.mul_(k)
                    if noise is not None:
                        parameter.grad.add_(noise)
        return {f"modulation/{name}": k for name, k in zip(self.modalities, coefficients.unbind(), strict=True)}


class OGMGEConfig(OGMConfig):
    pass


class OGMGE(OGM):
    """OGM, and noise as large as the gradients, which is said to help generalisation."""

    Config = OGMGEConfig
    noise = True
