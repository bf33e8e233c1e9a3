"""Modality-specific learning rates (MSLR): every modality of a late-fusion model has a rate of its own.

Yao, Mihalcea. Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion. Findings of ACL 2022.

    L = CE(sum_m z_m, y),   z_m from a Linear per modality
    lr_m(e) = lr(e) c_m r_m(e)                                    encoder and Linear of m, epoch e
    r_m(e)  = acc_m(e - 1) / mean(acc_m(e - 6) .. acc_m(e - 2))   "dynamic": held-out accuracy, from epoch 7 on; else 1
    r_m(e)  = 1                                                   "keep": the factors c_m are all there is

A modality that improves is sped up, one that has stopped improving or gets worse is slowed down.

The dynamic rule is the one that released code of others has (the repository of AGM); the paper's text was not at
hand. The paper starts from encoders that were trained alone, here they start anew like those of every other method.
Differs from that code: it multiplies gradients, so that weight decay keeps the common rate and momentum mixes old
factors with new ones, and Adam cancels them (`apply: gradients`); here the optimizer has the rates. It takes
accuracies from the test split, those of one modality by mistake for both; here they come from valid, or from train
where there is no valid split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from counterpoise.contracts import Batch, Comm, ConfigError, EpochContext, Outputs, Step
from counterpoise.methods.base import Method, MethodConfig, Setting
from counterpoise.models.heads import Head, SumHead
from counterpoise.models.network import MultimodalNet

RELEASED_FACTORS = {"audio": 0.9, "visual": 1.1}


def improvement(accuracies: Sequence[float], window: int) -> float:
    """r_m: the last accuracy over the mean of the `window` before it; 1 until there are that many, or all are 0."""
    before = accuracies[-window - 1 : -1]
    mean = sum(before) / window
    return accuracies[-1] / mean if len(before) == window and mean > 0 else 1.0


class MSLRConfig(MethodConfig):
    strategy: Literal["dynamic", "keep"] = Field(
        "dynamic", description="factors that follow accuracies (released by others), or fixed ones (keep: paper)"
    )
    factors: dict[str, float] | None = Field(
        None,
        description="c_m by modality, 1 for those not named; null: audio 0.9 and visual 1.1 where there are modalities "
        "of these names (released by others)",
    )
    window: int = Field(5, ge=1, description="epochs that the last accuracy is compared to (released by others)")
    first_epoch: int = Field(1, ge=1, description="the first epoch with rates of its own (ours)")
    last_epoch: int | None = Field(
        None, ge=1, description="the last epoch with rates of its own; null: the end of the run (ours)"
    )
    apply: Literal["lr", "gradients"] = Field(
        "lr", description="what is scaled: learning rates (paper), or gradients (released by others)"
    )

    @model_validator(mode="after")
    def _keep_needs_factors(self) -> MSLRConfig:
        if self.strategy == "keep" and self.factors is None:
            raise ValueError("strategy keep needs factors, e.g. {audio: 0.5, visual: 2.0}")
        if any(factor <= 0 for factor in (self.factors or {}).values()):
            raise ValueError("factors must be above 0")
        return self


class MSLR(Method[MSLRConfig]):
    """Late fusion with a learning rate per modality, higher for one that still improves."""

    Config = MSLRConfig
    paper = "Yao, Mihalcea. Findings of ACL 2022"
    modality_predictions = "the terms z_m of the sum head: they add up to the fused logits"
    beyond_two = "any number of modalities: each has a rate by its own accuracies, c_m is 1 where none is given"
    released = (
        "The authors' code is not known to us; that of others multiplies gradients and reads test accuracies. Here the "
        "optimizer has the rates and accuracies are held-out ones; apply=gradients gives the former."
    )
    min_modalities = 2

    def __init__(self, config: MSLRConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        if unknown := set(config.factors or {}) - set(self.modalities):
            raise ConfigError(
                f"method.factors names {', '.join(sorted(unknown))}; modalities: {', '.join(self.modalities)}"
            )
        factors = RELEASED_FACTORS if config.factors is None else config.factors
        self.factors = {m: factors.get(m, 1.0) for m in self.modalities}
        self.scales = dict.fromkeys(self.modalities, 1.0)  # of the present epoch

    def head(self, widths: Mapping[str, int]) -> Head:
        return SumHead(widths, self.setting.num_classes)

    def lr_groups(self, net: MultimodalNet) -> Mapping[str, Sequence[nn.Parameter]]:
        return {m: _parameters(net, m) for m in self.modalities}

    def lr_scales(self) -> Mapping[str, float]:
        return self.scales if self.config.apply == "lr" else {}

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        config = self.config
        self.scales = dict.fromkeys(self.modalities, 1.0)
        if config.first_epoch <= context.epoch <= (config.last_epoch or self.setting.epochs):
            self.scales = dict(self.factors)
            if config.strategy == "dynamic":
                for m in self.modalities:
                    self.scales[m] *= improvement([h.held_out.accuracy[m] for h in context.history], config.window)

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        if self.config.apply == "gradients":
            for m in self.modalities:
                for parameter in _parameters(net, m):
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.scales[m])
        return {f"rate/{m}": torch.tensor(scale) for m, scale in self.scales.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"scales": self.scales}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scales = dict(state["scales"])


def _parameters(net: MultimodalNet, modality: str) -> list[nn.Parameter]:
    """The encoder of a modality and its Linear."""
    assert isinstance(net.head, SumHead)
    return [*net.encoders[modality].parameters(), *net.head.linears[modality].parameters()]
