"""Gradient-Blending: losses of the joint and the single heads, weighted by how well each generalises.

Wang, Tran, Feiszli. What Makes Training Multi-modal Classification Networks Hard? CVPR 2020.

    L = sum_k w_k CE(z_k, y),   k: the joint head over all features, and a private head per modality
    a probe trains branch k alone, from a copy of the network; with its mean losses LT on train and LV on valid,
        G_k  = LV_k(before) - LV_k(after)                generalisation
        dO_k = O_k(after) - O_k(before),  O = LV - LT    overfitting
        w_k proportional to max(G_k, 0) / max(|dO_k|, floor)^2,  equal if all are 0

The floor is ours. dO is the difference of four measured losses, and the square of one that is nearly 0 by chance, or
even below it, takes all the weight: with a valid split of 242 rows a view of six features got 0.96, and the joint head
was left at chance. Where branches overfit as they do at full scale, by half a nat and more, the floor has no part.

offline: every branch is probed once, before training. online: before every super-epoch. Probes are stages aside:
they come on top of the epochs of a run, (M + 1) times as many again by default, and are undone. Losses are measured
in evaluation mode without augmentation, right before a probe's first batch and after its last. The valid split takes
part in training through the weights, here as in the paper; the test split does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import (
    LABEL,
    Batch,
    Comm,
    ConfigError,
    DataError,
    Decision,
    EpochContext,
    EpochStats,
    Outputs,
    Stage,
    Step,
)
from counterpoise.methods.base import Method, MethodConfig, Setting, evaluating
from counterpoise.models.heads import Head, MultiHead
from counterpoise.models.network import MultimodalNet

JOINT = "fused"
PROBE = "probe "
Losses = Mapping[str, Sequence[float]]  # (LT, LV) by branch


def blend_weights(
    before: Losses, after: Losses, floor: float = 1e-4
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """w, G and dO of every branch from its losses (LT, LV) before and after it was trained alone.

    floor: the least overfitting that is believed, in nats.
    """
    generalisation = {k: before[k][1] - after[k][1] for k in before}
    overfitting = {k: (after[k][1] - after[k][0]) - (before[k][1] - before[k][0]) for k in before}
    ratios = {k: max(generalisation[k], 0.0) / max(abs(overfitting[k]), floor) ** 2 for k in before}
    return normalised(ratios), generalisation, overfitting


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that sum to 1, equal ones if all are 0."""
    total = sum(weights.values())
    return {k: w / total if total else 1 / len(weights) for k, w in weights.items()}


class GBlendConfig(MethodConfig):
    mode: Literal["offline", "online", "fixed"] = Field(
        "offline",
        description="weights estimated once (paper, whose published weights are of this kind), before every "
        "super-epoch (paper, its refinement), or `weights` (released)",
    )
    weights: dict[str, float] = Field(
        {},
        description="with mode fixed: of every modality and of `fused`, brought to sum 1; equal if empty (ours). "
        "Released: audio .014, visual .630, fused .356 on Kinetics; .239, .384, .377 on AudioSet",
    )
    super_epoch: int = Field(10, gt=0, description="epochs between two estimates, mode online (BalanceMM)")
    probe_epochs: int | None = Field(
        None,
        gt=0,
        description="epochs of a probe; default as many as its weights are for: all, or a super-epoch (paper)",
    )
    floor: float = Field(
        0.1, gt=0, description="least overfitting that is believed, in nats (ours; 1e-4: the paper's rule alone)"
    )
    inference: Literal["joint", "average"] = Field(
        "joint", description="the joint head (released), or the mean of all logits (a re-implementation beside PMR)"
    )

    @model_validator(mode="after")
    def _weights_are_used(self) -> GBlendConfig:
        if self.weights and self.mode != "fixed":
            raise ValueError("weights: only with mode fixed")
        if any(w < 0 for w in self.weights.values()) or (self.weights and not any(self.weights.values())):
            raise ValueError("weights: none may be negative, and one at least must be above 0")
        return self


class GBlend(Method[GBlendConfig]):
    """Every modality has a loss of its own; the losses of branches that overfit count less."""

    Config = GBlendConfig
    paper = "Wang, Tran, Feiszli. CVPR 2020"
    modality_predictions = "a private Linear per modality"
    beyond_two = "as published: M + 1 branches"
    released = (
        "Only training with given weights is there (mode=fixed); here they are estimated by default, as the paper "
        "describes. Prediction by the joint head is the same."
    )
    min_modalities = 2

    def __init__(self, config: GBlendConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        self.branches = (*self.modalities, JOINT)
        if config.weights and set(config.weights) != set(self.branches):
            raise ConfigError(f"method.weights: give all of {', '.join(self.branches)}, and no others")
        self.weights = normalised(config.weights or dict.fromkeys(self.branches, 1.0))
        self.before: dict[str, list[float]] = {}
        self.after: dict[str, list[float]] = {}

    def head(self, widths: Mapping[str, int]) -> Head:
        return MultiHead(widths, self.setting.num_classes)

    def stages(self) -> tuple[Stage, ...]:
        epochs = self.setting.epochs
        if self.config.mode == "fixed":
            return super().stages()
        every = min(self.config.super_epoch, epochs) if self.config.mode == "online" else epochs
        stages = []
        for done in range(0, epochs, every):
            length = min(every, epochs - done)
            probe = self.config.probe_epochs or length
            stages += [
                Stage(PROBE + k, probe, fresh_optimizer=True, aside=True, selectable=False) for k in self.branches
            ]
            stages.append(Stage("train", length))
        return tuple(stages)

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        if context.stage.aside and context.stage_epoch == 1:
            branch = context.stage.name.removeprefix(PROBE)
            self.before[branch] = self._measure(net, branch, context)

    def end_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        if context.stage.aside and context.stage_epoch == context.stage.epochs:
            branch = context.stage.name.removeprefix(PROBE)
            self.after[branch] = self._measure(net, branch, context)

    def _measure(self, net: MultimodalNet, branch: str, context: EpochContext) -> list[float]:
        """Mean losses LT and LV of a branch over all workers."""
        sums = torch.zeros(2, 2, dtype=torch.float64, device=next(net.parameters()).device)
        splits: tuple[Literal["train", "valid"], ...] = ("train", "valid")
        with evaluating(net):
            for row, split in zip(sums, splits, strict=True):
                for batch in context.batches(split):
                    logits = _logits(net(batch, None if branch == JOINT else [branch]), branch)
                    row[0] += F.cross_entropy(logits, batch[LABEL], reduction="sum")
                    row[1] += len(batch[LABEL])
        (train, rows), (valid, held_out) = self.comm.sum(sums).tolist()
        if not held_out:
            raise DataError(
                "g_blend measures overfitting on a valid split, and this corpus has none; carve one from train on its "
                "card (splits.valid.carve), or give weights with method.mode fixed"
            )
        return [train / rows, valid / held_out]

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        branch = step.stage.name.removeprefix(PROBE)
        return net(batch, [branch] if step.stage.aside and branch != JOINT else None)

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.stage.aside:
            branch = step.stage.name.removeprefix(PROBE)
            return {branch: F.cross_entropy(_logits(out, branch), batch[LABEL])}
        return {k: w * F.cross_entropy(_logits(out, k), batch[LABEL]) for k, w in self.weights.items()}

    def fuse(self, net: MultimodalNet, out: Outputs) -> Tensor:
        if self.config.inference == "joint":
            return super().fuse(net, out)
        present = [k for k in self.branches if k == JOINT or k in out.unimodal]
        return torch.stack([_logits(out, k) for k in present]).mean(dim=0)

    def decide(self, history: Sequence[EpochStats]) -> Decision | None:
        if len(self.after) < len(self.branches):
            return None
        weights, generalisation, overfitting = blend_weights(self.before, self.after, self.config.floor)
        inputs = {"weights": weights, "generalisation": generalisation, "overfitting": overfitting}
        return Decision(history[-1].epoch, "blend_weights", inputs=inputs)

    def apply(self, net: MultimodalNet, decision: Decision) -> None:
        self.weights = dict(decision.inputs["weights"])
        self.before, self.after = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "before": self.before, "after": self.after}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights, self.before, self.after = (dict(state[key]) for key in ("weights", "before", "after"))


def _logits(out: Outputs, branch: str) -> Tensor:
    if branch != JOINT:
        return out.unimodal[branch]
    assert out.fused is not None, "the joint head needs all modalities in one pass"
    return out.fused
