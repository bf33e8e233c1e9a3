"""Gradient boosting on top of naive joint training, stage by stage: what AUG is compared to in its Fig. 1.

Jiang, Huang, Yang. Rethinking Multimodal Learning from the Perspective of Mitigating Classification Ability
Disproportion. NeurIPS 2025, where one sentence describes it: the trained naive model, its strong modality frozen, and
gradient boosting on the weak one. All numbers and details below are ours.

    naive     z = sum_m z_m, L = CE(z, y), with one Linear per modality; F_0 = z_w of the weak modality w
    boost t   encoders, Linears and classifiers 1 .. t-1 are frozen
              r   = Y - softmax(F_{t-1})                        the negative gradient of CE(F_{t-1}, y)
              h_t = argmin_h mean ||h(u_w) - r||^2              its own Linear-ReLU-Linear on the features, D-256-K
              F_t = F_{t-1} + nu_t h_t                          nu_t = 1, or by line search on CE(F_{t-1} + nu h_t, y)
    fused     sum_{m != w} z_m + F_T

In contrast to AUG, an old classifier never changes, no layer is shared and no encoder learns from a new classifier.
There is no released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import (
    LABEL,
    Batch,
    Comm,
    ConfigError,
    Decision,
    EpochContext,
    EpochStats,
    Outputs,
    Stage,
    Step,
)
from counterpoise.functional import true_class_scores
from counterpoise.methods.base import Method, MethodConfig, Setting, evaluating
from counterpoise.models.heads import Head, SumHead, linear
from counterpoise.models.network import MultimodalNet

NAIVE = "naive"
GRID = (0.0, *(2 ** (power / 2) for power in range(-6, 9)))  # 0, 1/8 .. 16: what a line search tries


def residuals(logits: Tensor, labels: Tensor) -> Tensor:
    """r = Y - softmax(F) [B, K], the negative gradient of the cross-entropy by the logits; rows sum to 0."""
    return F.one_hot(labels, logits.shape[1]) - torch.softmax(logits, dim=1)


def fit_loss(newest: Tensor, before: Tensor, labels: Tensor, lam: float | None = None) -> Tensor:
    """What classifier h_t minimises, given its logits and F_{t-1}, both [B, K]; mean over samples.

    lam None: ||h - r||^2. Otherwise the cross-entropy with a target of 1 - lam p_y at the true class, p of F_{t-1}.
    """
    before = before.detach()
    if lam is None:
        return (newest - residuals(before, labels)).square().sum(dim=1).mean()
    target = 1 - lam * true_class_scores(before, labels)
    return (target * F.cross_entropy(newest, labels, reduction="none")).mean()


def line_losses(before: Tensor, newest: Tensor, labels: Tensor, grid: Sequence[float] = GRID) -> Tensor:
    """CE(F_{t-1} + nu h_t, y) summed over samples, for every nu of the grid [G] in float64."""
    return torch.stack([F.cross_entropy(before + nu * newest, labels, reduction="sum").double() for nu in grid])


def plan(epochs: int, rounds: int, round_epochs: int) -> tuple[int, int, int]:
    """Epochs of the naive stage, rounds, and epochs of a round: boosting gets half of the epochs at most.

    Rounds become shorter first; where one epoch is too long for that many of them, they become fewer.
    """
    half = max(1, epochs // 2)
    rounds = min(rounds, half)
    round_epochs = min(round_epochs, half // rounds)
    return epochs - rounds * round_epochs, rounds, round_epochs


class StagewiseHead(SumHead):
    """The sum head with room for further classifiers of every modality, of which `rounds[m]` take part.

    All are there from the start. Those that take no part have no gradient, so the optimizer passes them by.
    """

    steps: Tensor

    def __init__(self, widths: Mapping[str, int], num_classes: int, hidden: int, capacity: int) -> None:
        super().__init__(widths, num_classes)
        self.rounds = dict.fromkeys(widths, 0)
        self.boosters = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    nn.Sequential(linear(width, hidden), nn.ReLU(), linear(hidden, num_classes))
                    for _ in range(capacity)
                )
                for name, width in widths.items()
            }
        )
        self.register_buffer("steps", torch.ones(len(widths), capacity))  # nu_t of every modality

    def booster(self, modality: str, number: int, features: Tensor) -> Tensor:
        """h_t of a modality, t = `number` from 1."""
        logits: Tensor = self.boosters[modality][number - 1](features)  # type: ignore[index]
        return logits

    def logits(self, modality: str, features: Tensor, upto: int) -> Tensor:
        """F_t of a modality [B, K], t = `upto`."""
        total: Tensor = self.linears[modality](features)
        steps = self.steps[self.modalities.index(modality)]
        for number in range(1, upto + 1):
            total = total + steps[number - 1] * self.booster(modality, number, features)
        return total

    def term(self, modality: str, features: Tensor) -> Tensor:
        return self.logits(modality, features, self.rounds[modality])

    def architecture(self) -> dict[str, Any]:
        return {"rounds": dict(self.rounds)}

    def restore(self, architecture: Mapping[str, Any]) -> None:
        self.rounds = {name: int(architecture["rounds"][name]) for name in self.modalities}


class GradientBoostingConfig(MethodConfig):
    rounds: int = Field(10, gt=0, description="T, classifiers added to a boosted modality (ours; the paper gives none)")
    round_epochs: int = Field(
        5,
        gt=0,
        description="epochs to fit one (ours); shorter, then fewer rounds if all take over half of the run's epochs",
    )
    hidden: int = Field(256, gt=0, description="width of the hidden layer of an added classifier (ours; as in AUG)")
    boost: tuple[str, ...] = Field(
        (),
        description="modalities to boost; default: the weakest on held-out data after naive training (ours)",
    )
    start: Literal["last", "best"] = Field(
        "last",
        description="weights that boosting starts from: of the last naive epoch, or of the one selected so far, which "
        "is then tested if no round beats it (ours)",
    )
    line_search: bool = Field(
        False, description="choose nu_t on the training split, from a grid of 0 to 16; else 1 (ours)"
    )
    soft_ce: bool = Field(
        False, description="fit by cross-entropy with a soft target, as AUG does, instead of least squares (ours)"
    )
    lam: float = Field(0.5, ge=0, le=1, description="the soft target's residual coefficient (ours; as in AUG)")


class GradientBoosting(Method[GradientBoostingConfig]):
    """Naive training, then frozen; classifiers added to the weak modality are fitted to what is left."""

    Config = GradientBoostingConfig
    paper = "toy of Fig. 1 in Jiang, Huang, Yang. NeurIPS 2025"
    modality_predictions = "the terms of the sum: z_m, and F_T of a boosted modality"
    beyond_two = "ours: the weakest one of any number of modalities is boosted, or those named in `boost`"
    released = "There is no released code; all details but the idea are ours."

    def __init__(self, config: GradientBoostingConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        if unknown := set(config.boost) - set(self.modalities):
            raise ConfigError(
                f"method.boost names {', '.join(sorted(unknown))}; modalities: {', '.join(self.modalities)}"
            )
        if setting.epochs < 2:
            raise ConfigError("method gradient_boosting needs 2 epochs or more: one of naive training, one of boosting")
        self.naive_epochs, self.rounds, self.round_epochs = plan(setting.epochs, config.rounds, config.round_epochs)
        self.boosted: tuple[str, ...] = ()

    def head(self, widths: Mapping[str, int]) -> Head:
        return StagewiseHead(widths, self.setting.num_classes, self.config.hidden, self.config.rounds)

    def stages(self) -> tuple[Stage, ...]:
        best = self.config.start == "best"
        naive = Stage(NAIVE, self.naive_epochs, selectable=best)
        return (
            naive,
            *(
                Stage(
                    f"boost {number}",
                    self.round_epochs,
                    fresh_optimizer=True,
                    own_schedule=True,
                    begin="best" if best and number == 1 else "last",
                )
                for number in range(1, self.rounds + 1)
            ),
        )

    def decide(self, history: Sequence[EpochStats]) -> Decision | None:
        last = history[-1]
        if last.epoch != self.naive_epochs:
            return None
        accuracy = {m: last.held_out.accuracy[m] for m in self.modalities}
        boosted = self.config.boost or (min(accuracy, key=lambda m: accuracy[m]),)
        return Decision(last.epoch, "boost", tuple(boosted), {"accuracy": accuracy, "named": bool(self.config.boost)})

    def apply(self, net: MultimodalNet, decision: Decision) -> None:
        self.boosted = decision.add
        self._begin_round(net, 1)

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        if context.stage.name != NAIVE and context.stage_epoch == 1:
            self._begin_round(net, 1 + (context.epoch - self.naive_epochs - 1) // self.round_epochs)

    def _begin_round(self, net: MultimodalNet, number: int) -> None:
        _head(net).rounds.update(dict.fromkeys(self.boosted, number))
        net.zero_grad(set_to_none=True)  # with legacy_zero_grad_step, gradients of 0 would move what is frozen

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        return net(batch) if step.stage.name == NAIVE else self._boosting_pass(net, batch)

    def _boosting_pass(self, net: MultimodalNet, batch: Batch) -> Outputs:
        """All predictions with nu_t = 1; `extra` has F_{t-1} ("before/...") and h_t ("newest/...")."""
        head = _head(net)
        extra: dict[str, Tensor] = {}
        with evaluating(net):
            features = {m: net.encode(m, batch[m]) for m in self.modalities}
            unimodal = {m: head.logits(m, u, head.rounds[m] - (m in self.boosted)) for m, u in features.items()}
        for name in self.boosted:
            before, newest = unimodal[name], head.booster(name, head.rounds[name], features[name])
            unimodal[name] = before + newest
            extra |= {f"before/{name}": before, f"newest/{name}": newest}
        return Outputs(features, unimodal, extra=extra)

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.stage.name == NAIVE:
            return super().losses(out, batch, step)
        lam = self.config.lam if self.config.soft_ce else None
        extra, labels = out.extra, batch[LABEL]
        return {f"{m}/fit": fit_loss(extra[f"newest/{m}"], extra[f"before/{m}"], labels, lam) for m in self.boosted}

    @torch.no_grad()
    def before_evaluation(self, net: MultimodalNet, context: EpochContext) -> None:
        """The line search of a round that ends with this epoch."""
        stage = context.stage
        if not self.config.line_search or stage.name == NAIVE or context.stage_epoch < stage.epochs:
            return
        head = _head(net)
        totals = torch.zeros(len(self.boosted), len(GRID), dtype=torch.float64, device=head.steps.device)
        for batch in context.batches("train"):
            extra = self._boosting_pass(net, batch).extra
            for row, name in zip(totals, self.boosted, strict=True):
                row += line_losses(extra[f"before/{name}"], extra[f"newest/{name}"], batch[LABEL])
        chosen = self.comm.broadcast([GRID[index] for index in self.comm.sum(totals).argmin(dim=1).tolist()])
        for name, step in zip(self.boosted, chosen, strict=True):
            head.steps[head.modalities.index(name), head.rounds[name] - 1] = step

    def num_classifiers(self, net: MultimodalNet) -> dict[str, int]:
        return {name: 1 + rounds for name, rounds in _head(net).rounds.items()}

    def classifier_weights(self, net: MultimodalNet) -> dict[str, list[float]]:
        """1, then nu_t of every round; the one that is being fitted has 1 until its line search."""
        if not self.config.line_search:
            return {}
        head = _head(net)
        steps = zip(head.modalities, head.steps.tolist(), strict=True)
        return {name: [1.0, *own[: head.rounds[name]]] for name, own in steps}

    def state_dict(self) -> dict[str, Any]:
        return {"boosted": list(self.boosted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.boosted = tuple(state["boosted"])


def _head(net: MultimodalNet) -> StagewiseHead:
    assert isinstance(net.head, StagewiseHead)
    return net.head
