"""On-the-fly prediction modulation (OPM): features of the modality that is ahead are dropped at random.

Wei, Hu, Du, Wen. On-the-fly Modulation for Balanced Multimodal Learning. TPAMI 2024.

From the ratio rho_m of a batch's summed true-class probabilities, as in OGM:

    q_m  = clip(q_base (1 + lam tanh(rho_m - 1)), 0, 1)    if rho_m > 1, else 0
    mu_m ~ Bernoulli(1 - q_m)                              one per sample and modality
    u_m <- mu_m u_m / (1 - theta)                          theta = sum_m D_m q_m / sum_m D_m, one for all modalities
    L    = CE(z, y),   z from the concat head

A batch is treated so with probability p_exe, and only after warm-up. The weakest modality has rho <= 1 and q = 0
whatever the scores are, so no sample ever loses all its modalities, and the mean over the samples that are left is
the mean over all of them. Scores come from features before anything is dropped. Predictions use all features.

Differs from the released code: that one applies q to the batch it was computed from (`q_of: same_batch`); the paper's
algorithm, as others describe it, to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from counterpoise.contracts import LABEL, Batch, Comm, Outputs, Step
from counterpoise.functional import mean_ratios, true_class_scores
from counterpoise.methods.base import Method, MethodConfig, Setting, local_rows
from counterpoise.models.network import MultimodalNet


def drop_probabilities(ratios: Tensor, q_base: float, lam: float) -> Tensor:
    """q_m of every modality [M] from its ratio to the others; 0 for those that are not ahead."""
    q = (q_base * (1 + lam * torch.tanh(ratios - 1))).clamp(0, 1)
    return torch.where(ratios > 1, q, torch.zeros_like(q))


def drop_features(features: Mapping[str, Tensor], q: Tensor, uniform: Tensor) -> dict[str, Tensor]:
    """Features with those of modality m set to 0 where uniform[:, m] < q_m, all divided by 1 - theta.

    q: [M]; uniform: numbers from [0, 1), [B, M], in the order of `features`.
    """
    widths = q.new_tensor([u.shape[1] for u in features.values()])
    theta = (widths * q).sum() / widths.sum()
    factors = (uniform >= q).to(q.dtype) / (1 - theta)
    return {name: u * factors[:, i : i + 1] for i, (name, u) in enumerate(features.items())}


class OPMConfig(MethodConfig):
    q_base: float = Field(
        0.5, ge=0, le=1, description="probability of a drop where rho is just above 1 (released script; BalanceMM: 0.4)"
    )
    lam: float = Field(0.5, ge=0, description="growth of that probability with rho (released script, BalanceMM)")
    p_exe: float = Field(0.7, ge=0, le=1, description="probability that a batch is treated (released, BalanceMM)")
    warmup: int | None = Field(
        None, ge=0, description="epochs before the first drop; null: a twentieth of the run (released: 5, here scaled)"
    )
    last_epoch: int | None = Field(
        None, ge=1, description="the last epoch with drops; null: the end of the run (ours; released: 60)"
    )
    q_of: Literal["previous_batch", "same_batch"] = Field(
        "previous_batch",
        description="batch that q is computed from (paper, by others' account), or the same (released)",
    )


class OPM(Method[OPMConfig]):
    """Features of the modality that is ahead are dropped from some samples, so that the others must be used."""

    Config = OPMConfig
    paper = "Wei, Hu, Du, Wen. TPAMI 2024"
    modality_predictions = "W_m u_m + b / M of the concat head, without drops: they add up to the fused logits"
    beyond_two = "ours: the mean of the ratios to each other modality, as in OGM; all that are ahead may be dropped"
    released = (
        "Computes the probabilities of a drop from the same batch; here from the batch before, which is how the "
        "paper's algorithm is described, and q_of=same_batch gives the released behaviour."
    )
    min_modalities = 2

    def __init__(self, config: OPMConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        self.warmup = setting.epochs // 20 if config.warmup is None else config.warmup

    def attach(self, net: MultimodalNet) -> None:
        if self.config.q_of == "previous_batch":
            net.register_buffer("drop_probabilities", torch.zeros(len(self.modalities)))

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        config, out = self.config, net(batch)
        scores = [true_class_scores(out.unimodal[m].detach(), batch[LABEL]).sum() for m in self.modalities]
        q = drop_probabilities(mean_ratios(self.comm.sum(torch.stack(scores))), config.q_base, config.lam)
        if config.q_of == "previous_batch":
            remembered = net.get_buffer("drop_probabilities")
            previous = remembered.clone()
            remembered.copy_(q)
            q = previous
        executed = bool(torch.rand((), generator=step.rng) < config.p_exe)
        if not (executed and self.warmup < step.epoch <= (config.last_epoch or self.setting.epochs)):
            return out
        uniform = torch.rand(step.batch_size, len(self.modalities), generator=step.rng)
        dropped = drop_features(out.features, q, local_rows(uniform, step, batch[LABEL]))
        return Outputs(out.features, out.unimodal, net.head(dropped).fused, extra={"q": q})

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Nothing to rework; the probabilities, 0 where the batch was left alone."""
        q = out.extra.get("q", batch[LABEL].new_zeros(len(self.modalities)))
        return {f"drop/{name}": value for name, value in zip(self.modalities, q.unbind(), strict=True)}
