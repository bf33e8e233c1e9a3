"""ReconBoost: modalities take turns, each learning what the ensemble of the others got wrong.

Hua, Xu, Bao, Yang, Huang. ReconBoost: Boosting Can Achieve Modality Reconcilement. ICML 2024.

One head for all modalities, hidden layer of 256; ensemble z = b sum_m z^m with one learned number b. In turn s it is
modality m = s mod M that learns, then everybody is brought back together:

    boost      net m and the head:    mean_i (w1 - w2 softmax(J_i)_y) CE(z^m_i, y) + alpha A
               J = sg[b sum_{j != m} z^j]                          what the others say together
               A = mean (softmax(z^m) - sg[softmax(z^m')])^2       m' had the turn before; none in the first turn
    rectify    all nets, head and b:  CE(z, y)

both with a fresh optimizer. A modality joins the ensemble with its first turn; J is 0 (uniform) as long as there is
no other. While one net learns, those of the others are in evaluation mode.

Differs from the released code in what that does by accident. Its loss is a mean over classes, which divides the
boosting term by K (`reduction: released`). The released w1 and w2, 5 and 1 for the six classes of CREMA-D, were found
with it: with the sum they make steps of the first phase K times as long, which a learning rate of 0.05 did not stand.
The defaults here have their ratio, and with the sum about their size. Its term A detaches both
sides and so adds a number and no gradient (`consolidation: detached`). There the other nets move their running
statistics in passes that train nothing; and in the first turn the softmax runs over a single number, so that the
factor is w1 - w2 and not w1 - w2 / K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, EpochContext, Outputs, Stage, Step
from counterpoise.functional import true_class_scores
from counterpoise.methods.base import Method, MethodConfig, evaluating
from counterpoise.models.heads import Head, SharedHead
from counterpoise.models.network import MultimodalNet

BOOST, RECTIFY = "boost", "rectify"


def boosting_loss(logits: Tensor, others: Tensor, labels: Tensor, first: float, second: float) -> Tensor:
    """mean_i (first - second softmax(others_i)_y) CE(logits_i, y); no gradient to the others' logits [B, K]."""
    factors = first - second * true_class_scores(others.detach(), labels)
    return (factors * F.cross_entropy(logits, labels, reduction="none")).mean()


def consolidation_loss(logits: Tensor, before: Tensor) -> Tensor:
    """Mean squared difference of the probabilities, over samples and classes; no gradient to `before` [B, K]."""
    return F.mse_loss(torch.softmax(logits, dim=1), torch.softmax(before.detach(), dim=1))


def turns(epochs: int, modalities: Sequence[str], boost: int, rectify: int) -> list[tuple[str, int, int]]:
    """Whose turn it is, and the epochs of its two phases, for all of a run.

    Turns are of full length while epochs last, and the last one is cut. A run shorter than one round of turns is
    shared out evenly instead, the first phase never going without; with fewer epochs than modalities, nobody has one.
    """
    count, length = len(modalities), boost + rectify
    if epochs < count:
        return []
    if epochs >= count * length:
        left = [min(length, epochs - start) for start in range(0, epochs, length)]
        parts = [(min(boost, n), max(n - boost, 0)) for n in left]
    else:
        left = [epochs * (i + 1) // count - epochs * i // count for i in range(count)]
        parts = [(first := max(1, round(n * boost / length)), n - first) for n in left]
    return [(modalities[turn % count], *part) for turn, part in enumerate(parts)]


class EnsembleHead(SharedHead):
    """A shared head whose logits are added up over the members of the ensemble and scaled: z = b sum_m z^m."""

    def __init__(self, widths: Mapping[str, int], num_classes: int, hidden: int, scale: float) -> None:
        super().__init__(widths, num_classes, hidden)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.members = self.modalities

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        out = super().forward(features)
        out.fused = self.together(out.unimodal, self.members) if set(self.members) <= set(features) else None
        return out

    def together(self, logits: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        return self.scale * torch.stack([logits[m] for m in names]).sum(dim=0)

    def fuse_present(self, out: Outputs) -> Tensor:
        """Of the members that are present; of whoever is present, if no member is."""
        present = self.present(out)
        return self.together(out.unimodal, [m for m in self.members if m in present] or present)

    def architecture(self) -> dict[str, Any]:
        return {"members": list(self.members)}

    def restore(self, architecture: Mapping[str, Any]) -> None:
        self.members = tuple(architecture["members"])


class ReconBoostConfig(MethodConfig):
    phase1_epochs: int = Field(
        4, ge=1, description="epochs of a turn in which one net learns (released); ours: fewer in runs of under a round"
    )
    phase2_epochs: int = Field(
        4, ge=0, description="epochs of a turn in which all learn (released); ours: fewer in runs of under a round"
    )
    w1: float = Field(
        1.0, gt=0, description="w1 (ours; released, with its mean over classes: CREMA-D 5, AVE, ModelNet 4, MOSEI 1)"
    )
    w2: float = Field(
        0.2, ge=0, description="w2, at most w1 (ours; released, with its mean: CREMA-D, AVE, ModelNet 1, MOSEI 0.25)"
    )
    alpha: float = Field(0.5, ge=0, description="weight of memory consolidation (released)")
    reduction: Literal["sum", "released"] = Field(
        "sum", description="over classes: their sum, which is the cross-entropy (paper), or their mean (released)"
    )
    consolidation: Literal["trained", "detached", "none"] = Field(
        "trained", description="term A: with a gradient (paper), without one as in the released code, or left out"
    )
    hidden: int = Field(256, gt=0, description="width of the shared head's hidden layer (released)")
    scale: float = Field(1.0, gt=0, description="b at the start (released; BalanceMM 0.01)")

    @model_validator(mode="after")
    def _no_negative_factors(self) -> ReconBoostConfig:
        if self.w2 > self.w1:
            raise ValueError(f"w2 is {self.w2}, w1 {self.w1}: with w2 above w1 the loss would push labels away")
        return self


class ReconBoost(Method[ReconBoostConfig]):
    """Modalities take turns: one learns what the others got wrong, then all are trained together."""

    Config = ReconBoostConfig
    paper = "Hua, Xu, Bao, Yang, Huang. ICML 2024"
    modality_predictions = (
        "linear probes on the frozen encoders, as the authors do; parts: the shared head's logits z_m. During "
        "training, curves show the shared head's"
    )
    beyond_two = "as published (three modalities on MOSEI): turns go round, the turn before is the previous modality's"
    released = (
        "The code averages the boosting loss over classes (default: sum, as the text; reduction=released) and detaches "
        "both sides of memory consolidation, which thus trains nothing (default: trained; consolidation=detached)."
    )
    min_modalities = 2
    probe = True

    def stages(self) -> tuple[Stage, ...]:
        config = self.config
        plan = turns(self.setting.epochs, self.modalities, config.phase1_epochs, config.phase2_epochs)
        parts = [part for m, boost, rectify in plan for part in ((f"{BOOST} {m}", boost), (f"{RECTIFY} {m}", rectify))]
        made = [Stage(name, epochs, fresh_optimizer=True) for name, epochs in parts if epochs]
        return tuple(made) or (Stage(RECTIFY, self.setting.epochs, fresh_optimizer=True),)

    def head(self, widths: Mapping[str, int]) -> Head:
        return EnsembleHead(widths, self.setting.num_classes, self.config.hidden, self.config.scale)

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        seen = [*(epoch.stage for epoch in context.history), context.stage.name]
        names = [name for stage in seen for name in _turn(stage)[1]]
        if names:
            _head(net).members = tuple(m for m in self.modalities if m in names)

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        phase, name = _turn(step.stage.name)
        head = _head(net)
        if phase == RECTIFY:
            return net(batch, head.members)
        out: Outputs = net(batch, name)
        others = [m for m in head.members if m not in name]
        out.extra["others"] = torch.zeros_like(out.unimodal[name[0]])
        if others:
            with evaluating(net):
                out.unimodal |= net(batch, others).unimodal
                out.extra["others"] = head.together(out.unimodal, others)
        out.fused = head.together(out.unimodal, head.members)
        return out

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        phase, name = _turn(step.stage.name)
        if phase == RECTIFY:
            return super().losses(out, batch, step)
        config, logits = self.config, out.unimodal[name[0]]
        loss = boosting_loss(logits, out.extra["others"], batch[LABEL], config.w1, config.w2)
        found = {BOOST: loss / self.setting.num_classes if config.reduction == "released" else loss}
        before = self.modalities[self.modalities.index(name[0]) - 1]
        if before in out.unimodal and config.consolidation != "none":
            term = config.alpha * consolidation_loss(logits, out.unimodal[before])
            found["consolidation"] = term if config.consolidation == "trained" else term.detach()
        return found

    def parts(self, net: MultimodalNet, out: Outputs) -> dict[str, Tensor]:
        return {f"{name}/shared_head": logits for name, logits in out.unimodal.items()}


def _turn(stage: str) -> tuple[str, list[str]]:
    """The phase of a stage, and the modality whose turn it is, if it is anybody's."""
    phase, *name = stage.split(" ", 1)
    return phase, name


def _head(net: MultimodalNet) -> EnsembleHead:
    assert isinstance(net.head, EnsembleHead)
    return net.head
