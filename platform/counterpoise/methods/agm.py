"""Adaptive gradient modulation (AGM): per-modality logits by Shapley values, and gradients scaled by how each fares.

Li, Li, Hu, Lei, Li, Zhou. Boosting Multi-modal Model Performance with Adaptive Gradient Modulation. ICCV 2023.

F(S): fused logits when the inputs of the modalities outside S are zeros (in a text: the padding token); F(none) = 0.

    m_i  = sum_{S without i} |S|! (M - |S| - 1)! / M! (F(S + i) - F(S))          sum_i m_i = F(all)
           two modalities: m_a = (F(a,v) - F(0,v) + F(a,0)) / 2
    s_i  = mean_b -log max(softmax(m_i)_y, 1e-8)                                 lower is better
    r_i  = exp(M / (M - 1) (mean_j s_j - s_i))                                   two modalities: exp(s_other - s_i)
    t_i  = the same of the running means of s before this batch                  over the whole run; 1 at its start
    k_i  = exp(alpha min(t_i - r_i, cap))                                        < 1 for who is further ahead than usual
    L    = CE(sum_i m_i, y), with the gradient that enters m_i multiplied by k_i

In the mode "hook" the passes over zeros take part in the gradient: F(a,v) gets (k_a + k_v) / 2 of it, F(a,0) gets
(k_a - k_v) / 2. For a head that adds modalities up this scales the path of real inputs through encoder i by k_i. In
the mode "scale" they are for measuring only: the plain loss, and gradients of encoder i times k_i. Last, gradients are
clipped to norm 1 if an entry of the head's weights has one above 1.

Cost: 2^M - 1 passes through the head. Through the encoders one pass, and one over a single row of zeros, which is the
same for all samples; with `padded: network` the real inputs go through a second time. With two small CNNs a step
takes 1.13 times, and 2.3 times, as long as one of joint training.

Differs from the released code: there a pass with zeros runs the whole network in evaluation mode, so that with batch
normalisation or dropout m_i mixes features of two kinds (`padded: network`). Here features of real inputs are those of
the main pass in all terms, and only the zeros are encoded in evaluation mode, which keeps them out of running
statistics. Modulation there ends after 20 epochs (`last_epoch`); the authors' own advice is all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Outputs, Step
from counterpoise.functional import true_class_scores
from counterpoise.methods.base import HEADS, Method, MethodConfig, evaluating
from counterpoise.models.heads import Head
from counterpoise.models.network import MultimodalNet

Coalition = tuple[str, ...]  # modalities with real inputs, in the order of the network


def shapley_logits(values: Mapping[Coalition, Tensor]) -> dict[str, Tensor]:
    """m_i of every modality [B, K] from F(S) of all 2^M - 1 coalitions; they add up to F of the largest."""
    everyone = max(values, key=len)
    total = len(everyone)
    found = {}
    for name in everyone:
        terms = []
        for members, value in values.items():
            size = len(members)
            if name in members:
                terms.append(math.factorial(size - 1) * math.factorial(total - size) * value)
            else:
                terms.append(-math.factorial(size) * math.factorial(total - size - 1) * value)
        found[name] = torch.stack(terms).sum(dim=0) / math.factorial(total)
    return found


def ratios(scores: Tensor) -> Tensor:
    """r of every modality [M] from mean losses s [M]; 1 where they are level, above 1 for who is ahead."""
    return torch.exp(len(scores) / (len(scores) - 1) * (scores.mean() - scores))


def modulation(scores: Tensor, running: Tensor, alpha: float, cap: float) -> Tensor:
    """k of every modality [M] from this batch's scores and the running means before it."""
    return torch.exp(alpha * (ratios(running) - ratios(scores)).clamp(max=cap))


def with_gradient_scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x, to the bit, whose gradient is multiplied by `factor` on its way back."""
    return x.detach() + factor * (x - x.detach())


class AGMConfig(MethodConfig):
    head: Literal["concat", "sum"] = Field("concat", description="how features become fused logits (paper: both)")
    alpha: float = Field(
        1.0,
        ge=0,
        description="strength (released default; its AV-MNIST: 2.5, authors for CREMA-D: 1.5, BalanceMM: 0.1)",
    )
    cap: float = Field(10.0, ge=0, description="largest exponent before alpha (released; BalanceMM: 7)")
    mode: Literal["hook", "scale"] = Field(
        "hook", description="gradients that enter m_i are scaled (paper, released), or those of encoder i (BalanceMM)"
    )
    padded: Literal["features", "network"] = Field(
        "features",
        description="what a pass with zeros runs anew: only the zeros (ours), or all in evaluation mode (released)",
    )
    clip: float | None = Field(
        1.0, gt=0, description="norm that large gradients are clipped to (released); null: never (BalanceMM: 5)"
    )
    first_epoch: int = Field(1, ge=1, description="modulation begins (released: the first epoch)")
    last_epoch: int | None = Field(
        None, ge=1, description="modulation ends; null: with the run (authors for CREMA-D; released default: 20)"
    )


class AGM(Method[AGMConfig]):
    """Each modality's gradient is scaled by how its Shapley logits fare against what is usual in the run."""

    Config = AGMConfig
    paper = "Li, Li, Hu, Lei, Li, Zhou. ICCV 2023"
    modality_predictions = "Shapley logits over inputs replaced by zeros: they add up to the fused logits"
    beyond_two = "any number of modalities, as published; 2^M - 1 passes through the head"
    released = (
        "Passes with zeros run the whole network in evaluation mode; here real inputs are encoded once, in training "
        "mode, and padded=network gives the released behaviour. Its window of 20 epochs is last_epoch=20."
    )
    min_modalities = 2

    def head(self, widths: Mapping[str, int]) -> Head:
        return HEADS[self.config.head](widths, self.setting.num_classes)

    def attach(self, net: MultimodalNet) -> None:
        net.register_buffer("running_scores", torch.zeros(len(self.modalities)))

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        out = net(batch)
        with evaluating(net), torch.set_grad_enabled(self.config.mode == "hook"):
            real = net(batch).features if self.config.padded == "network" else out.features
            shapley = self._shapley(net, batch, out, real)
        k = self._modulation(net, shapley, batch[LABEL], step)
        return Outputs(out.features, shapley, out.fused, extra={"modulation": k})

    def _shapley(self, net: MultimodalNet, batch: Batch, out: Outputs, real: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """m_i from F(all) of `out` and passes through the head with features of zeros in place of real ones."""
        assert out.fused is not None
        zeros = self._zeros(net, batch)
        values: dict[Coalition, Tensor] = {tuple(real): out.fused}
        for size in range(1, len(real)):
            for members in combinations(real, size):
                values[members] = self._padded(net, {m: real[m] for m in members}, zeros)
        return shapley_logits(values)

    def _zeros(self, net: MultimodalNet, batch: Batch) -> dict[str, Tensor]:
        """Features [B, D_m] of inputs of zeros."""
        return {
            m: net.encode(m, batch[m].new_zeros(1, *batch[m].shape[1:])).expand(len(batch[m]), -1)
            for m in self.modalities
        }

    def _padded(self, net: MultimodalNet, real: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> Tensor:
        """Fused logits of real features, with those of zeros for all other modalities."""
        fused = net.head({m: real[m] if m in real else zeros[m] for m in self.modalities}).fused
        assert fused is not None
        return fused

    @torch.no_grad()
    def _modulation(self, net: MultimodalNet, shapley: Mapping[str, Tensor], labels: Tensor, step: Step) -> Tensor:
        """k of every modality [M], 1 outside the window; the running means take this batch in."""
        config, running = self.config, net.get_buffer("running_scores")
        sums = [-true_class_scores(shapley[m], labels).clamp(min=1e-8).log().sum() for m in self.modalities]
        *parts, count = self.comm.sum(torch.stack([*sums, sums[0].new_tensor(len(labels))])).unbind()
        scores = torch.stack(parts) / count
        k = modulation(scores, running, config.alpha, config.cap)
        running.lerp_(scores, 1 / (step.index + 1))
        active = config.first_epoch <= step.epoch <= (config.last_epoch or self.setting.epochs)
        return k if active else torch.ones_like(k)

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        if self.config.mode == "scale":
            return super().losses(out, batch, step)
        factors = out.extra["modulation"].unbind()
        parts = [with_gradient_scaled(out.unimodal[m], k) for m, k in zip(self.modalities, factors, strict=True)]
        return {"fused": F.cross_entropy(torch.stack(parts).sum(dim=0), batch[LABEL])}

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        factors = dict(zip(self.modalities, out.extra["modulation"].unbind(), strict=True))
        if self.config.mode == "scale":
            for m, k in factors.items():
                for parameter in net.encoders[m].parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(k)
        if self.config.clip is not None:
            clip(net, self.config.clip)
        return {f"modulation/{m}": k for m, k in factors.items()}

    def predict(self, net: MultimodalNet, batch: Batch, missing: Collection[str] = ()) -> Outputs:
        """A missing modality is one outside the coalition, as in training: its input is zeros."""
        out = net(batch, [m for m in self.modalities if m not in missing])
        if missing:
            out.fused = self._padded(net, out.features, self._zeros(net, batch))
        return Outputs(out.features, self._shapley(net, batch, out, out.features), out.fused)


def clip(net: MultimodalNet, norm: float) -> None:
    """Scale all gradients down to a norm together, if one of the head's weights has a gradient outside -1..1."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    weights = [p.grad for p in net.head.parameters() if p.grad is not None and p.dim() > 1]
    large = torch.stack([g.abs().amax() for g in weights]).amax() > 1
    total = nn.utils.get_total_norm(gradients)
    factor = torch.where(large, (norm / (total + 1e-6)).clamp(max=1), torch.ones_like(total))
    for gradient in gradients:
        gradient.mul_(factor)
