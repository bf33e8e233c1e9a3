"""AUG: sustained boosting with adaptive classifier assignment (ACA).

Jiang, Huang, Yang. Rethinking Multimodal Learning from the Perspective of Mitigating Classification Ability
Disproportion. NeurIPS 2025. Equation numbers are those of that text.

Every modality m has n_m >= 1 configurable classifiers over one encoder: l_t = Layer2(relu(A_t u + c_t)), Layer2 shared
by all of them. Z_t = l_1 + w (l_2 + .. + l_t) are the logits of the first t. With p_y the true-class probability:

    n = 1:  L = CE(Z_1, y)                                                                        Eq. 1
    n > 1:  L = CE(w l_n, r) + CE(Z_n, y) + CE(Z_{n-1}, y)                                        Eq. 2 + 3 + 4
            r = Y (1 - lam softmax(Z_{n-1})_y)        residual label, released code (default)
            r = Y (1 - lam sum_{j<n} softmax(l_j)_y)  as printed in the paper, clamped at 0
    each modality makes its own optimizer step, in a fixed order

ACA, after epoch 1 and then every t_N epochs, from S_m = sum over the epoch's training passes of softmax(Z_n^m)_y:

    M = 2:  S_1 / S_2 > sigma + tau -> a classifier for modality 2;  < sigma - tau -> one for modality 1
    M > 2:  rho_m = (M - 1) S_m / sum_{j != m} S_j;  rho_m < sigma - tau -> one for m

Prediction: sum_m alpha_m Z^m.

Where we differ from the released code: it builds the optimizer before the classifiers that ACA adds, which are thus
never trained; here they are (`train_new_classifiers: false` gives the released behaviour). The paper's score sums the
probabilities of all classifiers and can exceed 1; the released form above cannot, and is used. A check after the last
epoch would change a model that is never evaluated, and is left out. Scores are summed over workers before the ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, ConfigError, Decision, EpochContext, EpochStats, Outputs, Step
from counterpoise.functional import true_class_scores
from counterpoise.methods.base import Method, MethodConfig, Setting
from counterpoise.models.heads import BoostedHead, Head, cumulative_logits
from counterpoise.models.network import MultimodalNet

WEIGHTS_PHASE = "weights"


def residual_label(stack: Tensor, weight: Tensor | float, labels: Tensor, lam: float, form: str) -> Tensor:
    """The true-class entry r_y of the newest classifier's target [B]; all other entries are 0. No gradient.

    stack: logits of all classifiers [B, n, K], n >= 2. form: "cumulative" (released code) or "sum_of_probabilities".
    """
    stack = stack.detach()
    if form == "cumulative":
        previous = cumulative_logits(stack, weight, stack.shape[1] - 1)
        return 1 - lam * true_class_scores(previous, labels)
    earlier = stack[:, :-1]
    scores = true_class_scores(earlier, labels.unsqueeze(1).expand(-1, earlier.shape[1]))
    return (1 - lam * scores.sum(dim=1)).clamp(min=0)


def boosting_losses(
    stack: Tensor,
    weight: Tensor | float,
    labels: Tensor,
    *,
    lam: float,
    residual: str = "cumulative",
    terms: Sequence[str] = ("residual", "all", "previous"),
) -> dict[str, Tensor]:
    """The chosen terms of Eq. 5 for one modality, each a mean over samples; Eq. 1 while there is one classifier.

    A residual label has mass on the true class only, so CE(l, r) = r_y CE(l, y), and the three terms are one
    log-softmax over [3, B, K].
    """
    if stack.shape[1] == 1:
        return {"first": F.cross_entropy(stack[:, 0], labels)}
    logits, factors = [], []
    for term in terms:
        if term == "residual":
            logits.append(weight * stack[:, -1])
            factors.append(residual_label(stack, weight, labels, lam, residual))
        else:
            logits.append(cumulative_logits(stack, weight, None if term == "all" else stack.shape[1] - 1))
            factors.append(torch.ones_like(stack[:, 0, 0]))
    log_p = F.log_softmax(torch.stack(logits), dim=-1)
    per_sample = -log_p.gather(-1, labels.view(1, -1, 1).expand(len(logits), -1, 1)).squeeze(-1)
    means = (torch.stack(factors) * per_sample).mean(dim=1)
    return dict(zip(terms, means.unbind(), strict=True))


def assignment(
    scores: Mapping[str, float], sigma: float, tau: float, policy: Literal["weakest_only", "all_below"]
) -> tuple[tuple[str, ...], dict[str, float]]:
    """The modalities that get a classifier, and the ratio of each modality to the others (1 = balanced).

    Two modalities follow the released rule on the one ratio of the first to the second exactly.
    """
    names = list(scores)
    total = sum(scores.values())
    ratios = {m: (len(names) - 1) * s / max(total - s, 1e-12) for m, s in scores.items()}
    if len(names) == 2:
        ratio = ratios[names[0]]
        weak = [names[1]] if ratio > sigma + tau else [names[0]] if ratio < sigma - tau else []
    else:
        weak = [m for m in names if ratios[m] < sigma - tau]
    if policy == "weakest_only" and weak:
        weak = [min(weak, key=lambda m: ratios[m])]
    return tuple(weak), ratios


def check_epochs(epochs: int, every: int) -> list[int]:
    """Epochs (1-based) after which ACA looks at the scores: the first, every t_N-th, never the last."""
    return [e for e in range(1, epochs) if e == 1 or e % every == 0]


class Objectives(MethodConfig):
    """Which terms of Eq. 5 are used once a modality has more than one classifier (Table 4 of the paper)."""

    residual: bool = Field(True, description="Eq. 2, the newest classifier against the residual label")
    all: bool = Field(True, description="Eq. 3, all classifiers together")
    previous: bool = Field(True, description="Eq. 4, all but the newest")

    @model_validator(mode="after")
    def _one_at_least(self) -> Objectives:
        if not self.terms:
            raise ValueError("objectives: at least one of residual, all, previous must be true")
        return self

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(name for name in ("residual", "all", "previous") if getattr(self, name))


class AUGConfig(MethodConfig):
    hidden: int = Field(256, gt=0, description="width of Layer1 (released code)")
    lam: float = Field(
        0.5,
        ge=0,
        le=1,
        description="residual coefficient; 0.5 in the final code, 0.2 in its first upload; paper: search 0.1-1",
    )
    residual: Literal["cumulative", "sum_of_probabilities"] = Field(
        "cumulative",
        description="residual label: released code's form, or as printed in the paper (clamped at 0)",
    )
    objectives: Objectives = Field(Objectives(), description="terms of Eq. 5")
    assign: Literal["adaptive", "fixed"] = Field(
        "adaptive", description="ACA (paper), or `classifiers` from the start (Table 5)"
    )
    classifiers: dict[str, int] = Field(
        {},
        description="classifiers per modality at the start; 1 for those not named (Table 5: 10 or 12 for the weak one)",
    )
    check_every: int | None = Field(
        None, gt=0, description="t_N in epochs; default epochs // 10 as in the released code, at least 1"
    )
    sigma: float | None = Field(
        None,
        gt=0,
        description="balanced ratio; default 1.0 for two modalities (paper), 0.8 for more (released: share < 0.4 of 3)",
    )
    tau: float | None = Field(
        None,
        ge=0,
        description="dead zone around sigma; default 0.01 for two modalities (paper), 0 for more (released)",
    )
    policy: Literal["weakest_only", "all_below"] | None = Field(
        None,
        description="who gets a classifier; default weakest_only for two modalities, all_below for more (released)",
    )
    weights: Literal["none", "fixed", "learned"] = Field(
        "none",
        description="weight of classifiers 2, 3, ..: 1, `weight`, or a network's (first version of the paper)",
    )
    weight: float = Field(0.5, gt=0, description="the fixed weight (Table 6: 0.75, 0.5, 0.25)")
    train_new_classifiers: bool = Field(
        True,
        description="train classifiers that ACA adds (paper's text); "
        "false: frozen, as the released code does by mistake",
    )
    new_classifiers: Literal["xavier", "zero"] = Field(
        "xavier", description="start of Layer1 of added classifiers (released: xavier)"
    )
    fusion_weights: dict[str, float] = Field(
        {},
        description="alpha_m of the prediction; default 1/M each "
        "(released: audio 0.4, video 0.6 on CREMA-D and Kinetics-Sounds)",
    )


class AUG(Method[AUGConfig]):
    """The weak modality gets a growing stack of classifiers, decided from the modalities' training scores."""

    Config = AUGConfig
    paper = "Jiang, Huang, Yang. NeurIPS 2025"
    modality_predictions = "Z_m, all classifiers of the modality; parts: the first one, and all but the newest"
    beyond_two = "released code for three modalities, written for any number: ratio to the mean of the others"
    released = (
        "The optimizer never sees classifiers that are added, so they stay as they were initialised; here they are "
        "trained as the text says, and train_new_classifiers=false gives the released behaviour. The residual label "
        "of the code is the default, since the printed one can turn negative (residual=sum_of_probabilities)."
    )

    def __init__(self, config: AUGConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        two = len(self.modalities) <= 2
        self.sigma = config.sigma if config.sigma is not None else (1.0 if two else 0.8)
        self.tau = config.tau if config.tau is not None else (0.01 if two else 0.0)
        self.policy: Literal["weakest_only", "all_below"] = config.policy or ("weakest_only" if two else "all_below")
        self.every = config.check_every or max(1, setting.epochs // 10)
        self.checks = check_epochs(setting.epochs, self.every) if config.assign == "adaptive" else []
        for field in ("classifiers", "fusion_weights"):
            if unknown := set(getattr(config, field)) - set(self.modalities):
                raise ConfigError(
                    f"method.{field} names {', '.join(sorted(unknown))}; modalities: {', '.join(self.modalities)}"
                )
        if any(n < 1 for n in config.classifiers.values()):
            raise ConfigError("method.classifiers: every modality needs at least one classifier")
        self.learned = config.weights == "learned"
        self._batch_scores: dict[str, Tensor] = {}
        self._epoch_scores = [0.0] * len(self.modalities)  # running sums, only for learned weights
        self._batches = 0
        self._state: list[float] = []

    def head(self, widths: Mapping[str, int]) -> Head:
        initial = {m: self.config.classifiers.get(m, 1) for m in self.modalities}
        equal = 1 / len(self.modalities)
        return BoostedHead(
            widths,
            self.setting.num_classes,
            hidden=self.config.hidden,
            initial=initial,
            capacity={m: n + len(self.checks) for m, n in initial.items()},
            fusion_weights={m: self.config.fusion_weights.get(m, equal) for m in self.modalities},
            new_classifiers=self.config.new_classifiers,
            train_new=self.config.train_new_classifiers,
            weight=self.config.weight if self.config.weights == "fixed" else 1.0,
            learn_weights=self.learned,
            seed=self.setting.seed,
        )

    def lr_groups(self, net: MultimodalNet) -> Mapping[str, Sequence[nn.Parameter]]:
        weigher = _head(net).weigher
        return {} if weigher is None else {WEIGHTS_PHASE: list(weigher.parameters())}

    def lr_scales(self) -> Mapping[str, float]:
        return {WEIGHTS_PHASE: 0.1}  # released code: base lr / 10

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        self._epoch_scores = [0.0] * len(self.modalities)
        self._batches = 0

    def phases(self, epoch: int) -> tuple[str, ...]:
        return (*self.modalities, WEIGHTS_PHASE) if self.learned else self.modalities

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        if step.phase != WEIGHTS_PHASE:
            return net(batch, [step.phase])
        head = _head(net)
        assert head.weigher is not None
        return Outputs({}, {}, extra={WEIGHTS_PHASE: head.weigher(head.confidence)})

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        if step.phase == WEIGHTS_PHASE:
            return {WEIGHTS_PHASE: self._weight_loss(out.extra[WEIGHTS_PHASE])}
        name, labels = step.phase, batch[LABEL]
        if self.learned:
            self._batch_scores[name] = true_class_scores(out.unimodal[name].detach(), labels).sum()
        terms = boosting_losses(
            out.stacks[name],
            out.extra[f"weight/{name}"],
            labels,
            lam=self.config.lam,
            residual=self.config.residual,
            terms=self.config.objectives.terms,
        )
        return {f"{name}/{term}": value for term, value in terms.items()}

    def _weight_loss(self, predicted: Tensor) -> Tensor:
        """MSE of the weights made from the old state against who is weak by the new one; advances the state."""
        batch = self.comm.sum(torch.stack([self._batch_scores[m] for m in self.modalities])).tolist()
        self._epoch_scores = [total + s for total, s in zip(self._epoch_scores, batch, strict=True)]
        self._state, target = confidence_state(batch, self._epoch_scores, self._batches)
        self._batches += 1
        return F.mse_loss(predicted, predicted.new_tensor(target))

    def end_batch(self, net: MultimodalNet, step: Step) -> None:
        if self.learned:
            confidence = _head(net).confidence
            confidence.copy_(confidence.new_tensor(self._state))

    def fuse(self, net: MultimodalNet, out: Outputs) -> Tensor:
        return out.fused if out.fused is not None else _head(net).fuse(out.unimodal)

    def parts(self, net: MultimodalNet, out: Outputs) -> dict[str, Tensor]:
        """The first classifier of a modality alone, and all but its newest."""
        found = {f"{name}/first": stack[:, 0] for name, stack in out.stacks.items()}
        for name, stack in out.stacks.items():
            if stack.shape[1] > 1:
                found[f"{name}/previous"] = cumulative_logits(stack, out.extra[f"weight/{name}"], stack.shape[1] - 1)
        return found

    def decide(self, history: Sequence[EpochStats]) -> Decision | None:
        last = history[-1]
        if last.epoch not in self.checks or len(self.modalities) < 2:
            return None
        add, ratios = assignment(last.train.scores, self.sigma, self.tau, self.policy)
        inputs = {
            "scores": last.train.mean_scores,
            "ratios": ratios,
            "sigma": self.sigma,
            "tau": self.tau,
            "policy": self.policy,
        }
        return Decision(last.epoch, "assign_classifier", add, inputs)

    def apply(self, net: MultimodalNet, decision: Decision) -> None:
        for name in decision.add:
            _head(net).grow(name)

    def num_classifiers(self, net: MultimodalNet) -> dict[str, int]:
        return dict(_head(net).num_classifiers)

    def classifier_weights(self, net: MultimodalNet) -> dict[str, list[float]]:
        """1, then w_m for all others."""
        if self.config.weights == "none":
            return {}
        head = _head(net)
        weights = zip(head.modalities, head.weights().tolist(), strict=True)
        return {name: [1.0] + [weight] * (head.num_classifiers[name] - 1) for name, weight in weights}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch_scores": self._epoch_scores, "batches": self._batches} if self.learned else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.learned:
            self._epoch_scores, self._batches = list(state["epoch_scores"]), int(state["batches"])


def confidence_state(batch: Sequence[float], epoch: Sequence[float], index: int) -> tuple[list[float], list[float]]:
    """The state q_m of the weight network after batch `index` (0-based) of an epoch, and its target.

    batch, epoch: scores S_m summed over this batch and over the epoch so far, this batch included.
    q_m is the mixture S_batch / (k + 1) + S_epoch k / (k + 1) of m over that of the others; the target is 0 for a
    strong modality and 1 for a weak one.
    """
    k = index
    mixed = [b / (k + 1) + e * k / (k + 1) for b, e in zip(batch, epoch, strict=True)]
    total = sum(mixed)
    state = [value / max(total - value, 1e-12) for value in mixed]
    if len(state) == 2:
        return state, [0.0, 1.0] if state[0] > 1 else [1.0, 0.0]
    return state, [0.0 if q > 0.5 else 1.0 for q in state]


def _head(net: MultimodalNet) -> BoostedHead:
    assert isinstance(net.head, BoostedHead)
    return net.head
