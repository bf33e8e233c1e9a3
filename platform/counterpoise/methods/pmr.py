"""PMR: the modality that lags behind is drawn to the prototypes of its classes.

Fan, Xu, Wang, Wang, Guo. PMR: Prototypical Modal Rebalance for Multimodal Learning. CVPR 2023.

    c_m,k  prototype: mean feature of class k over a tenth of the training rows, made anew before every epoch,
           c <- eps c_old + (1 - eps) c_new from the second time on
    d_m = |u_m - c_m,k| over all k,   pi_m = softmax(-d_m),   PCE_m = CE(-d_m, y),   P_m = sum of pi_m,y over the batch
    beta_m  = clip(max_n P_n / P_m - 1, 0, 1)        how far m is behind the best
    gamma_m = clip(P_m / min_n P_n - 1, 0, 1)        how far m is ahead of the worst
    L = CE(z, y) + alpha sum_m beta_m PCE_m - mu sum_m gamma_m H(pi_m)        the last sum in the first E_r epochs

Distances are Euclidean and not squared, with a zero gradient where a feature lies on a prototype. A class that the
rows of an epoch lack keeps its prototype; one that was never seen has the mean of all features until it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, EpochContext, Outputs, Step
from counterpoise.methods.base import HEADS, Method, MethodConfig, Setting, evaluating
from counterpoise.models.heads import Head
from counterpoise.models.network import MultimodalNet

TINY = torch.finfo(torch.float32).tiny


def prototype_logits(features: Tensor, prototypes: Tensor) -> Tensor:
    """Minus the distances [B, K] of features [B, D] to prototypes [K, D]."""
    return -torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of softmax(logits) over samples."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1).mean()


def rebalancing(scores: Tensor, form: Literal["paper", "released"] = "paper") -> tuple[Tensor, Tensor]:
    """beta [M] and gamma [M] from P [M]; released: 1 for all but the best, and no gamma."""
    if form == "released":
        return (scores < scores.max()).to(scores), torch.zeros_like(scores)
    behind = scores.max() / scores.clamp_min(TINY) - 1
    ahead = scores / scores.min().clamp_min(TINY) - 1
    return behind.clamp(0, 1), ahead.clamp(0, 1)


def moved_prototypes(old: Tensor, seen: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """Prototypes [K, D] from the old ones, feature sums [K, D] and counts [K] per class; seen [K]: has an old one."""
    here, before = counts[:, None] > 0, seen[:, None] > 0
    means = sums / counts[:, None].clamp_min(1)
    overall = sums.sum(dim=0) / counts.sum().clamp_min(1)
    fresh = torch.where(before, momentum * old + (1 - momentum) * means, means)
    return torch.where(here, fresh, torch.where(before, old, overall))


class PMRConfig(MethodConfig):
    head: Literal["concat", "sum"] = Field("concat", description="how features become fused logits (paper: either)")
    alpha: float = Field(1.0, ge=0, description="weight of the prototype losses (paper: 1 or 2; released: 1)")
    mu: float = Field(0.01, ge=0, description="weight of the entropies (paper: 1e-2 or 1e-3)")
    form: Literal["paper", "released"] = Field(
        "paper", description="clipped ratios and entropies (paper), or coefficients of 0 and 1 and none (released)"
    )
    entropy_epochs: int | None = Field(
        None, ge=0, description="E_r, first epochs with entropies; default a fifth of all, at least one (ours)"
    )
    last_epoch: int | None = Field(
        None, ge=0, description="plain joint training after this epoch; default never (paper; released: 100 of 150)"
    )
    momentum: float = Field(0.2, ge=0, lt=1, description="eps, share of the old prototype (released; BalanceMM: 0.5)")
    subset: float = Field(0.1, gt=0, le=1, description="part of the training rows that prototypes are made of (paper)")


class PMR(Method[PMRConfig]):
    """The modality that lags behind is drawn to class prototypes, the one ahead is kept from being too sure."""

    Config = PMRConfig
    paper = "Fan, Xu, Wang, Wang, Guo. CVPR 2023"
    modality_predictions = (
        "W_m u_m + b / M of the concat head, terms of the sum head; parts: the nearest prototype, from minus distances"
    )
    beyond_two = (
        "ours: a modality is drawn by how far the best is ahead of it, and held by how far it is ahead of the worst; "
        "for two modalities these are the ratio rho of the paper and its inverse"
    )
    released = (
        "Coefficients are 0 or 1 and there are no entropies (form=released); the default is the paper's. Its "
        "modulation ends after 100 of 150 epochs (last_epoch)."
    )
    min_modalities = 2

    def __init__(self, config: PMRConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        self.last_epoch = setting.epochs if config.last_epoch is None else config.last_epoch
        self.entropy_epochs = max(1, setting.epochs // 5) if config.entropy_epochs is None else config.entropy_epochs
        self._coefficients: dict[str, Tensor] = {}

    def head(self, widths: Mapping[str, int]) -> Head:
        head = HEADS[self.config.head](widths, self.setting.num_classes)
        head.register_buffer("prototypes", torch.zeros(self.setting.num_classes, sum(widths.values())))
        head.register_buffer("seen", torch.zeros(self.setting.num_classes))
        return head

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        prototypes, seen = net.head.get_buffer("prototypes"), net.head.get_buffer("seen")
        table = prototypes.new_zeros(prototypes.shape[0], prototypes.shape[1] + 1)  # sums, and counts at the end
        with evaluating(net):
            for batch in context.batches("train", self.config.subset):
                features, labels = net(batch).features, batch[LABEL]
                rows = torch.cat([*(features[m] for m in self.modalities), table.new_ones(len(labels), 1)], dim=1)
                table += F.one_hot(labels, len(table)).to(rows).T @ rows
        table = self.comm.sum(table)
        sums, counts = table[:, :-1], table[:, -1]
        prototypes.copy_(moved_prototypes(prototypes, seen, sums, counts, self.config.momentum))
        seen.copy_(((seen > 0) | (counts > 0)).to(seen))

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        out = net(batch)
        if step.epoch <= self.last_epoch:
            out.extra.update(self.parts(net, out))
        return out

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        losses, labels = super().losses(out, batch, step), batch[LABEL]
        self._coefficients = {}
        if step.epoch > self.last_epoch:
            return losses
        logits = [out.extra[f"{m}/prototype"] for m in self.modalities]
        pulls = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
        beta, gamma = rebalancing(self.comm.sum(torch.exp(-pulls.detach()).sum(dim=1)), self.config.form)
        losses["prototypes"] = self.config.alpha * (beta * pulls.mean(dim=1)).sum()
        if self.config.form == "paper" and step.epoch <= self.entropy_epochs:
            losses["entropy"] = -self.config.mu * (gamma * torch.stack([entropy(z) for z in logits])).sum()
        for kind, values in (("beta", beta), ("gamma", gamma)):
            self._coefficients |= {f"{kind}/{m}": value for m, value in zip(self.modalities, values, strict=True)}
        return losses

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self._coefficients

    def parts(self, net: MultimodalNet, out: Outputs) -> dict[str, Tensor]:
        prototypes = net.head.get_buffer("prototypes").split(list(net.head.widths.values()), dim=1)
        return {
            f"{m}/prototype": prototype_logits(out.features[m], c)
            for m, c in zip(self.modalities, prototypes, strict=True)
        }
